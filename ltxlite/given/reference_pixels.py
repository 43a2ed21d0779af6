"""What an IC-LoRA is shown, frame by frame: a clip, its edges, tracks, a painted source."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxlite.given.filling import painted, painted_masks
from ltxlite.given.source import on_canvas, placed
from ltxlite.given.source_fit import Size
from ltxlite.given.takes import ReferenceTake
from ltxlite.media.edges import canny
from ltxlite.media.image import fit_cover
from ltxlite.media.tracks import draw_tracks, read_tracks
from ltxlite.request import Request


def reference_pixels(request: Request, item: ReferenceTake, size: Size) -> Iterator[Tensor]:
    """Yield a reference's frames (3, *size) in [-1, 1] by its kind."""
    kind = item.reference.kind
    if kind == "tracks":
        return _tracks(request, item, size)
    if kind == "source":
        return _source(request, item, size)
    if kind == "filled":
        return _filled(request, item, size)
    if kind == "canny":
        return _edges(item, size)
    return (fit_cover(frame, *size) for frame in item.take.frames())


def _edges(item: ReferenceTake, size: Size) -> Iterator[Tensor]:
    """Draw edges at the clip's size and then shrink them, as in training: features.md F2."""
    for frame in item.take.frames():
        full = fit_cover(frame, size[0] * item.downscale, size[1] * item.downscale)
        lines = canny(((full + 1) * 127.5).round().to(torch.uint8).movedim(0, -1))
        yield F.avg_pool2d(lines.movedim(-1, 0) / 127.5 - 1, item.downscale)


def _tracks(request: Request, item: ReferenceTake, size: Size) -> Iterator[Tensor]:
    tracks = read_tracks(Path(item.reference.path))
    clip = request.height, request.width
    for frame in draw_tracks(tracks, item.take.chosen, request.frames, clip):
        yield fit_cover(frame, *size)


def _source(request: Request, item: ReferenceTake, size: Size) -> Iterator[Tensor]:
    source = request.conditions.source
    assert source is not None
    for frame in item.take.frames():
        yield placed(request, source, on_canvas(frame, source), size)


def _filled(request: Request, item: ReferenceTake, size: Size) -> Iterator[Tensor]:
    source = request.conditions.source
    assert source is not None
    footage, wanted = item.take.footage, set(item.take.chosen)
    left, above, right, below = source.pad
    canvas = footage.height + above + below, footage.width + left + right
    fraction = Fraction(size[0] * item.downscale, request.height)
    masks = painted_masks(request, source, canvas, size, fraction)
    chosen = (mask for number, mask in enumerate(masks) if number in wanted)
    for frame, mask in zip(_source(request, item, size), chosen, strict=True):
        yield painted(frame, mask)
