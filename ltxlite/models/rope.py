"""Rotary position embedding of LTX: fractional positions, one frequency grid for all axes.

A token's angle vector lists, for each frequency in turn, one angle per axis; what does not divide
is padded with identity at the front; then it is cut into heads. Angles reach 15 708 rad, so grid,
angles, cosines and sines are never computed below fp32.
Source: LTX-2 400fd31, ltx_core/model/transformer/rope.py.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Layout = Literal["split", "interleaved"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """What fixes a table besides the positions."""

    width: int
    heads: int
    max_positions: tuple[int, ...]
    theta: float = 10000.0
    layout: Layout = "split"
    float64: bool = True


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosines and sines of a sequence: split (B, T, H, D/2), interleaved (B, T, W); fp32."""

    cos: Tensor
    sin: Tensor
    layout: Layout

    def rotate(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rotate queries or keys (B, t, W), the tokens `rows` of the sequence, in fp32."""
        turn = _rotate_split if self.layout == "split" else _rotate_interleaved
        return turn(x, self.cos[:, rows], self.sin[:, rows])


def rope_table(positions: Tensor, spec: RopeSpec) -> Rope:
    """Build the table for positions (B, A, T), given in the units of `spec.max_positions`."""
    axes = positions.shape[1]
    limits = torch.tensor(spec.max_positions, dtype=torch.float32, device=positions.device)
    fractions = positions.float().transpose(1, 2) / limits
    grid = _frequencies(spec.width // (2 * axes), spec).to(positions.device)
    angles = (grid * (fractions[..., None] * 2 - 1)).transpose(-1, -2).flatten(2)
    if spec.layout == "interleaved":
        pad = spec.width - 2 * angles.shape[-1]
        cos = angles.cos().repeat_interleave(2, dim=-1)
        sin = angles.sin().repeat_interleave(2, dim=-1)
        return Rope(_pad_front(cos, pad, 1.0), _pad_front(sin, pad, 0.0), spec.layout)
    pad = spec.width // 2 - angles.shape[-1]
    heads = (spec.heads, -1)
    cos = _pad_front(angles.cos(), pad, 1.0).unflatten(-1, heads)
    sin = _pad_front(angles.sin(), pad, 0.0).unflatten(-1, heads)
    return Rope(cos, sin, spec.layout)


def _frequencies(count: int, spec: RopeSpec) -> Tensor:
    if spec.float64:
        powers = np.power(spec.theta, np.linspace(0.0, 1.0, count)) * np.pi / 2
        return torch.tensor(powers, dtype=torch.float32)
    return spec.theta ** torch.linspace(0.0, 1.0, count, dtype=torch.float32) * np.pi / 2


def _pad_front(x: Tensor, count: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (count, 0), value=value) if count else x


def _rotate_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = x.unflatten(-1, (cos.shape[2], 2, -1)).float()
    first, second = heads.unbind(-2)
    turned = torch.empty_like(heads) if not torch.is_grad_enabled() else None
    if turned is None:
        pair = [first * cos - second * sin, second * cos + first * sin]
        return torch.stack(pair, dim=-2).flatten(-3).to(x.dtype)
    torch.mul(first, cos, out=turned[..., 0, :]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., 1, :]).addcmul_(first, sin)
    return turned.flatten(-3).to(x.dtype)


def _rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x * cos + swapped * sin).to(x.dtype)
