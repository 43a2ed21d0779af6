"""LTX-2.3 at full size as the account of memory takes it: hyper-parameters and stored formats."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import nn

from benchmarks.step import Size, settings_of
from ltxlite.account import Component, Components
from ltxlite.memory.blank import Weights
from ltxlite.models.audio_vae import AudioVAEConfig
from ltxlite.models.connector import Connector, ConnectorConfig
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.settings import Settings
from ltxlite.models.text_projection import TextProjectionConfig
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.models.upscaler import UpscalerConfig
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.models.vocoder import VocoderConfig
from ltxlite.release import EXPORTS, release_name
from ltxlite_quant.formats import FORMATS, BlockFormat
from ltxlite_quant.policy import decide, recipe_named

FULL = Size(blocks=48, heads=32, video_head=128, audio_head=64)
# Q4_K_M stands for a GGUF of that recipe; Gemma is Q4_K_M beside all but bf16.
WEIGHTS = ("bf16", "fp8", "Q8_0", "Q6_K", "Q4_K_M")
_CONNECTORS = {
    "video_connector": ConnectorConfig(heads=32, head_dim=128, layers=8),
    "audio_connector": ConnectorConfig(heads=32, head_dim=64, layers=8),
}


@cache
def transformer_config() -> TransformerConfig:
    """Return the transformer's hyper-parameters."""
    return TransformerConfig.from_settings(Settings(settings_of(FULL), "benchmark"))


@cache
def components(weights: str, rank: int = 0) -> Components:
    """Return all networks, the transformer with a LoRA of that rank on all its block linears."""
    gemma = GemmaConfig()
    config = transformer_config()
    ranks = dict.fromkeys(_block_linears(), (rank,)) if rank else {}
    found = {
        "transformer": Component(config, Weights(_transformer_formats(weights), ranks)),
        "text_encoder": Component(gemma, Weights(_gemma_formats(weights))),
        "text_projection": Component(TextProjectionConfig(gemma.hidden, gemma.states, 4096, 2048)),
        "audio_encoder": Component(AudioVAEConfig()),
        "audio_decoder": Component(AudioVAEConfig()),
        "vocoder": Component(VocoderConfig()),
        "upscaler x2": Component(UpscalerConfig(width=1024)),
    }
    for name, connector in _CONNECTORS.items():
        formats = _recipe(name, _linears(partial(Connector, connector)), weights)
        found[name] = Component(connector, Weights(formats))
    # Reflected edges, as the released file's header has them, cost more than zeros.
    video = replace(VideoVAEConfig.released("2.3"), decoder_padding="reflect")
    for name in ("video_encoder", "video_decoder"):
        found[name] = Component(video)
    return found


@cache
def _transformer_formats(weights: str) -> dict[str, BlockFormat]:
    shapes = _all_layers(lambda count: Transformer(_shortened(count)), "blocks")
    if weights == "fp8":  # as Kijai publishes it: all linears of all blocks
        blocks = (name for name in shapes if name.startswith("blocks."))
        return dict.fromkeys(blocks, FORMATS["F8_E4M3_SCALED"])
    return _recipe("transformer", shapes, weights)


def _gemma_formats(weights: str) -> dict[str, BlockFormat]:
    if weights == "bf16":
        return {}
    shapes = _all_layers(lambda count: Gemma(replace(GemmaConfig(), layers=count)), "layers")
    names = {_gguf_name(name): name for name in shapes}
    return _decided({gguf: shapes[name] for gguf, name in names.items()}, names, "Q4_K_M")


def _recipe(
    component: str, shapes: dict[str, tuple[int, ...]], weights: str
) -> dict[str, BlockFormat]:
    if weights in ("bf16", "fp8"):
        return {}
    prefix = EXPORTS["transformer"][0]  # connectors have it before their own
    names = {release_name(component, name).removeprefix(prefix): name for name in shapes}
    return _decided({own: shapes[name] for own, name in names.items()}, names, weights)


def _decided(
    shapes: dict[str, tuple[int, ...]], names: dict[str, str], recipe: str
) -> dict[str, BlockFormat]:
    decisions = decide(recipe_named(recipe), shapes)
    return {names[item.name]: item.format for item in decisions if item.format.is_quantized}


def _gguf_name(name: str) -> str:
    """Spell what recipes ask for as llama.cpp does; the rest may stay."""
    for ours, theirs in (
        (r"\.mlp\.(\w+)_proj\.", r".ffn_\1."),
        (r"\.self_attn\.v_proj\.", ".attn_v."),
    ):
        name = re.sub(ours, theirs, name)
    return name


def _linears(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = build()
    return {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }


def _all_layers(build: Callable[[int], nn.Module], layers: str) -> dict[str, tuple[int, ...]]:
    """Return the linears of a network of 48 layers, which are alike, from one of one layer."""
    one = _linears(partial(build, 1))
    first = f"{layers}.0."
    rest = {name: shape for name, shape in one.items() if not name.startswith(first)}
    own = {name.removeprefix(first): s for name, s in one.items() if name.startswith(first)}
    count = transformer_config().layers  # Gemma's are as many
    return rest | {f"{layers}.{i}.{name}": s for i in range(count) for name, s in own.items()}


def _shortened(count: int) -> TransformerConfig:
    return replace(transformer_config(), layers=count)


def _block_linears() -> list[str]:
    shapes = _all_layers(lambda count: Transformer(_shortened(count)), "blocks")
    return [name.removesuffix(".weight") for name in shapes if name.startswith("blocks.")]
