"""Decodes and encodes video in overlapping tiles, blended with ramps.

Tiles are cut on the latent grid. The networks see about 108 frames and 484 pixels around, so tiles
are an approximation; `rolling` is exact in time and does not compute anything twice. What tiles
offer is a bound on memory in space, and the very picture that the official pipelines produce.
Inside a tile frames roll as well, and they are blended on the CPU: the device holds one tile's
window, 0.5 GB for the official tiles of 1920x1088 where the official code needs 3.2.

A tile that starts inside the clip starts one latent frame early: the first latent frame of whatever
is decoded becomes a single picture, so this one is sacrificed and blended with weight zero.
Source: LTX-2 400fd31 ltx_core/model/video_vae/tiling.py and video_vae.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Self

import torch
from torch import Tensor

from ltxlite.errors import RequestError
from ltxlite.geometry import LatentGrid
from ltxlite.models.rolling import GROUP_BYTES, decode_frames, encode_frames
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder

ENCODE_OVERLAP_PIXELS, ENCODE_OVERLAP_FRAMES = 64, 16


@dataclass(frozen=True, slots=True)
class Span:
    """Tile size and overlap along one axis, in frames or pixels; size 0 leaves the axis whole."""

    size: int = 0
    overlap: int = 0

    def on_grid(self, unit: int, axis: str) -> "Span":
        """Return the span in latents of `unit` frames or pixels, or raise RequestError."""
        if self == Span():
            return self
        if self.size < 2 * unit or self.size % unit:
            raise RequestError(
                f"tile {axis} is {self.size}, wanted 0 or a multiple of {unit} from {2 * unit} on"
            )
        if not 0 <= self.overlap < self.size or self.overlap % unit:
            raise RequestError(
                f"tile overlap in {axis} is {self.overlap}, wanted a multiple of {unit} "
                f"below the tile size {self.size}"
            )
        return Span(self.size // unit, self.overlap // unit)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a clip is cut: frames in pixel frames, height and width in pixels."""

    frames: Span = Span()
    height: Span = Span()
    width: Span = Span()

    @classmethod
    def auto(
        cls,
        height: int,
        width: int,
        long_side: Span = Span(768, 64),
        frames: Span = Span(80, 24),
    ) -> Self:
        """Choose what the official pipelines choose for a picture of this size.

        The long side is cut as told, the short side into tiles of the picture's aspect.
        Source: LTX-2 400fd31 TileSizeConfig.from_long_side.
        """
        unit = LatentGrid().space
        tile = long_side.on_grid(unit, "long side")
        short = round(tile.size * min(height, width) / max(height, width))
        short_side = Span(max(2, tile.overlap + 1, short) * unit, long_side.overlap)
        sides = (long_side, short_side) if height > width else (short_side, long_side)
        return cls(frames, *sides)


@dataclass(frozen=True, slots=True)
class Tile:
    """A stretch [start, stop) of latents along one axis.

    rise, fall: latents shared with the tile before and after.
    sacrificed: whether the first latent is there only to be thrown away.
    """

    start: int
    stop: int
    rise: int
    fall: int
    sacrificed: bool = False


def space_tiles(length: int, span: Span) -> list[Tile]:
    """Cut `length` latent rows or columns into tiles; the last one may be short.

    span: in latents, its size above its overlap; one tile if the size is 0 or holds everything.
    """
    size, overlap = span.size, span.overlap
    if size == 0 or length <= size:
        return [Tile(0, length, 0, 0)]
    step = size - overlap
    count = math.ceil((length - overlap) / step)
    return [
        Tile(
            start=i * step,
            stop=min(i * step + size, length),
            rise=overlap if i else 0,
            fall=overlap if i < count - 1 else 0,
        )
        for i in range(count)
    ]


def time_tiles(length: int, span: Span) -> list[Tile]:
    """Cut `length` latent frames; every tile but the first starts one latent frame early."""
    first, *others = space_tiles(length, span)
    return [
        first,
        *(Tile(tile.start - 1, tile.stop, tile.rise, tile.fall, True) for tile in others),
    ]


