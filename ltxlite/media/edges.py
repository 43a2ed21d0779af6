"""Edges of a picture, as control for an IC-LoRA: Canny's method, in a few tensor operations."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Thresholds of the gradient's sum of magnitudes, in 8-bit levels (features.md F2).
LOW, HIGH = 92.0, 200.0
_LUMA = (0.299, 0.587, 0.114)  # BT.601, as 8-bit pictures are made grey everywhere
# tan 22.5°: a gradient flatter than this is horizontal, steeper than its inverse vertical.
_FLAT = 2**0.5 - 1


def canny(frame: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Draw the edges of a picture (H, W, 3) uint8 in white on black, of the same layout.

    An edge is where the gradient is largest across itself and above `low`, and joined to a place
    where it is above `high`.
    Source: J. Canny 1986; Sobel gradients and the sum of magnitudes as OpenCV has them.
    """
    grey = (frame.float() @ frame.new_tensor(_LUMA, dtype=torch.float32)).round()
    gx, gy = _sobel(grey)
    strength = gx.abs() + gy.abs()
    thin = _is_largest(strength, gx, gy) & (strength > low)
    edges = _joined(thin, thin & (strength > high))
    return edges[..., None].expand(*edges.shape, 3).to(torch.uint8) * 255


def _sobel(grey: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(grey[None, None], (1, 1, 1, 1), mode="replicate")
    across = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([across, across.T])[:, None]
    gx, gy = F.conv2d(padded, kernels)[0]
    return gx, gy


def _is_largest(strength: Tensor, gx: Tensor, gy: Tensor) -> Tensor:
    """Tell where no neighbour along the gradient is stronger; of two equal ones the first."""
    around = F.pad(strength, (1, 1, 1, 1))
    rows, columns = strength.shape

    def at(down: int, right: int) -> Tensor:
        return around[1 + down : 1 + down + rows, 1 + right : 1 + right + columns]

    flat, steep = gy.abs() < gx.abs() * _FLAT, gx.abs() < gy.abs() * _FLAT
    falling = (gx * gy >= 0) & ~flat & ~steep
    rising = ~(flat | steep | falling)
    directions = ((flat, 0, 1), (steep, 1, 0), (falling, 1, 1), (rising, 1, -1))
    largest = torch.zeros_like(flat)
    for chosen, down, right in directions:
        largest |= chosen & (strength > at(-down, -right)) & (strength >= at(down, right))
    return largest


def _joined(thin: Tensor, strong: Tensor) -> Tensor:
    """Grow strong places along thin ones until nothing is added."""
    grown, count = strong, -1
    while (total := int(grown.sum())) != count:
        count = total
        spread = F.max_pool2d(grown[None].float(), 3, stride=1, padding=1)[0] > 0
        grown = spread & thin
    return grown
