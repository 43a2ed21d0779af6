"""Says what decoding a clip needs, and picks the largest window of it that fits a budget.

A window is what of a clip is in memory at once: how many frames pass through the layers together,
and how much of the picture. Time is cut first, which is exact and nearly free; space only where a
single frame at a time does not fit, since tiles are blended and compute their overlaps twice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from ltxlite.errors import BudgetError
from ltxlite.models.causal_conv import WINDOW_BYTES
from ltxlite.models.tiling import Span, Tiling
from ltxlite.models.video_vae_config import COLOURS, VideoVAEConfig

Clip = tuple[int, int, int]  # latent frames, rows, columns
# From where a GPU is full to one frame at a time; at 1920x1088 that is the second one already.
GROUP_LADDER = (64 << 20, 32 << 20, 16 << 20, 8 << 20, 4 << 20, 1)
OVERLAP_PIXELS = 128  # between tiles; the official one is 64 and shows, nothing below 484 is exact
PARKED_BYTES = 2  # fp16: 11 bits of [-1, 1], half a code value of 10-bit video


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """How a clip is decoded.

    group_bytes: what `decode_frames` is told.  rows, columns: of tiles, in latents; size 0 for all.
    frames: the same along time, which only the classical tiles cut.
    need_bytes: predicted peak of activations on the device, weights and the latent not included.
    host_bytes: finished frames of all tiles but the last one, waiting for it in RAM or on disk.
    """

    group_bytes: int
    rows: Span = field(default_factory=Span)
    columns: Span = field(default_factory=Span)
    need_bytes: int = 0
    host_bytes: int = 0
    frames: Span = field(default_factory=Span)

    @property
    def is_whole(self) -> bool:
        """Tell whether the picture is decoded in one piece, which makes the result exact."""
        return self.rows == self.columns == self.frames == Span()

    @property
    def is_classical(self) -> bool:
        """Tell whether time is cut, too."""
        return self.frames != Span()


@dataclass(frozen=True, slots=True)
class _Layer:
    """What counts of a layer: frames kept, channels in and out, places per frame, frames of one."""

    kept: int
    inputs: int
    outputs: int
    places: int
    time: int = 1

    def frames(self, group_bytes: int, itemsize: int, frames: int) -> int:
        """Return how many of `frames` pass at once: they are cut into equal parts that fit."""
        fit = max(1, group_bytes // (max(self.inputs, self.outputs) * self.places * itemsize))
        return math.ceil(frames / math.ceil(frames / fit))

    def work(self, frames: int, itemsize: int) -> int:
        """Return the bytes that live for a moment when `frames` pass, themselves not included."""
        into, out = (channels * self.places * itemsize for channels in (self.inputs, self.outputs))
        together = min(frames, max(1, WINDOW_BYTES // (4 * max(into, out))))
        window = (together + 2) * into
        triples = 3 * together * into if together > 1 else 0
        whole = frames * out if together < frames else 0
        convolving = whole + max(window + triples, (triples or window) + together * out)
        if self.kept == 4:
            # The second convolution, whose oldest frame goes as soon as it was copied; between the
            # two the hidden frames and two temporaries of their activation.
            return max(convolving + (frames - 1) * into, 3 * frames * into)
        return max(convolving, 2 * frames * out)  # before and after their rearrangement


def _decoder_layers(config: VideoVAEConfig, rows: int, columns: int) -> Iterator[_Layer]:
    places = rows * columns
    width = config.decoder_width * math.prod(block.multiplier for block in config.decoder_blocks)
    yield _Layer(2, config.latent_channels, width, places)
    for block in reversed(config.decoder_blocks):
        if block.layers:
            yield from [_Layer(4, width, width, places)] * block.layers
        else:
            made = width * math.prod(block.stride) // block.multiplier
            yield _Layer(2, width, made, places, block.stride[0])
            width //= block.multiplier
            places *= block.stride[1] * block.stride[2]
    yield _Layer(2, width, COLOURS * config.patch**2, places)


def decode_need(config: VideoVAEConfig, clip: Clip, group_bytes: int, itemsize: int = 2) -> int:
    """Predict the peak of activations, in bytes, of `decode_frames` on one clip (B = 1).

    clip: latent frames, rows and columns.  itemsize: bytes of a number, 2 for bf16.
    Weights, the latent and library work space (`causal_conv`) are not included. Within 5 % of the
    account of the real code (test_window) for clips longer than the 15 latents that the decoder
    sees; shorter ones need less, since their end is reached before all layers have begun.
    """
    frames, rows, columns = clip
    kept = waiting = work = made = 0
    at_once = True  # until some layer is too large for the whole clip, nothing is kept
    for layer in _decoder_layers(config, rows, columns):
        part = layer.frames(group_bytes, itemsize, frames)
        at_once &= part == frames
        waiting += made if part < frames else 0
        kept += 0 if at_once else layer.kept * layer.inputs * layer.places * itemsize
        fresh = made if part == frames else 0
        work = max(work, waiting + fresh + layer.work(part, itemsize))
        made = layer.outputs * layer.places * itemsize * part
        frames = part * layer.time - (layer.time - 1 if at_once else 0)
    # The caller still looks at the pixels before while these are made.
    return kept + work + (0 if at_once else made)


def choose_window(
    config: VideoVAEConfig,
    clip: Clip,
    budget_bytes: int,
    itemsize: int = 2,
    host_bytes: int | None = None,
) -> DecodeWindow:
    """Choose the largest groups of frames, and only if need be tiles, that a budget allows.

    clip: latent frames, rows and columns.  budget_bytes: for activations on the device.
    host_bytes: most that finished tiles may occupy, in RAM and on disk; None for any amount.
    Among tilings the one that computes least twice is taken.
    Raises BudgetError with the smallest need if nothing fits.
    """
    least: DecodeWindow | None = None
    for rows, columns in _tilings(config, clip):
        for group_bytes in GROUP_LADDER:
            window = _window(config, clip, (rows, columns), group_bytes, itemsize)
            # The account may be 5 % above the prediction.
            fits = window.need_bytes * 21 // 20 <= budget_bytes
            if fits and (host_bytes is None or window.host_bytes <= host_bytes):
                return window
            if least is None or window.need_bytes < least.need_bytes:
                least = window
    assert least is not None  # the whole picture is a tiling
    raise BudgetError(
        f"decode: {clip[0]} latent frames of {clip[1]}x{clip[2]} need "
        f"{least.need_bytes * 21 // 20 / 2**20:.0f} MiB of activations and "
        f"{least.host_bytes / 2**20:.0f} MiB for finished tiles at the least, got "
        f"{budget_bytes / 2**20:.0f} MiB and "
        f"{'any amount' if host_bytes is None else f'{host_bytes / 2**20:.0f} MiB'}; "
        "free memory or make the picture smaller"
    )


def classical_window(
    config: VideoVAEConfig, clip: Clip, tiling: Tiling, group_bytes: int, itemsize: int = 2
) -> DecodeWindow:
    """Describe the decode in tiles of space and time, as `tiled_decode` does it.

    Raises RequestError for tiles off the grid.
    """
    grid = config.grid
    frames = tiling.frames.on_grid(grid.time, "frames")
    rows = tiling.height.on_grid(grid.space, "height")
    columns = tiling.width.on_grid(grid.space, "width")
    tile = _largest_tile(clip, (frames, rows, columns))
    need = decode_need(config, tile, group_bytes, itemsize)
    pixels = math.prod(clip[1:]) * grid.space**2 * grid.pixel_frames(tile[0])
    # The stretch of time that is being summed, and what of the last one reaches into it.
    parked = 2 * pixels * COLOURS * torch.float32.itemsize
    return DecodeWindow(group_bytes, rows, columns, need, parked, frames)


def narrower(
    config: VideoVAEConfig, clip: Clip, window: DecodeWindow, itemsize: int = 2
) -> DecodeWindow:
    """Return a window that needs a tenth less than this one at the least.

    Classical tiles stay what they were asked to be, smaller groups pass through them.
    Raises BudgetError if nothing needs that little.
    """
    spans = (window.rows, window.columns)
    if not window.is_classical:
        now = _window(config, clip, spans, window.group_bytes, itemsize).need_bytes
        return choose_window(config, clip, now * 9 // 10, itemsize)
    tile = _largest_tile(clip, (window.frames, *spans))
    for group_bytes in GROUP_LADDER:
        need = decode_need(config, tile, group_bytes, itemsize)
        if group_bytes < window.group_bytes and need <= window.need_bytes * 9 // 10:
            return replace(window, group_bytes=group_bytes, need_bytes=need)
    raise BudgetError("decode: tiles of this size do not fit; make them smaller")


def _largest_tile(clip: Clip, spans: tuple[Span, Span, Span]) -> Clip:
    """Return latent frames, rows and columns of a classical tile."""
    frames, rows, columns = (span.size or length for span, length in zip(spans, clip, strict=True))
    # One more: all tiles but the first begin with a frame that is thrown away.
    return min(frames + 1, clip[0]), min(rows, clip[1]), min(columns, clip[2])


def _window(
    config: VideoVAEConfig, clip: Clip, tiles: tuple[Span, Span], group_bytes: int, itemsize: int
) -> DecodeWindow:
    frames, rows, columns = clip
    tile_rows, tile_columns = tiles[0].size or rows, tiles[1].size or columns
    need = decode_need(config, (frames, tile_rows, tile_columns), group_bytes, itemsize)
    pixels = _covered(rows, tiles[0]) * _covered(columns, tiles[1]) - tile_rows * tile_columns
    grid = config.grid
    parked = pixels * grid.space**2 * grid.pixel_frames(frames) * COLOURS * PARKED_BYTES
    return DecodeWindow(group_bytes, *tiles, need, parked)


def _tilings(config: VideoVAEConfig, clip: Clip) -> list[tuple[Span, Span]]:
    """List the ways to cut the picture, the least work first."""
    overlap = math.ceil(OVERLAP_PIXELS / config.grid.space)
    _, rows, columns = clip

    def work(spans: tuple[Span, Span]) -> int:
        return _covered(rows, spans[0]) * _covered(columns, spans[1])

    return sorted(product(_spans(rows, overlap), _spans(columns, overlap)), key=work)


def _spans(length: int, overlap: int) -> Iterator[Span]:
    """Yield ever smaller spans whose ramps do not meet, the whole axis first."""
    yield Span()
    for count in range(2, length):
        size = math.ceil((length + (count - 1) * overlap) / count)
        if size <= 2 * overlap:
            return
        yield Span(size, overlap)


def _covered(length: int, span: Span) -> int:
    """Return the rows or columns that all tiles along an axis have together."""
    if span.size == 0:
        return length
    count = math.ceil((length - span.overlap) / (span.size - span.overlap))
    return length + (count - 1) * span.overlap