def ramp(length: int) -> Tensor:
    """Return (length,) fp32 weights that climb in equal steps between 0 and 1, both left out."""
    return torch.arange(1, length + 1, dtype=torch.float32) / (length + 1)


def blend_weights(tile: Tile, length: int, unit: int) -> Tensor:
    """Return the trapezoid (length,) fp32 of a tile; its ramps multiply where they meet.

    length: of the tile's result.  unit: results per shared latent (1 when encoding).
    """
    weights = torch.ones(length)
    rise = torch.cat([torch.zeros(int(tile.sacrificed)), ramp(unit * tile.rise)])
    fall = ramp(unit * tile.fall).flip(0)
    weights[: len(rise)] *= rise
    weights[length - len(fall) :] *= fall
    return weights


@dataclass(frozen=True, slots=True)
class Placed:
    """A tile along one axis: what it is made from, where its result goes, with which weights."""

    source: slice
    target: slice
    weights: Tensor

    def alone(self) -> "Placed":
        """Return the same tile for a result that begins where the tile does."""
        return Placed(self.source, slice(0, len(self.weights)), self.weights)


def place(tiles: list[Tile], source: int, target: int, in_time: bool) -> list[Placed]:
    """Lay tiles along one axis, with weights that sum to one everywhere.

    source, target: indices per latent in what is read and what is made; in time the first latent
    of a tile stands for a single one.
    The trapezoids of the usual layouts sum to one already. With overlaps above half a tile they do
    not (1.11 for 24 frames overlapping by 16), and since the sum over all tiles of a clip is the
    product of the sums along its axes, it is divided away here.
    """
    targets = [_extent(tile, target, in_time) for tile in tiles]
    trapezoids = [
        blend_weights(tile, where.stop - where.start, target)
        for tile, where in zip(tiles, targets, strict=True)
    ]
    total = torch.zeros(targets[-1].stop)
    for where, weights in zip(targets, trapezoids, strict=True):
        total[where] += weights
    return [
        Placed(_extent(tile, source, in_time), where, weights / total[where])
        for tile, where, weights in zip(tiles, targets, trapezoids, strict=True)
    ]


def _extent(tile: Tile, unit: int, in_time: bool) -> slice:
    start, latents = unit * tile.start, tile.stop - tile.start
    return slice(start, start + (unit * (latents - 1) + 1 if in_time else unit * latents))


Axes = tuple[list[Placed], list[Placed], list[Placed]]  # time, rows, columns


def tiled_decode(
    decoder: VideoDecoder,
    latent: Tensor,
    tiling: Tiling | None = None,
    group_bytes: int = GROUP_BYTES,
) -> Iterator[Tensor]:
    """Decode tile by tile, yielding the frames that no later tile touches.

    latent: normalised, (B, C, F', Y, X).  tiling: `Tiling.auto` of the picture if None.
    group_bytes: of the frames that pass through a tile together; see `decode_frames`.
    Yields (B, 3, f, 32 Y, 32 X) fp32 on the CPU, unclamped, in order, at most one item per stretch
    of time; the CPU holds up to two stretches.
    Raises RequestError for a tiling off the grid, ShapeError for another layout.
    """
    grid = decoder.config.grid
    decoder.check(latent)
    frames, rows, columns = latent.shape[2:]
    spans = _on_grid(tiling or Tiling.auto(rows * grid.space, columns * grid.space), grid)
    return _stretches(
        partial(_tile_pixels, decoder, group_bytes=group_bytes),
        latent,
        (
            place(time_tiles(frames, spans[0]), 1, grid.time, in_time=True),
            place(space_tiles(rows, spans[1]), 1, grid.space, in_time=False),
            place(space_tiles(columns, spans[2]), 1, grid.space, in_time=False),
        ),
    )


def _tile_pixels(decoder: VideoDecoder, tile: Tensor, group_bytes: int) -> Tensor:
    parts = [part.float().cpu() for part in decode_frames(decoder, tile, group_bytes)]
    return torch.cat(parts, dim=2)


