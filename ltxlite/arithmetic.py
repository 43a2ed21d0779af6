"""Products of codes instead of values: what a linear does where the card multiplies them faster.

A weight is brought into codes piece by piece, an activation once for all linears that read it, and
bias, GELU, gate and residual are applied before a result is written (kernels/README.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltxlite.models.activation import PLAIN, Activation, Tail
from ltxlite_kernels.configs import DEQUANT
from ltxlite_kernels.int8_weight import int8_pieces, row_scales
from ltxlite_kernels.matmul_int8 import matmul_int8
from ltxlite_kernels.quantize import quantize_rows
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import Epilogue, ScaledRows

if TYPE_CHECKING:
    from ltxlite.linear import QuantLinear

Pieces = Iterable[tuple[slice, ScaledRows]]


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """A product to be computed: rows, bias (N,) or None, N and what becomes of it."""

    given: Activation
    bias: Tensor | None
    features: int
    tail: Tail = PLAIN


class Arithmetic(ABC):
    """A way to multiply."""

    def multiply(self, operands: Operands, weight: "QuantLinear") -> Tensor:
        """Return tail(given Wᵀ + bias), (B, t, N)."""
        return self.product(operands, self.pieces(weight), weight)

    def product(self, operands: Operands, pieces: Pieces, weight: "QuantLinear") -> Tensor:
        """Do as `multiply` with pieces of a weight that stands for `weight`: a merged one."""
        given, tail = operands.given, operands.tail
        batch, tokens = given.x.shape[:2]
        out = tail.flat()
        if tail.residual is not None and out is None:  # rows of several samples, apart in memory
            plain = Operands(given, operands.bias, operands.features)
            return tail.applied(self.product(plain, pieces, weight))
        dtype = given.x.dtype
        if out is None:
            out = given.x.new_empty(batch * tokens, operands.features)
        rows, epilogue = self.rows(given, weight), tail.epilogue(batch, tokens)
        for part, piece in pieces:
            bias = None if operands.bias is None else operands.bias[part].to(dtype)
            self.matmul(rows, piece, bias, epilogue.columns(part), out[:, part])
        return out.view(batch, tokens, operands.features)

    @abstractmethod
    def rows(self, given: Activation, weight: "QuantLinear") -> ScaledRows:
        """Return an activation as codes that fit the weight's."""

    @abstractmethod
    def pieces(self, weight: "QuantLinear") -> Pieces:
        """Yield a weight as codes, some rows at a time."""

    @abstractmethod
    def coded(self, values: Tensor, weight: "QuantLinear") -> ScaledRows:
        """Return decoded rows (n, K) as such a piece."""

    @abstractmethod
    def matmul(
        self, a: ScaledRows, w: ScaledRows, bias: Tensor | None, epilogue: Epilogue, out: Tensor
    ) -> None:
        """Multiply a piece."""


class Int8(Arithmetic):
    """int8 with a scale a row on both sides, turned along K."""

    def rows(self, given: Activation, weight: "QuantLinear") -> ScaledRows:
        """Return int8 rows."""
        return given.int8(_rotation(weight))

    def pieces(self, weight: "QuantLinear") -> Pieces:
        """Decode blocks by a kernel of ours; formats without one by way of their values."""
        plain = weight.format.dtype is not None and not weight.part_names
        if weight.format.name not in DEQUANT and not plain:
            return self._by_values(weight)
        rotation, columns = _rotation(weight), weight.columns
        if not plain and weight.row_scales is None:
            # Once, 4 bytes a row: 18 MB for all of LTX-2.3.
            weight.row_scales = row_scales(weight.blocks, weight.format, columns, rotation)
        return int8_pieces(weight.blocks, weight.format, columns, rotation, weight.row_scales)

    def _by_values(self, weight: "QuantLinear") -> Iterator[tuple[slice, ScaledRows]]:
        for part in weight.pieces(torch.bfloat16):
            yield part, self.coded(weight.decoded(torch.bfloat16, part), weight)

    def coded(self, values: Tensor, weight: "QuantLinear") -> ScaledRows:
        """Round rows to int8."""
        return quantize_rows(values, _rotation(weight))

    def matmul(
        self, a: ScaledRows, w: ScaledRows, bias: Tensor | None, epilogue: Epilogue, out: Tensor
    ) -> None:
        """Multiply on the int8 tensor cores."""
        matmul_int8(a, w, bias, epilogue, out)


def _rotation(weight: "QuantLinear") -> Rotation:
    return Rotation.of(weight.columns)
