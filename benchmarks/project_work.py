"""The work of a job: operations and bytes, counted from the networks themselves on `meta`.

Nothing is measured here and nothing assumed but what is named so.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels_torch_decode import DECODERS
from benchmarks.traffic import Launches
from benchmarks.vram_models import components, transformer_config
from ltxlite.geometry import ClipShape
from ltxlite.media.colour import to_unit_range
from ltxlite.models.audio_vae import AudioDecoder
from ltxlite.models.block import Block
from ltxlite.models.connector import Connector
from ltxlite.models.gemma import Gemma
from ltxlite.models.rolling import decode_frames
from ltxlite.models.text_projection import TextProjection
from ltxlite.models.upscaler import LatentUpscaler, upscale_normalised
from ltxlite.models.video_vae import VideoDecoder
from ltxlite.models.vocoder import build_vocoder
from ltxlite_quant.formats import FORMATS

TEXT_TOKENS = 1024  # a prompt of the greatest length
META = torch.device("meta")

# Which sequence a Linear of a block works on.
_SOURCES = (
    (r"\.text_attention\.to_[kv]$", "text"),
    (r"^audio_to_video\.to_[kv]$", "audio"),
    (r"^audio_to_video\.", "video"),
    (r"^video_to_audio\.to_[kv]$", "video"),
    (r"^video_to_audio\.", "audio"),
    (r"^video\.", "video"),
    (r"^audio\.", "audio"),
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Lengths of the sequences of a forward pass."""

    video: int
    audio: int
    text: int = TEXT_TOKENS


@dataclass(frozen=True, slots=True)
class Product:
    """A matmul of a forward pass: (rows, columns) by (features, columns), so many times."""

    rows: int
    features: int
    columns: int
    count: int

    @property
    def flops(self) -> float:
        """Operations of all of them."""
        return 2.0 * self.rows * self.features * self.columns * self.count

    @property
    def elements(self) -> int:
        """Elements of the weights of all of them."""
        return self.features * self.columns * self.count


