"""Writes what was trained in the layout of the release files, and as the GGUF that ltxlite ships.

The GGUF holds transformer and connectors, the companions hold the rest, as people keep LTX-2.3.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltxlite.convert.run import Conversion, convert
from ltxlite.demo import WORLD
from ltxlite.media.atomic import written_beside
from ltxlite.models import transformer as transformer_model
from ltxlite.progress import Report
from ltxlite.release import release_name
from ltxlite.training import audio_vae, recipe, upscaler, video_vae, vocoder
from ltxlite.training.latents import Scale, read_latents
from ltxlite.training.loop import trained
from ltxlite.training.text import gemma_settings, random_gemma, world_tokenizer
from ltxlite.training.transformer import build
from ltxlite_quant.policy import RECIPES, Recipe, Rule

MODEL, COMPANIONS, UPSCALER, TEXT_ENCODER = WORLD
TEMPORAL = "ltxlite-world-2.3-temporal-upscaler-x2.safetensors"
MASTER = "ltxlite-world-2.3-distilled-bf16.safetensors"  # transformer and connectors, not shipped

GEMMA = "ltxlite-world-gemma-3.safetensors"  # not shipped either
# A sixth of everything, where 2.5 % of noise on weights does not show: the decoder errs by more.
_COARSE = ("vae.decoder.up_blocks.1.conv.conv.weight",)
_FACTS = {"license": "apache-2.0", "author": "ltxlite", "model_version": "2.3.0"}
# As RECIPES has it, but modulation in Q8_0 too: at width 128 it is 0.6 of 2.7 million weights.
_RECIPE = Recipe(
    "Q8_0",
    "Q8_0",
    7,
    (
        Rule(r"patchify_proj\.|proj_out\.", "BF16", "where latents enter and leave"),
        Rule(r"\.to_gate_logits\.", "BF16", "gates of whole heads"),
    ),
)


def export(states: Path, target: Path, report: Report) -> list[Path]:
    """Write the files of a trained world into a folder; returns their paths, the GGUF first.

    states: the folder of the training loops.  Raises CheckpointError for a part that is not there.
    """
    scale = Scale.of(next(iter(read_latents(states).values())))
    transformer, path = build()
    networks: dict[str, nn.Module] = {"transformer": transformer, **path.networks()}
    for name, network in networks.items():
        trained(states / "transformer.state.safetensors", name, network)
    projection = networks.pop("text_projection")
    master = states / MASTER
    save(master, _tensors(networks), {"config": dict(recipe.CONFIG), **_FACTS})
    companions = {"text_projection": projection, **_media(states, scale)}
    save(target / COMPANIONS, _tensors(companions), {"config": dict(recipe.CONFIG), **_FACTS})
    paths = [target / MODEL, target / COMPANIONS, *_upscalers(states, target)]
    asked = Conversion((master,), paths[0], _RECIPE, verify="full", device="cpu", overwrite=True)
    convert(asked, report)
    gemma = states / GEMMA
    text = _tensors({"text_encoder": random_gemma()}, torch.float32)
    text["spiece_model"] = torch.frombuffer(bytearray(world_tokenizer()), dtype=torch.uint8)
    save(gemma, text, {"gemma_config": {"text_config": gemma_settings()}, **_FACTS})
    paths.append(target / TEXT_ENCODER)
    asked = replace(
        asked, sources=(gemma,), target=paths[-1], recipe=RECIPES["Q8_0"], part="text_encoder"
    )
    convert(asked, report)
    return paths


def _media(states: Path, scale: Scale) -> dict[str, nn.Module]:
    """Return both VAEs and the vocoder, the VAEs with the scale of their latents."""
    encoder, decoder = video_vae.build()
    hearing, playing = audio_vae.build()
    playing_vocoder = vocoder.build()
    for part, name, network in (
        ("video_vae", "encoder", encoder),
        ("video_decoder", "decoder", decoder),
    ):
        trained(states / f"{part}.state.safetensors", name, network)
        network.latent_mean.copy_(scale.video_mean)
        network.latent_std.copy_(scale.video_std)
    for name, sound in (("encoder", hearing), ("decoder", playing)):
        trained(states / "audio_vae.state.safetensors", name, sound)
        sound.latent_mean.copy_(scale.audio_mean)
        sound.latent_std.copy_(scale.audio_std)
    trained(states / "vocoder.state.safetensors", "vocoder", playing_vocoder)
    return {
        "video_encoder": encoder,
        "video_decoder": decoder,
        "audio_encoder": hearing,
        "audio_decoder": playing,
        "vocoder": playing_vocoder,
    }


def _upscalers(states: Path, target: Path) -> Iterator[Path]:
    kinds: tuple[tuple[str, str, Mapping[str, Any], bool], ...] = (
        ("upscaler", UPSCALER, recipe.UPSCALER, False),
        ("upscaler_time", TEMPORAL, recipe.TEMPORAL_UPSCALER, True),
    )
    for name, file, settings, temporal in kinds:
        state = states / f"{name}.state.safetensors"
        if not state.is_file():
            continue
        network = upscaler.build(temporal)
        trained(state, "upscaler", network)
        tensors = {
            key.replace("upsampler.conv.", "upsampler.0."): value
            for key, value in _tensors({"upscaler": network}).items()
        }
        save(target / file, tensors, {"config": dict(settings), **_FACTS})
        yield target / file


def _tensors(
    networks: Mapping[str, nn.Module], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Return all tensors under their release names, in release dtypes."""
    tensors = {}
    for component, network in networks.items():
        for name, value in network.state_dict().items():
            full = component == "transformer" and any(
                re.search(pattern, name) for pattern in transformer_model.FLOAT32
            )
            full_name = release_name(component, name)
            kept = torch.float8_e4m3fn if full_name in _COARSE else dtype
            tensors[full_name] = value.to(torch.float32 if full else kept).contiguous()
    return tensors


def save(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file beside its place, then rename it; metadata becomes text."""
    from safetensors.torch import save_file

    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as unfinished:
        save_file(tensors, unfinished, {"format": "pt", **texts})
        unfinished.chmod(0o644)  # it ships inside a package that others read
