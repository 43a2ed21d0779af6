"""Networks of any size with random, valid weights: what `engine` runs where there are no files.

Blocks of a kind are the same values in one memory: 48 of them take the RAM of one until they are
copied into arenas or onto the card. Quantized weights are random bytes whose scales are set so that
an output has the variance of its input; their values differ like any other's and decode to numbers.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks import vram_models
from ltxlite.account import Component, Components, StageJob
from ltxlite.geometry import AudioGrid, ClipShape, LatentGrid
from ltxlite.linear import QuantMatrix
from ltxlite.math_mode import capability_of, set_math
from ltxlite.memory.blank import Weights, fill
from ltxlite.memory.place import Anatomy, Memory, place
from ltxlite.memory.stream import Placement
from ltxlite.models.connector import Connector, ConnectorConfig
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.text_projection import TextProjection, TextProjectionConfig
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import StreamConfig, TransformerConfig
from ltxlite.models.video_vae import VideoDecoder
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.networks import ANATOMY, NAMINGS
from ltxlite.pieces import cut_linears
from ltxlite.presets import Model, stages_for
from ltxlite_quant.formats import FORMATS, BlockFormat

WEIGHTS = "Q4_K_M"
FPS = 24.0
_DRAWN = 1 << 20  # random numbers that a plain weight repeats
# Where a block has its fp16 scales, and what they are for weights of standard deviation 1: uniform
# codes and sub-scales give 258 d (Q4_K, dmin = 7.5 d takes the mean away), 1366 d and 74 d.
_SCALES = {
    "Q4_K": ((0, 1 / 258), (2, 7.5 / 258)),
    "Q6_K": ((208, 1 / 1366),),
    "Q8_0": ((0, 1 / 74),),
}
_BUILDS: dict[str, Callable[[Any], nn.Module]] = {
    "text_encoder": Gemma,
    "text_projection": TextProjection,
    "video_connector": Connector,
    "audio_connector": Connector,
    "transformer": Transformer,
    "video_decoder": VideoDecoder,
}
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Rig:
    """What networks run on: the device, the dtype of activations, the arithmetic of linears."""

    device: torch.device
    dtype: torch.dtype
    math: str

    @property
    def capability(self) -> int | None:
        """Return the card's, None without one."""
        return capability_of(self.device)


def full_components() -> Components:
    """Return the networks of the 22B release, Q4_K_M; of Gemma's embeddings there is one row."""
    found = dict(vram_models.components(WEIGHTS))
    found["text_encoder"] = _without_table(found["text_encoder"])
    return found


def small_components() -> Components:
    """Return networks of the same structure, four blocks of width 256."""
    video = StreamConfig(16, 16, 2, 128, 256, (20, 64, 64))
    config = TransformerConfig(video, replace(video, max_positions=(20,)), 4, 256)
    gemma = GemmaConfig(256, 3, 2, 1, 128, 512, 1, (1,))
    connector = ConnectorConfig(2, 128, 2)
    sizes = TextProjectionConfig(gemma.hidden, gemma.states, 256, 256)
    decoder = replace(VideoVAEConfig.released("2.3"), latent_channels=16, decoder_width=16)
    found = {
        "transformer": Component(config),
        "text_encoder": Component(gemma),
        "text_projection": Component(sizes),
        "video_connector": Component(connector),
        "audio_connector": Component(connector),
        "video_decoder": Component(decoder),
    }
    for name, layers in (("transformer", "blocks"), ("text_encoder", "layers")):
        formats = _formats(_BUILDS[name], found[name].config, layers)
        found[name] = replace(found[name], weights=Weights(formats))
    return found


