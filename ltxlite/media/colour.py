"""Pixel values: from [-1, 1] to the code values that files hold."""

import torch
from torch import Tensor

# ITU-R BT.709: weights of red and blue in luma.
_RED, _BLUE = 0.2126, 0.0722
_GREEN = 1.0 - _RED - _BLUE
_LUMA = (_RED, _GREEN, _BLUE)
_CHROMA_BLUE = (-_RED / (2 - 2 * _BLUE), -_GREEN / (2 - 2 * _BLUE), 0.5)
_CHROMA_RED = (0.5, -_GREEN / (2 - 2 * _RED), -_BLUE / (2 - 2 * _RED))


def to_unit_range(pixels: Tensor) -> Tensor:
    """Map pixels from [-1, 1] to [0, 1] in fp32, clamped.  Any shape."""
    return pixels.float().add(1.0).div_(2.0).clamp_(0.0, 1.0)


def to_uint8_rgb(pixels: Tensor) -> Tensor:
    """Convert decoded pixels to 8-bit RGB exactly as the reference pipeline does: truncated.

    pixels: (F, 3, H, W) in [-1, 1].  Returns (F, H, W, 3) uint8.
    Truncation darkens by half a level on average; files get `nearest_uint8_rgb` instead.
    Source: reproduces uint8_frames of the case pipeline_two_stage_t2v without a difference.
    """
    return to_unit_range(pixels).mul_(255.0).to(torch.uint8).movedim(1, -1).contiguous()


def nearest_uint8_rgb(pixels: Tensor) -> Tensor:
    """Convert decoded pixels to the nearest 8-bit RGB values.

    pixels: (F, 3, H, W) in [-1, 1].  Returns (F, H, W, 3) uint8.
    """
    return to_unit_range(pixels).mul_(255.0).round_().to(torch.uint8).movedim(1, -1).contiguous()


def rgb_to_i420(frames: Tensor) -> Tensor:
    """Convert RGB to 8-bit planes in 4:2:0, BT.709, limited range, to the nearest code value.

    frames: (F, 3, H, W) fp32 in [0, 1], H and W even.
    Returns (F, 3H/2, W) uint8: luma (H, W), then blue and red chroma (H/2, W/2) each, packed row
    after row. Chroma is the average of 2x2 pixels, hence sited at their centre.
    Source: LTX-2 400fd31 has the same matrix, but computes in bf16 and truncates.
    """
    luma = _weighted(frames, _LUMA).mul_(219.0).add_(16.0)
    quarters = torch.nn.functional.avg_pool2d(frames, 2)
    chroma = (
        _weighted(quarters, row).mul_(224.0).add_(128.0) for row in (_CHROMA_BLUE, _CHROMA_RED)
    )
    planes = torch.cat([plane.flatten(1) for plane in (luma, *chroma)], dim=1)
    count, _, height, width = frames.shape
    return planes.round_().to(torch.uint8).view(count, height * 3 // 2, width)


def _weighted(frames: Tensor, row: tuple[float, float, float]) -> Tensor:
    red, green, blue = frames.unbind(1)
    return red.mul(row[0]).add_(green, alpha=row[1]).add_(blue, alpha=row[2])
