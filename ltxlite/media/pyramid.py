"""Blends one picture into another without a seam, coarse structures over wide borders.

Source: Burt and Adelson, A Multiresolution Spline (1983), with the filters of kornia's pyramids and
the mask growth of ComfyUI-LTXVideo 2166847 (pyramid_blending); features.md F9.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 7
_COARSE = 64  # long side at which masks grow
_TAPS = (1.0, 4.0, 6.0, 4.0, 1.0)


def pyramid_blend(inside: Tensor, outside: Tensor, mask: Tensor, levels: int = LEVELS) -> Tensor:
    """Return `inside` where a mask is 1 and `outside` where it is 0, with soft borders.

    inside, outside: (F, 3, H, W) in [-1, 1].  mask: (F or 1, 1, H, W) in [0, 1].
    """
    height, width = inside.shape[-2:]
    inside, outside, mask = (_to_powers_of_two(item.float()) for item in (inside, outside, mask))
    count = max(1, min(levels, min(inside.shape[-2:]).bit_length() - 1))
    shares = _gaussian(mask, count)
    pairs = zip(_laplacian(inside, count), _laplacian(outside, count), shares, strict=True)
    *details, blended = (torch.lerp(out, own, share) for own, out, share in pairs)
    for detail in reversed(details):
        blended = _enlarged(blended) + detail
    return blended[..., :height, :width].clamp(-1, 1)


def grown(mask: Tensor, radius: int) -> Tensor:
    """Grow a mask (F, 1, H, W) by places of a picture whose long side has 64 of them."""
    if radius <= 0:
        return mask
    height, width = mask.shape[-2:]
    scale = _COARSE / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    coarse = F.interpolate(mask.float(), size=size, mode="bilinear", align_corners=False)
    spread = F.max_pool2d(coarse, 2 * radius + 1, stride=1, padding=radius)
    return F.interpolate(spread, size=(height, width), mode="bilinear", align_corners=False)


def _laplacian(pixels: Tensor, count: int) -> list[Tensor]:
    """Return what each level adds to the one below it, and the coarsest level itself."""
    levels = _gaussian(pixels, count)
    return [fine - _enlarged(coarse) for fine, coarse in pairwise(levels)] + levels[-1:]


def _gaussian(pixels: Tensor, count: int) -> list[Tensor]:
    levels = [pixels]
    for _ in range(count - 1):
        levels.append(F.avg_pool2d(_smoothed(levels[-1]), 2))
    return levels


def _enlarged(pixels: Tensor) -> Tensor:
    doubled = F.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)
    return _smoothed(doubled)


def _smoothed(pixels: Tensor) -> Tensor:
    channels = pixels.shape[1]
    taps = pixels.new_tensor(_TAPS) / sum(_TAPS)
    down = taps[:, None].expand(channels, 1, 5, 1)
    across = taps[None, :].expand(channels, 1, 1, 5)
    padded = F.pad(pixels, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(padded, down, groups=channels), across, groups=channels)


def _to_powers_of_two(pixels: Tensor) -> Tensor:
    below, right = ((1 << (side - 1).bit_length()) - side for side in pixels.shape[-2:])
    return F.pad(pixels, (0, right, 0, below), mode="reflect") if below or right else pixels