@cache
def block_linears() -> Mapping[str, tuple[int, int]]:
    """Return the Linears of a block of LTX-2.3: name -> (N, K)."""
    with META:
        block = Block(transformer_config())
    return {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def products(tokens: Tokens) -> list[Product]:
    """Return the matmuls of a forward pass that have a weight."""
    layers = transformer_config().layers
    found: list[Product] = []
    for name, (features, columns) in block_linears().items():
        source = next(where for pattern, where in _SOURCES if re.search(pattern, name))
        found.append(Product(getattr(tokens, source), features, columns, layers))
    return found


@dataclass(frozen=True, slots=True)
class Mixing:
    """An attention: so many queries at so many keys, over a width of all heads, so many times."""

    queries: int
    keys: int
    width: int
    count: int

    @property
    def flops(self) -> float:
        """Operations of both of its products."""
        return 4.0 * self.queries * self.keys * self.width * self.count


def mixings(tokens: Tokens) -> list[Mixing]:
    """Return the attentions of a forward pass, the picture's own first."""
    config = transformer_config()
    video, audio, cross = config.video.width, config.audio.width, config.cross_width
    m, a, t = tokens.video, tokens.audio, tokens.text
    shapes = ((m, m, video), (m, t, video), (a, a, audio), (a, t, audio))
    return [Mixing(*shape, config.layers) for shape in (*shapes, (m, a, cross), (a, m, cross))]


class Traffic(Launches):
    """Counts kernels, the bytes they read and write, and the operations of products.

    Every kernel moves each of its tensors once: caches are ignored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.nbytes, self.flops = 0, 0, 0.0
        self.product_bytes = 0

    def launched(
        self, func: Any, args: tuple[Any, ...], named: Mapping[str, Any], result: Any
    ) -> None:
        """Add a kernel."""
        given, made = _tensors((args, named)), _tensors(result)
        moved = sum(_moved(one) for one in {id(x): x for x in (*given, *made)}.values())
        self.kernels += 1
        self.nbytes += moved
        self._count_products(func, args, result, moved)

    def _count_products(self, func: Any, args: tuple[Any, ...], result: Any, moved: int) -> None:
        packet = func.overloadpacket
        if packet is torch.ops.aten.convolution:
            weight = args[1]
            transposed = args[6]
            positions = args[0].numel() // args[0].shape[1] if transposed else result.numel()
            per = weight.numel() / (1 if transposed else weight.shape[0])
            self.flops += 2.0 * positions * per
        elif packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet]], args[_PRODUCTS[packet] + 1]
            self.flops += 2.0 * left.numel() * right.shape[-1]
        else:
            return
        self.product_bytes += moved


_PRODUCTS = {
    torch.ops.aten.mm: 0,
    torch.ops.aten.bmm: 0,
    torch.ops.aten.addmm: 1,
    torch.ops.aten.baddbmm: 1,
}


def _moved(x: Tensor) -> int:
    """Return the bytes of a tensor, those that a broadcast repeats once."""
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    total = x.element_size()
    for size in sizes:
        total *= size
    return total


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    if isinstance(tree, (list, tuple)):
        return [tensor for item in tree for tensor in _tensors(item)]
    return []


@dataclass(frozen=True, slots=True)
class Decoding:
    """What torch operations cost to decode a weight: bytes an element, kernels a weight."""

    bytes_per_element: float
    kernels: int


@cache
def torch_decoding(name: str) -> Decoding:
    """Count ComfyUI-GGUF's algorithm, as `kernels_torch_decode` has it, for a format."""
    rows, columns = 64, 4096
    size = rows * columns // FORMATS[name].block_size * FORMATS[name].block_bytes
    with torch.inference_mode(), Traffic() as traffic:
        blocks = torch.empty(size, dtype=torch.uint8, device=META)
        start = traffic.kernels, traffic.nbytes
        DECODERS[name](blocks.view(-1, FORMATS[name].block_bytes)).to(torch.bfloat16)
    moved = traffic.nbytes - start[1]
    return Decoding(moved / (rows * columns), traffic.kernels - start[0])


@dataclass(frozen=True, slots=True)
class Convolving:
    """A convolutional network's run: operations of its products, bytes of all else, kernels."""

    flops: float
    nbytes: float
    kernels: float

    def __add__(self, other: "Convolving") -> "Convolving":
        return Convolving(
            self.flops + other.flops, self.nbytes + other.nbytes, self.kernels + other.kernels
        )

    def times(self, factor: float) -> "Convolving":
        """Return so many of them; kernels stay as many: they grow instead."""
        return Convolving(self.flops * factor, self.nbytes * factor, self.kernels)


def _counted(run: Callable[[], object]) -> Convolving:
    with torch.inference_mode(), Traffic() as traffic:
        run()
    return Convolving(traffic.flops, traffic.nbytes - traffic.product_bytes, traffic.kernels)


_SEEN = 4  # latent rows and columns of a counted clip


@cache
def _decoded(frames: int) -> Convolving:
    config = components("bf16")["video_decoder"].config
    with META:
        decoder = VideoDecoder(config).to(torch.bfloat16).eval()
    size = (1, config.latent_channels, frames, _SEEN, _SEEN)

    def run() -> None:
        latent = torch.empty(size, dtype=torch.bfloat16, device=META)
        for pixels in decode_frames(decoder, latent):
            to_unit_range(pixels[0])

    return _counted(run)


def picture(shape: ClipShape) -> Convolving:
    """Return the work of decoding a clip's picture; it grows with its latent places."""
    two, three = _decoded(2), _decoded(3)
    further = shape.frames - 2
    places = shape.rows * shape.columns / _SEEN**2
    flops = two.flops + further * (three.flops - two.flops)
    nbytes = two.nbytes + further * (three.nbytes - two.nbytes)
    kernels = two.kernels + further * (three.kernels - two.kernels)
    return Convolving(flops, nbytes, kernels).times(places)


@cache
def upscaling(before: ClipShape) -> Convolving:
    """Return the work of enlarging a stage's latent for the next one."""
    with META:
        network = LatentUpscaler(components("bf16")["upscaler x2"].config).to(torch.bfloat16).eval()
    size = (1, network.latent_channels, before.frames, _SEEN, _SEEN)

    def run() -> None:
        latent = torch.empty(size, dtype=torch.bfloat16, device=META)
        mean = torch.empty(size[1], dtype=torch.bfloat16, device=META)
        upscale_normalised(network, latent, mean, mean)

    return _counted(run).times(before.rows * before.columns / _SEEN**2)


@cache
def sound(audio_frames: int) -> Convolving:
    """Return the work of decoding the sound: spectrogram and vocoder."""
    config = components("bf16")["audio_decoder"].config
    with META:
        decoder = AudioDecoder(config).eval()
        vocoder = build_vocoder(components("bf16")["vocoder"].config).eval()
    size = (1, config.latent_channels, audio_frames, config.latent_bins)
    return _counted(lambda: vocoder(decoder(torch.empty(size, device=META))))


@dataclass(frozen=True, slots=True)
class TextWork:
    """The text path: operations of its products, elements of its weights, by network."""

    flops: Mapping[str, float]
    elements: Mapping[str, int]


@cache
def text(tokens: int = TEXT_TOKENS) -> TextWork:
    """Count Gemma, the projection of its states and both connectors; attention is 3 % and left out.

    Connectors always see 1024 rows: prompt and registers.
    """
    found = components("bf16")
    gemma = found["text_encoder"].config
    short = replace(gemma, global_layers=(0,), vocabulary=1)
    one, two = (_elements(partial(Gemma, replace(short, layers=n))) for n in (1, 2))
    elements = {"text encoder": (two - one) * gemma.layers}
    elements["text projection"] = _elements(lambda: TextProjection(found["text_projection"].config))
    elements["connectors"] = sum(
        _elements(partial(Connector, found[n].config))
        for n in ("video_connector", "audio_connector")
    )
    rows = {"connectors": TEXT_TOKENS}
    flops = {name: 2.0 * count * rows.get(name, tokens) for name, count in elements.items()}
    return TextWork(flops, elements)


def _elements(build: Callable[[], nn.Module]) -> int:
    with META:
        network = build()
    linears = (one for one in network.modules() if isinstance(one, nn.Linear))
    return sum(one.weight.numel() for one in linears)
