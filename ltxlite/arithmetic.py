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
from ltxlite_kernels.coding import Coding
from ltxlite_kernels.configs import DEQUANT
from ltxlite_kernels.int8_weight import int8_pieces, row_scales
from ltxlite_kernels.matmul_fp8 import matmul_fp8
from ltxlite_kernels.matmul_fp16 import matmul_fp16
from ltxlite_kernels.matmul_int8 import matmul_int8
from ltxlite_kernels.quantize import FLOATS, quantize_rows
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import Epilogue, ScaledRows
from ltxlite_kernels.weight_pieces import fp16_pieces, fp16_scales, stored_fp8, stored_int8

if TYPE_CHECKING:
    from ltxlite.linear import QuantLinear

Piece = Tensor | ScaledRows
Pieces = Iterable[tuple[slice, Piece]]


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
        self, a: ScaledRows, w: Piece, bias: Tensor | None, epilogue: Epilogue, out: Tensor
    ) -> None:
        """Multiply a piece."""


class Int8(Arithmetic):
    """int8 with a scale a row on both sides, turned along K."""

    def rows(self, given: Activation, weight: "QuantLinear") -> ScaledRows:
        """Return int8 rows."""
        return given.coded(self._coding(weight))

    def pieces(self, weight: "QuantLinear") -> Pieces:
        """Take int8 ConvRot as it lies, decode blocks by a kernel, others by way of values."""
        stored = stored_int8(weight.blocks, weight.format, weight.parts())
        if stored is not None:
            return [(slice(0, weight.rows), stored)]
        if not _decodes(weight):
            return _by_values(self, weight)
        rotation = self._coding(weight).rotation
        given = (weight.blocks, weight.format, weight.columns, rotation)
        if weight.format.is_quantized and weight.scales is None:
            weight.scales = row_scales(*given)  # once; 4 bytes a row, 18 MB for all of LTX-2.3
        return int8_pieces(*given, weight.scales)

    def coded(self, values: Tensor, weight: "QuantLinear") -> ScaledRows:
        """Round rows to int8."""
        return quantize_rows(values, self._coding(weight))

    def matmul(
        self, a: ScaledRows, w: Piece, bias: Tensor | None, epilogue: Epilogue, out: Tensor
    ) -> None:
        """Multiply on the int8 tensor cores."""
        assert isinstance(w, ScaledRows)
        matmul_int8(a, w, bias, epilogue, out)

    def _coding(self, weight: "QuantLinear") -> Coding:
        return Coding(rotation=Rotation.of(weight.columns))


class Fp16(Arithmetic):
    """fp16, summed in fp16 for 64 products where the card gains by it: more exact than bf16."""

    # Powers of two for rows of weights that lie outside of what fp16 sums may hold.
    _WEIGHTS = Coding(torch.float16, limit=8.0)

    def rows(self, given: Activation, weight: "QuantLinear") -> ScaledRows:
        """Return rows within 64 times a power of two."""
        return given.coded(Coding(torch.float16))

    def pieces(self, weight: "QuantLinear") -> Pieces:
        """Decode to fp16 by a kernel where there is one, else by way of fp32."""
        if not _decodes(weight):
            return _by_values(self, weight, torch.float32)
        given = (weight.blocks, weight.format, weight.columns)
        if not weight.measured and not weight.blocks.is_meta:
            weight.scales, weight.measured = fp16_scales(*given), True  # once: waits for the card
        return fp16_pieces(*given, weight.scales)

    def coded(self, values: Tensor, weight: "QuantLinear") -> ScaledRows:
        """Scale rows by powers of two."""
        return quantize_rows(values, self._WEIGHTS)

    def matmul(
        self, a: ScaledRows, w: Piece, bias: Tensor | None, epilogue: Epilogue, out: Tensor
    ) -> None:
        """Multiply on the fp16 tensor cores."""
        matmul_fp16(a, w, bias, epilogue, out)


class Fp8(Arithmetic):
    """fp8 weights as their file holds them, activations rounded to e4m3."""

    _CODING = Coding(torch.float8_e4m3fn)

    def rows(self, given: Activation, weight: "QuantLinear") -> ScaledRows:
        """Return e4m3 rows."""
        return given.coded(self._CODING)

    def pieces(self, weight: "QuantLinear") -> Pieces:
        """Take e4m3 with a scale a row or a tensor as it lies, others by way of values."""
        stored = stored_fp8(weight.blocks, weight.format, weight.parts())
        return _by_values(self, weight) if stored is None else [(slice(0, weight.rows), stored)]

    def coded(self, values: Tensor, weight: "QuantLinear") -> ScaledRows:
        """Round rows to e4m3."""
        return quantize_rows(values, self._CODING)

    def matmul(
        self, a: ScaledRows, w: Piece, bias: Tensor | None, epilogue: Epilogue, out: Tensor
    ) -> None:
        """Multiply on the fp8 tensor cores."""
        assert isinstance(w, ScaledRows)
        matmul_fp8(a, w, bias, epilogue, out)


def _decodes(weight: "QuantLinear") -> bool:
    """Tell whether a kernel takes the blocks of a weight; plain values need none."""
    return weight.format.name in DEQUANT or weight.format.dtype in FLOATS


def _by_values(
    arithmetic: Arithmetic, weight: "QuantLinear", dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[slice, ScaledRows]]:
    for part in weight.pieces(dtype):
        yield part, arithmetic.coded(weight.decoded(dtype, part), weight)