@torch.no_grad()
def _stretches(decode: Callable[[Tensor], Tensor], latent: Tensor, axes: Axes) -> Iterator[Tensor]:
    times, rows, columns = axes
    carried: Tensor | None = None
    for this, following in zip(times, [*times[1:], None], strict=True):
        out = _blend(decode, latent, ([this.alone()], rows, columns))
        if carried is not None:
            out[:, :, : carried.shape[2]] += carried
        done = following.target.start - this.target.start if following else out.shape[2]
        carried = out[:, :, done:].clone()
        if done:
            yield out[:, :, :done]
        del out  # before the next stretch is made


@torch.no_grad()
def tiled_encode(encoder: VideoEncoder, pixels: Tensor, tiling: Tiling) -> Tensor:
    """Encode tile by tile; the clip may be on another device than the encoder.

    pixels: (B, 3, F, H, W) in [-1, 1]; frames after the last 8 n + 1 are left out.
    Returns the normalised latent (B, C, F', H/32, W/32) fp32 on the encoder's device.
    Raises RequestError for a tiling off the grid or one that overlaps by less than 64 pixels or 16
    frames, ShapeError for another layout.
    """
    grid = encoder.config.grid
    spans = _on_grid(tiling, grid)
    _check_encode_overlaps(tiling)
    encoder.check(pixels)
    frames, rows, columns = pixels.shape[2:]
    device = encoder.latent_mean.device

    def encode(tile: Tensor) -> Tensor:
        return encode_frames(encoder, (part.to(device) for part in tile.split(grid.time, 2)))

    axes = (
        place(time_tiles(grid.latent_frames(frames), spans[0]), grid.time, 1, in_time=True),
        place(space_tiles(rows // grid.space, spans[1]), grid.space, 1, in_time=False),
        place(space_tiles(columns // grid.space, spans[2]), grid.space, 1, in_time=False),
    )
    return _blend(encode, pixels, axes)


def _blend(network: Callable[[Tensor], Tensor], x: Tensor, axes: Axes) -> Tensor:
    """Sum the weighted results of all tiles, in fp32."""
    lengths = [max(item.target.stop for item in axis) for axis in axes]
    out: Tensor | None = None
    for time, row, column in product(*axes):
        part = network(x[:, :, time.source, row.source, column.source]).float()
        part *= time.weights.to(part.device)[:, None, None]
        if out is None:
            out = part.new_zeros(*part.shape[:2], *lengths)
        add_tile(out[:, :, time.target], part, row, column)
    assert out is not None  # an axis has at least one tile
    return out


def add_tile(picture: Tensor, part: Tensor, row: Placed, column: Placed) -> None:
    """Add the frames of a tile to those of the picture where they belong, with their weights.

    picture: (B, C, F, H, W) fp32.  part: (B, C, F, h, w) fp32 on the same device, overwritten.
    """
    part *= row.weights.to(part.device)[:, None]
    part *= column.weights.to(part.device)
    picture[..., row.target, column.target] += part


def _on_grid(tiling: Tiling, grid: LatentGrid) -> tuple[Span, Span, Span]:
    return (
        tiling.frames.on_grid(grid.time, "frames"),
        tiling.height.on_grid(grid.space, "height"),
        tiling.width.on_grid(grid.space, "width"),
    )


def _check_encode_overlaps(tiling: Tiling) -> None:
    """Refuse overlaps at which the seams of encoded tiles show."""
    axes = (
        ("frames", tiling.frames, ENCODE_OVERLAP_FRAMES),
        ("height", tiling.height, ENCODE_OVERLAP_PIXELS),
        ("width", tiling.width, ENCODE_OVERLAP_PIXELS),
    )
    for axis, span, least in axes:
        if span.size and span.overlap < least:
            raise RequestError(
                f"tile overlap in {axis} is {span.overlap}, wanted at least {least} to encode"
            )
