"""The twins, in plain torch, of what works on rows and leaves values, not codes.

Each has the signature of its kernel's wrapper, and computes in fp32 with one rounding at the end.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # the records of kernels whose wrappers import this module
    from ltxlite_kernels.norm_rope import RopeTables


def normed(x: Tensor, eps: float) -> Tensor:
    """Divide rows (..., C) by their root mean square; returns fp32."""
    wide = x.float()
    return wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def norm_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, index: Tensor | None, eps: float
) -> Tensor:
    """Norm and modulate rows; see `norm_modulate.norm_modulate`."""
    wide = normed(x, eps)
    if shift is not None and scale is not None:
        if index is not None:
            shift, scale = shift[index.long()], scale[index.long()]
        wide = wide * (1 + scale.float()) + shift.float()
    return wide.to(x.dtype)


def gate_heads(mixed: Tensor, logits: Tensor) -> Tensor:
    """Gate the heads of rows in place; see `gate_heads.gate_heads`."""
    return mixed.copy_(gated(mixed, logits))


def gated(mixed: Tensor, logits: Tensor) -> Tensor:
    """Return rows (R, H D) times 2 sigmoid(logits (R, H)) per head, in fp32."""
    gates = 2 * torch.sigmoid(logits.float())
    heads: Tensor = mixed.float().unflatten(1, (logits.shape[1], -1))
    return (heads * gates[..., None]).flatten(1)


def norm_rope(
    x: Tensor, weight: Tensor, rope: "RopeTables | None", eps: float, out: Tensor | None = None
) -> Tensor:
    """Norm rows and turn them; see `norm_rope.norm_rope`."""
    wide = normed(x, eps) * weight.float()
    if rope is not None:
        wide = _turned(wide, rope)
    return wide.to(x.dtype) if out is None else out.copy_(wide)


def _turned(x: Tensor, rope: "RopeTables") -> Tensor:
    index = rope.index.long()
    cos, sin = (table[index].sum(dim=2) for table in (rope.cosines, rope.sines))
    first, second = x.unflatten(-1, (cos.shape[2], 2, -1)).unbind(-2)  # (B, t, H, D/2)
    pair = [first * cos - second * sin, second * cos + first * sin]
    return torch.stack(pair, dim=-2).flatten(-3)


def norm_silu(x: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Norm the channels at each place and apply SiLU; see `norm_silu.norm_silu`."""
    found = _activated(x, eps)
    return found.to(x.dtype) if out is None else out.copy_(found)


def spread(x: Tensor, windows: Tensor, first: int, eps: float | None = None) -> None:
    """Write frames into the windows of neighbours that have them; see `norm_silu.spread`."""
    seen = x if eps is None else _activated(x, eps)
    for slot in range(windows.shape[2]):
        begin = first - slot  # the window that has the first of these frames in this slot
        low, high = max(begin, 0), min(begin + x.shape[1], windows.shape[1])
        if low < high:
            windows[:, low:high, slot] = seen[:, low - begin : high - begin]


def _activated(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return F.silu(wide * (wide.square().mean(dim=2, keepdim=True) + eps).rsqrt())
