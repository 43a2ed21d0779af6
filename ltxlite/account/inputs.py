"""What the account needs, from the headers of the user's files and from the request."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ltxlite.account.job import Job, StageJob
from ltxlite.account.phase import Component
from ltxlite.checkpoint.lora import Lora
from ltxlite.checkpoint.stored import StoredTensor
from ltxlite.conditions import of_stage
from ltxlite.memory.blank import Weights
from ltxlite.models.connector import CONTEXT_LENGTH
from ltxlite.models.text_projection import TextProjectionConfig
from ltxlite.network_configs import upscaler_config
from ltxlite.networks import ANATOMY, Networks
from ltxlite.prompts import prompt_texts
from ltxlite.request import Request
from ltxlite.stage_shapes import stage_shape
from ltxlite.stages import stage_sigmas
from ltxlite_quant.formats import BlockFormat
from ltxlite_quant.scaled import SCALINGS

# Of these, weights of another dtype than the network's stay as stored; so `Networks` loads them.
_AS_STORED = (*ANATOMY, "text_projection")
# Those whose layers `--quantize` changes while they load.
_QUANTIZED_AT_LOAD = ("transformer", "text_encoder")


def components_of(networks: Networks, loras: Sequence[Lora] = ()) -> dict[str, Component]:
    """Return every network that the files hold, as their headers tell it."""
    configs = {
        "transformer": networks.transformer_config(),
        "video_connector": networks.connector_config(sound=False),
        "audio_connector": networks.connector_config(sound=True),
        "text_encoder": networks.gemma_config(),
        "text_projection": TextProjectionConfig.from_shapes(
            networks.shapes("text_projection"), networks.gemma_config()
        ),
        "video_encoder": networks.video_config(),
        "video_decoder": networks.video_config(),
        "audio_encoder": networks.audio_config(),
        "audio_decoder": networks.audio_config(),
        "vocoder": networks.vocoder_config(),
    }
    found = {
        name: Component(config, _weights(networks, name, model.named(name)))
        for name, config in configs.items()
        if (model := networks.files.find(name)) is not None
    }
    for model in networks.files.all("upscaler"):
        weights = _weights(networks, "upscaler", model.named("upscaler"))
        found[f"upscaler {networks.upscaler_kind(model)}"] = Component(
            upscaler_config(model), weights
        )
    if loras:
        transformer = found["transformer"]
        ranks = _ranks(networks, loras)
        weights = Weights(transformer.weights.formats, ranks)
        found["transformer"] = Component(transformer.config, weights)
    return found


def job_of(request: Request, networks: Networks, prompt_tokens: int = CONTEXT_LENGTH) -> Job:
    """Return the sizes of a request; prompts are taken to have so many tokens each.

    Raises RequestError where a stage's size is off the grid.
    """
    stages, nag = [], request.conditions.nag
    avoided = (False, False) if nag is None else (nag.video is not None, nag.audio is not None)
    for number, stage in enumerate(request.stages):
        shape = stage_shape(request, stage, networks)
        plain = StageJob(
            shape,
            stage.video,
            stage.audio,
            stage.sampler,
            len(stage_sigmas(stage, shape)) - 1,
            stage.upscaler,
            avoided=avoided,
            relayed=request.conditions.relay is not None,
            timed=any(stage.lora_strength(i).varies for i in range(len(request.files.loras))),
        )
        stages.append(_with_given(plain, request, networks, number))
    count = len(prompt_texts(request))
    return Job(request.width, request.height, tuple(stages), (prompt_tokens,) * count)


def _with_given(stage: StageJob, request: Request, networks: Networks, number: int) -> StageJob:
    """Add what a stage is given: headers of media are read, nothing is decoded but one frame."""
    conditions, shape = request.conditions, stage.shape
    if not conditions.media():
        return stage
    # With Pillow and PyAV: for jobs with media only.
    from ltxlite.given.takes import stage_takes
    from ltxlite.given.voice import voice_tokens

    takes = stage_takes(request, networks, number, shape)
    encoded = [take.extent for take in takes.all]
    if conditions.source is not None:
        encoded.append((shape.frames, shape.rows, shape.columns))
    strengths = {of_stage(item.strengths, number) for item in conditions.images}
    strengths |= {of_stage(item.strengths, number) for item in conditions.guides}
    strengths |= {item.reference.strength for item in takes.references}
    sound, voice = conditions.sound, conditions.voice
    if sound is not None:
        strengths.add(1 - sound.denoise)
    heard = sound is not None or conditions.source is not None
    voiced = voice_tokens(request, networks, number)
    return replace(
        stage,
        images=max((take.extent[0] for take in takes.images), default=0),
        appended=takes.appended,
        weighted=takes.is_weighted or any(item.attention != 1 for item in conditions.guides),
        held=conditions.source is not None,
        strengths=max(1, len(strengths - {0.0})),
        encoded=tuple(dict.fromkeys(encoded)),
        sound=max(shape.audio_frames if heard else 0, voiced),
        voice=voiced,
        identity=voice is not None and voice.identity > 0 and number + 1 in voice.stages,
        partly=sound is not None and (sound.denoise > 0 or sound.pad == "prefix"),
    )


def _weights(networks: Networks, name: str, stored: Mapping[str, StoredTensor]) -> Weights:
    naming = networks.naming(name)
    formats = {}
    for own, item in stored.items():
        if naming.is_ignored(own) or len(item.shape) != 2:
            continue
        renamed = naming.rename(own)
        chosen = _at_load(networks, name, renamed, item) or item.format
        if _keeps(name, chosen, networks.dtype):
            formats[renamed] = chosen
    return Weights(formats)


def _keeps(name: str, chosen: BlockFormat, dtype: torch.dtype) -> bool:
    quantized = chosen.is_quantized or chosen.name in SCALINGS
    return quantized or (name in _AS_STORED and chosen.dtype != dtype)


def _at_load(
    networks: Networks, component: str, name: str, item: StoredTensor
) -> BlockFormat | None:
    """Return what `--quantize` will make of a weight, None if it leaves it."""
    if networks.at_load is None or component not in _QUANTIZED_AT_LOAD:
        return None
    wanted = networks.at_load.format
    layers = tuple(f"{layers}." for layers in ANATOMY[component].streamed)
    changes = name.startswith(layers) and not item.format.is_quantized
    return wanted if changes and item.shape[1] % wanted.block_size == 0 else None


def _ranks(networks: Networks, loras: Sequence[Lora]) -> dict[str, tuple[int, ...]]:
    naming = networks.naming("transformer")
    ranks: dict[str, tuple[int, ...]] = {}
    for lora in loras:
        for module, term in lora.terms.items():
            name = naming.rename(f"{module}.weight").removesuffix(".weight")
            ranks[name] = (*ranks.get(name, ()), term.a.shape[0])
    return ranks
