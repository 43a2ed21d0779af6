"""A mask video or still: where a clip is made anew, as latent places and as pixels."""

import itertools
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxlite.conditions import Source
from ltxlite.errors import RequestError
from ltxlite.geometry import LatentGrid
from ltxlite.given.footage import open_footage
from ltxlite.given.source_fit import Size, source_fit
from ltxlite.media.fit import Fit
from ltxlite.request import Request

_WHITE = 128  # from this code value on, of red, green and blue on average


def region_of(request: Request, source: Source, grid: LatentGrid, size: Size) -> Tensor:
    """Return the latent places (F, Y, X) that a mask touches: 1 made anew, 0 kept; fp32.

    A place is made anew if any of its pixels, in any of its frames, is white.
    size: (height, width) of the stage's frames.
    Source: AVTools' adaptive maximum (features.md I4).
    """
    pooled = [
        F.max_pool2d(_placed(request, source, mask, size), grid.space)[0]
        for mask in mask_frames(request, source)
    ]
    count = grid.latent_frames(request.frames)
    edges = [grid.first_frame(number) for number in range(count + 1)]
    spans = pairwise(edges)
    return torch.stack([torch.cat(pooled[begin:end]).amax(0) for begin, end in spans])


def mask_frames(request: Request, source: Source, frame: Size | None = None) -> Iterator[Tensor]:
    """Yield one mask (H, W) of 0 and 1, fp32, for each frame of the clip, at the source's size.

    A still serves all frames; a shorter video's last frame serves the rest; times count from the
    source's beginning. What the source's canvas has beyond its picture is 1; frame: its size,
    needed where there is no mask.
    """
    if source.mask is None:
        assert frame is not None
        yield from itertools.repeat(canvas_border(source, frame), request.frames)
        return
    footage = open_footage(source.mask, request.rate)
    last = 0 if footage.numbers is None else len(footage.numbers) - 1
    wanted = range(source.offset, source.offset + request.frames)
    chosen = [min(max(number, 0), last) for number in wanted]
    for picture in footage.frames(chosen):
        yield _on_canvas(binary(picture), source)


def canvas_border(source: Source, frame: Size) -> Tensor:
    """Return (H, W), 1 on what a source's canvas of that size has beyond its picture."""
    left, above, right, below = source.pad
    return _on_canvas(torch.zeros(frame[0] - above - below, frame[1] - left - right), source)


def _on_canvas(mask: Tensor, source: Source) -> Tensor:
    left, above, right, below = source.pad
    return F.pad(mask, (left, right, above, below), value=1)


def check_mask(request: Request, source: Source, frame: Tensor) -> None:
    """Raise RequestError for a mask whose size is not that of the source's frames (H, W, 3)."""
    mask = next(mask_frames(request, source))
    if mask.shape != frame.shape[:2]:
        raise RequestError(
            f"mask {source.mask}: is {mask.shape[1]}x{mask.shape[0]}, the clip "
            f"{frame.shape[1]}x{frame.shape[0]}; wanted the same size"
        )


def binary(frame: Tensor) -> Tensor:
    """Return a mask (H, W) of 0 and 1, fp32, from its picture (H, W, 3) uint8."""
    return (frame.float().mean(-1) >= _WHITE).float()


def on_grid(mask: Tensor, fit: Fit) -> Tensor:
    """Bring a mask (H, W) to (1, 1, grid height, grid width) as its frame is brought there.

    What is touched stays touched; nothing is where the frame does not reach.
    """
    scaled = F.adaptive_max_pool2d(mask[None, None], (fit.rows, fit.columns))
    return F.pad(scaled, (0, fit.grid_width - fit.columns, 0, fit.grid_height - fit.rows))


def _placed(request: Request, source: Source, mask: Tensor, size: Size) -> Tensor:
    """Bring a mask (H, W) to (1, 1, *size): all of it where it must come back, else its middle."""
    height, width = mask.shape
    if source.whole:
        return on_grid(mask, source_fit(request, source, (height, width), size))
    scale = max(size[0] / height, size[1] / width)
    rows, columns = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    scaled = F.interpolate(mask[None, None], (rows, columns), mode="nearest")
    top, left = (rows - size[0]) // 2, (columns - size[1]) // 2
    return scaled[..., top : top + size[0], left : left + size[1]]