def clip(frames: int, width: int, height: int) -> tuple[StageJob, ...]:
    """Return the stages of a distilled clip."""
    found = []
    for stage in stages_for(Model("distilled")):
        rows, columns = (int(side * stage.fraction) // 32 for side in (height, width))
        sound = AudioGrid().latent_frames(frames, FPS)
        shape = ClipShape(LatentGrid().latent_frames(frames), rows, columns, sound, FPS)
        steps = 3 if stage.upscaler else 8
        found.append(StageJob(shape, steps=steps, upscaler=stage.upscaler))
    return tuple(found)


def drawn(name: str, component: Component, rig: Rig, chunk: int | None = None) -> nn.Module:
    """Build a component's network on the CPU, with values, ready to be placed."""
    with torch.device("meta"):
        network = _BUILDS[name](component.config)
    fill(network, component.weights, rig.dtype, NAMINGS[name].keeps_float32)
    network.requires_grad_(False).eval()
    if isinstance(network, TextProjection):
        cut_linears(network, [child for child, _ in network.named_children()])
    _give_values(network, _anatomy(name, network).streamed)
    if isinstance(network, Transformer):
        network.chunk = network.chunk if chunk is None else chunk
        set_math(network, rig.math, rig.capability)
    return network


def put(name: str, network: Network, rig: Rig, memory: Memory, placement: Placement) -> Network:
    """Place a drawn network as `Networks` places a loaded one; its blocks come from RAM."""
    anatomy = _anatomy(name, network)
    if anatomy.streamed:
        place(network, anatomy, rig.device, memory, placement, ())
        return network
    return network.to(rig.device)


def random_blocks(block_format: BlockFormat, shape: tuple[int, int], columns: int) -> Tensor:
    """Draw the blocks of a matrix: (N, row_bytes) uint8, of columns weights a row."""
    words = math.ceil(math.prod(shape) / 8)
    random = torch.Generator().manual_seed(words)
    drawn = torch.empty(words, dtype=torch.int64)
    drawn.random_(-(1 << 63), None, generator=random)
    data = drawn.view(torch.uint8)[: math.prod(shape)].view(-1, block_format.block_bytes)
    for place_, factor in _SCALES[block_format.name]:
        scale = torch.tensor([factor / math.sqrt(columns)], dtype=torch.float16)
        data[:, place_ : place_ + 2] = scale.view(torch.uint8)
    return data.view(shape)


def _anatomy(name: str, network: nn.Module) -> Anatomy:
    if isinstance(network, TextProjection):
        return Anatomy(tuple(f"{child}.pieces" for child, _ in network.named_children()))
    found = ANATOMY.get(name, Anatomy())
    present = {own for own, _ in network.named_modules()}
    return replace(found, host=tuple(own for own in found.host if own in present))


def _without_table(gemma: Component) -> Component:
    return replace(gemma, config=replace(gemma.config, vocabulary=1))


def _formats(build: Callable[[Any], nn.Module], config: Any, layers: str) -> dict[str, BlockFormat]:
    """Let half of the linears of all layers be Q4_K and half Q6_K, where rows are whole blocks."""
    with torch.device("meta"):
        network = build(config)
    linears = [
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(f"{layers}.")
        and module.in_features % FORMATS["Q4_K"].block_size == 0
    ]
    return {
        name: FORMATS["Q6_K" if "v_proj" in name or "to_v" in name else "Q4_K"] for name in linears
    }


def _give_values(network: nn.Module, streamed: tuple[str, ...]) -> None:
    numbers = re.compile(rf"^({'|'.join(streamed)})\.\d+\.") if streamed else None
    shared: dict[object, Tensor] = {}
    for path, module in network.named_modules():
        for registry in (module._parameters, module._buffers):
            for name, blank in registry.items():
                if blank is None or not blank.is_meta:
                    continue
                own = f"{path}.{name}"
                key = (numbers.sub(r"\1.", own) if numbers else own, blank.shape, blank.dtype)
                if key not in shared:
                    shared[key] = _value(module, name, blank)
                value = shared[key]
                is_parameter = isinstance(blank, nn.Parameter)
                registry[name] = nn.Parameter(value, False) if is_parameter else value


def _value(module: nn.Module, name: str, blank: Tensor) -> Tensor:
    if isinstance(module, QuantMatrix) and name == "blocks":
        rows, row_bytes = blank.shape
        if module.format.name in _SCALES:
            return random_blocks(module.format, (rows, row_bytes), module.columns)
        assert module.format.dtype is not None  # stored plainly, in another dtype
        values = _noise((rows, module.columns)) / math.sqrt(module.columns)
        return values.to(module.format.dtype).view(torch.uint8)
    if name == "weight" and blank.dim() > 1:
        return (_noise(blank.shape) / math.sqrt(blank[0].numel())).to(blank.dtype)
    if blank.dim() == 1 and name in ("weight", "latent_std"):
        return torch.ones(blank.shape, dtype=blank.dtype)
    if name == "bias" or blank.dim() == 1:
        return torch.zeros(blank.shape, dtype=blank.dtype)
    return (0.1 * _noise(blank.shape)).to(blank.dtype)


def _noise(shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    some = torch.randn(min(count, _DRAWN), generator=torch.Generator().manual_seed(count))
    return some.repeat(math.ceil(count / max(1, len(some))))[:count].view(shape)
