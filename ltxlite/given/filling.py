"""In- and outpainting: what the LoRA is shown of a clip, and how what it makes is put back.

Source: Lightricks' in- and outpainting graphs (features.md F9).
"""

from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxlite.conditions import Source
from ltxlite.given.source_fit import Size, source_fit
from ltxlite.given.source_mask import canvas_border, mask_frames, on_grid
from ltxlite.media.pyramid import grown, pyramid_blend
from ltxlite.request import Request

COLOUR = (102, 255, 0)
_GROWN = 30  # pixels by which a painted mask is larger, at the clip's full size
_BETWEEN, _LAST, _BORDER = 5, 6, 2  # how far blends reach, in 64ths of the long side


def painted(frame: Tensor, mask: Tensor) -> Tensor:
    """Return a frame (3, H, W) in [-1, 1] with the places painted where a mask (H, W) is 1."""
    colour = frame.new_tensor(COLOUR)[:, None, None] / 127.5 - 1
    return torch.where(mask.bool(), colour, frame)


def painted_masks(
    request: Request, source: Source, frame: Size, size: Size, fraction: Fraction
) -> Iterator[Tensor]:
    """Yield by frame what of a stage's frames is painted: (H, W), 1 for painted.

    A mask is grown, the border of a larger canvas is not.  frame: size of the source's frames.
    size: of the stage's.  fraction: of the clip's full size.
    """
    radius, fit = round(_GROWN * fraction), source_fit(request, source, frame, size)
    border = canvas_border(source, frame)
    beyond = on_grid(border, fit)
    for mask in mask_frames(request, source, frame):
        inner = on_grid(mask * (1 - border), fit)
        if radius:
            inner = F.max_pool2d(inner, 2 * radius + 1, stride=1, padding=radius)
        yield torch.maximum(inner, beyond)[0, 0]


def filled(made: Tensor, kept: Tensor, mask: Tensor, source: Source, is_last: bool) -> Tensor:
    """Blend what was made into kept pixels, both (F, 3, H, W); mask (F, 1, H, W), 1 for made."""
    reach = _LAST if is_last else _BETWEEN
    return pyramid_blend(made, kept, grown(mask, reach if source.mask else _BORDER))
