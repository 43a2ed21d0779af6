"""What the matmuls take: rows of codes with a scale each, and what to do with their result.

A row is one token of an activation or one output feature of a weight. Both carry one scale a row,
so a product of two rows needs two multiplications, after all of its sum.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltxlite_kernels.rotate import Rotation
from ltxlite_quant.formats import FormatError

# What codes may be: the types that tensor cores multiply faster than bf16 on some card.
CODES = (torch.int8, torch.float16, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True, eq=False)
class ScaledRows:
    """Rows of codes with a scale each, rotated along K or not: value = code * scale.

    codes: (R, K) int8, fp16 or fp8 (e4m3).  scales: (R,) fp32, NaN for a row that holds NaN.  Only
    rows of the same rotation and type may be multiplied.
    """

    codes: Tensor
    scales: Tensor
    rotation: Rotation

    def __post_init__(self) -> None:
        fits = self.codes.dim() == 2 and self.scales.shape == self.codes.shape[:1]
        if not fits or self.codes.dtype not in CODES or self.scales.dtype != torch.float32:
            raise FormatError(
                "scaled rows are codes (R, K) int8, fp16 or fp8 and scales (R,) fp32, got "
                f"{tuple(self.codes.shape)} {self.codes.dtype} and "
                f"{tuple(self.scales.shape)} {self.scales.dtype}"
            )

    def rows(self, part: slice) -> "ScaledRows":
        """Return some of the rows, as a view."""
        return ScaledRows(self.codes[part], self.scales[part], self.rotation)


@dataclass(frozen=True, slots=True, eq=False)
class Epilogue:
    """What a matmul does to its result (M, N) before it writes it, in fp32.

    gelu: GELU, tanh form.  gate: (U, N) to multiply by.  index: (M,) int32, the gate of each row;
    without it U is 1 (all rows share a gate) or M.  residual: (M, N) to add, last; it may be the
    output itself.  gate and residual: floating, any row stride, columns side by side.
    """

    gelu: bool = False
    gate: Tensor | None = None
    index: Tensor | None = None
    residual: Tensor | None = None

    def columns(self, part: slice) -> "Epilogue":
        """Return the epilogue of some output features, as views."""
        gate = None if self.gate is None else self.gate[:, part]
        residual = None if self.residual is None else self.residual[:, part]
        return replace(self, gate=gate, residual=residual)


PLAIN = Epilogue()

# How a row finds its vector in a table (U, C): constants of kernels.
SHARED, OWN, INDEXED = 0, 1, 2


def lookup(table: Tensor, index: Tensor | None, rows: int, what: str) -> int:
    """Return how rows find their vectors in a table (U, C); FormatError if some cannot."""
    if index is not None:
        if index.shape != (rows,) or index.dtype != torch.int32 or not index.is_contiguous():
            raise FormatError(
                f"the index into {what} is ({rows},) int32, one of each row, got "
                f"{tuple(index.shape)} {index.dtype}"
            )
        return INDEXED
    if len(table) not in (1, rows):
        raise FormatError(
            f"{what} has {len(table)} rows for {rows}; without an index it is one, or one of each"
        )
    return SHARED if len(table) == 1 else OWN
