"""The reference of masked-reference LoRAs: a clip with a place painted, beside it what goes there.

Source: the community's masked reference inpainting (features.md F8). No layout of the panel is
documented beyond its colour and side; a LoRA's card has the last word on its width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxlite.media.fit import Fit

MAGENTA, GREEN = (255, 0, 255), (0, 255, 0)


def panel_of(thing: Tensor, height: int, width: int) -> Tensor:
    """Return a green panel (height, width, 3) uint8 with a picture (H, W, 3) in its middle.

    The picture is as large as fits, in its own proportions.
    """
    scale = min(height / thing.shape[0], width / thing.shape[1])
    rows, columns = (
        max(1, min(round(side * scale), most))
        for side, most in zip(thing.shape[:2], (height, width), strict=True)
    )
    fit = Fit(thing.shape[0], thing.shape[1], rows, columns, rows, columns)
    picture = ((fit.forth(thing) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1)
    panel = _flat(GREEN, height, width).clone()
    top, left = (height - rows) // 2, (width - columns) // 2
    panel[top : top + rows, left : left + columns] = picture
    return panel


def masked_reference(frame: Tensor, mask: Tensor, panel: Tensor, at_left: bool = False) -> Tensor:
    """Return a frame (H, W, 3) uint8 painted magenta where a mask (H, W) is 1, with its panel."""
    painted = torch.where(mask.bool()[..., None], _flat(MAGENTA, *frame.shape[:2]), frame)
    return torch.cat([panel, painted] if at_left else [painted, panel], dim=1)


def even(frame: Tensor) -> Tensor:
    """Return a frame (H, W, 3) with even sides, its last row and column repeated."""
    height, width = frame.shape[:2]
    planes = frame.movedim(-1, 0)[None].float()
    padded = F.pad(planes, (0, width % 2, 0, height % 2), mode="replicate")
    return padded[0].movedim(0, -1).to(torch.uint8)


def _flat(colour: tuple[int, int, int], height: int, width: int) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).expand(height, width, 3)
