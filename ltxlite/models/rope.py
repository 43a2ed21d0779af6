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
import torch.nn.functional as F
from torch import Tensor

from ltxlite_kernels.norm_rope import RopeTables

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
    """Cosines and sines of a sequence, fp32: (B, T, H, D/2) if split, (B, T, W) if interleaved.

    With an index (B, T, A) int32 the tables hold, instead of tokens, one row for each distinct
    position of each axis, and a token's row is the sum of its A rows, which do not overlap. A clip
    of 1920x1088x121 has 110 such rows for its 32 640 tokens: 1.8 MiB instead of 510.
    """

    cosines: Tensor
    sines: Tensor
    layout: Layout
    index: Tensor | None = None

    def tables(self, rows: slice) -> RopeTables | None:
        """Return what the kernel takes for the tokens `rows`; None where it has no such form."""
        if self.layout != "split" or self.index is None:
            return None
        return RopeTables(self.cosines, self.sines, self.index[:, rows])

    @property
    def cos(self) -> Tensor:
        """Cosines of all tokens."""
        return self._rows(self.cosines, slice(None))

    @property
    def sin(self) -> Tensor:
        """Sines of all tokens."""
        return self._rows(self.sines, slice(None))

    def rotate(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rotate queries or keys (B, t, W), the tokens `rows` of the sequence, in fp32."""
        turn = _rotate_split if self.layout == "split" else _rotate_interleaved
        return turn(x, self._rows(self.cosines, rows), self._rows(self.sines, rows))

    def _rows(self, table: Tensor, rows: slice) -> Tensor:
        if self.index is None:
            return table[:, rows]
        index = self.index[:, rows]
        found = F.embedding_bag(index.flatten(0, 1).long(), table.flatten(1), mode="sum")
        return found.view(*index.shape[:2], *table.shape[1:])


def rope_table(positions: Tensor, spec: RopeSpec) -> Rope:
    """Build the table for positions (B, A, T), given in the units of `spec.max_positions`.

    Looks for equal positions, so it waits for the device.
    """
    axes = positions.shape[1]
    grid = _frequencies(spec.width // (2 * axes), spec).to(positions.device)
    cosines, sines, index, first = [], [], [], 0
    for axis, limit in enumerate(spec.max_positions):
        values, inverse = (positions[:, axis].float() / limit).unique(return_inverse=True)
        angles = grid * (values[:, None] * 2 - 1)
        cosines.append(_spread(angles.cos(), axis, spec, padding=1.0))
        sines.append(_spread(angles.sin(), axis, spec, padding=0.0))
        index.append(inverse + first)
        first += len(values)
    joined = torch.stack(index, dim=-1).to(torch.int32)
    return Rope(torch.cat(cosines), torch.cat(sines), spec.layout, joined)


def _spread(values: Tensor, axis: int, spec: RopeSpec, padding: float) -> Tensor:
    """Put one axis' values (U, N) where they stand in a token's row; the rest is left zero."""
    axes, half = len(spec.max_positions), spec.width // 2
    pad = half - axes * values.shape[1]
    row = values.new_zeros(len(values), half)
    row[:, pad + axis :: axes] = values
    if axis == 0:
        row[:, :pad] = padding
    if spec.layout == "interleaved":
        return row.repeat_interleave(2, dim=-1)
    split: Tensor = row.unflatten(-1, (spec.heads, -1))
    return split


def _frequencies(count: int, spec: RopeSpec) -> Tensor:
    if spec.float64:
        powers = np.power(spec.theta, np.linspace(0.0, 1.0, count)) * np.pi / 2
        return torch.tensor(powers, dtype=torch.float32)
    return spec.theta ** torch.linspace(0.0, 1.0, count, dtype=torch.float32) * np.pi / 2


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
