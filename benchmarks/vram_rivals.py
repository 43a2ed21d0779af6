"""The same account of other ways to run a stage: diffusers with group offload, and no care at all.

diffusers: only its transformer is counted, text and decoders are not, in its favour. Group offload
by blocks with a stream holds the block that runs, the next one and everything outside of blocks
(diffusers 0.42.1, hooks/group_offloading.py). Blocks have our stored size; a quantized weight is
decoded whole. Its attention is the operator that ours is counted with.
A naive run: the running network resident, all tokens in one chunk, the clip decoded in one pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.rivals import RIVALS, _diffusers_settings
from benchmarks.step import settings_of
from benchmarks.vram_models import FULL
from ltxlite.account import Components, Levers, Phase, StageJob
from ltxlite.account.phase import META, blank, metered
from ltxlite.geometry import ClipShape
from ltxlite.linear import QuantLinear
from ltxlite.memory.blank import stored_bytes
from ltxlite.models.connector import CONTEXT_LENGTH
from ltxlite.models.transformer import AdaLN, Transformer
from ltxlite.models.video_vae import VideoDecoder

_HELD_BLOCKS = 2


def diffusers_missing() -> str | None:
    """Say why diffusers cannot be counted here; None if it can."""
    (rival,) = (item for item in RIVALS if item.name == "diffusers")
    return rival.missing()


def diffusers_bytes(components: Components, stage: StageJob, levers: Levers) -> int:
    """Return the peak of one evaluation in diffusers' transformer under group offload."""
    ours = blank("transformer", components["transformer"], Transformer, levers.dtype)
    adaln = sum(stored_bytes(m) for m in ours.network.modules() if isinstance(m, AdaLN))
    weights = ours.fixed_bytes + adaln + _HELD_BLOCKS * max(ours.units)
    decoded = _largest_decoded(ours.network) * levers.dtype.itemsize
    guided = stage.video.cfg != 1  # both prompts in one batch, the other passes one by one
    activations = _diffusers_activations(2 if guided else 1, stage, levers)
    return weights + decoded + activations


def _diffusers_activations(batch: int, stage: StageJob, levers: Levers) -> int:
    run = diffusers_run(1, batch, stage, levers)
    with torch.inference_mode(), metered(levers) as meter:
        run()
    return meter.peak_bytes + meter.library_bytes


def diffusers_run(layers: int, batch: int, stage: StageJob, levers: Levers) -> Callable[[], object]:
    """Return an evaluation of diffusers' transformer of so many blocks, on meta."""
    from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel

    settings = _diffusers_settings(settings_of(FULL)) | {"num_layers": layers}
    with META:
        model = LTX2VideoTransformer3DModel(**settings)
    for value in model.parameters():
        value.data = value.data.to(levers.dtype)
    model.eval()
    return lambda: model(**_diffusers_inputs(batch, stage, levers.dtype), return_dict=False)


def _diffusers_inputs(
    batch: int, stage: StageJob, dtype: torch.dtype
) -> dict[str, Tensor | bool | None]:
    tokens, sound = stage.shape.video_tokens, stage.shape.audio_frames

    def made(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(batch, *size, dtype=dtype, device=META)

    wide = torch.float32
    # With an image its pipeline gives every token a timestep of its own.
    timestep = made(tokens, dtype=wide) if stage.images else made(dtype=wide)
    return {
        "hidden_states": made(tokens, 128),
        "audio_hidden_states": made(sound, 128),
        "encoder_hidden_states": made(CONTEXT_LENGTH, 4096),
        "audio_encoder_hidden_states": made(CONTEXT_LENGTH, 2048),
        "timestep": timestep,
        "audio_timestep": made(dtype=wide),
        "sigma": made(dtype=wide),
        "audio_sigma": made(dtype=wide),
        "video_coords": made(3, tokens, 2, dtype=wide),
        "audio_coords": made(1, sound, 2, dtype=wide),
        "use_cross_timestep": True,
    }


def _largest_decoded(network: Transformer) -> int:
    """Return the elements of the largest quantized weight; 0 if none is."""
    found = (module for module in network.modules() if isinstance(module, QuantLinear))
    return max((module.rows * module.columns for module in found), default=0)


def one_pass_decode(components: Components, shape: ClipShape, levers: Levers) -> Phase:
    """Return the account of decoding a clip at once."""
    made = blank("video_decoder", components["video_decoder"], VideoDecoder, levers.dtype)
    size = (1, made.network.config.latent_channels, shape.frames, shape.rows, shape.columns)
    with torch.inference_mode(), metered(levers) as meter:
        made.network(torch.empty(size, device=META))
        return made.phase("decode picture", meter)
