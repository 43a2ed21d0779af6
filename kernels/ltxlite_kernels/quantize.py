"""Rounds rows of an activation to codes, once for all matmuls that share them.

`norm_modulate_quantize` is the fused form: a video token's row of 4096 is read once (8 KB) and
written once (4 KB of int8) where norm, modulation, rotation and rounding apart would move 60 KB.
What codes are, int8 unless said otherwise, is a `coding.Coding`.
Twins: `reference.quantize_rows`, `reference.norm_modulate_quantize`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import reference, rotate
from ltxlite_kernels.card import card_of
from ltxlite_kernels.coding import Coding
from ltxlite_kernels.configs import LONGEST_ROW, row_warps
from ltxlite_kernels.rotate import HAVE_TRITON, Rotation
from ltxlite_kernels.rows import OWN, SHARED, ScaledRows, lookup
from ltxlite_quant.formats import FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8_FROM = 89  # the first compute capability with e4m3


def quantize_rows(x: Tensor, coding: Coding | Rotation = Rotation.NONE) -> ScaledRows:
    """Round rows to codes with a scale each.

    x: (R, K) fp32, fp16 or bf16; columns side by side, any row stride.  K at most 32768.
    coding: what codes are; a rotation means int8 after it.
    Without rotation codes and scales have the bits of the twin; with one, a value within 1e-3 of
    the middle between two codes may round to the other.  Raises FormatError if x does not fit.
    """
    coding = Coding.of(coding)
    check_rows(x, coding.rotation)
    found = empty_rows(x, coding)
    torch.ops.ltxlite.quantize_rows.default(
        x, int(coding.rotation), coding.largest, found.codes, found.scales
    )
    return found


def norm_modulate_quantize(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    eps: float,
    coding: Coding | Rotation = Rotation.NONE,
) -> ScaledRows:
    """Divide rows by their root mean square, modulate them, and round them to codes.

    x: (M, K) as for `quantize_rows`.  shift, scale: (U, K) floating, both or neither:
    norm(x) * (1 + scale) + shift.  index: (M,) int32, the row of shift and scale for each row of
    x; without it U is 1 or M.  The arithmetic is fp32.
    A code may differ from the twin's by one: sums over K have another order.
    """
    coding = Coding.of(coding)
    check_rows(x, coding.rotation)
    check_tables(x, shift, scale, index)
    found = empty_rows(x, coding)
    torch.ops.ltxlite.norm_modulate_quantize.default(
        x, [shift, scale, index], eps, int(coding.rotation), coding.largest,
        [found.codes, found.scales],
    )  # fmt: skip
    return found


def check_rows(x: Tensor, rotation: Rotation = Rotation.NONE) -> None:
    """Raise FormatError unless a program can hold a row of x, and turn it."""
    if x.dim() != 2 or x.dtype not in FLOATS or x.stride(1) != 1 or not x.shape[1]:
        raise FormatError(
            "rows of an activation are (R, K) fp32, fp16 or bf16 with columns side by side, got "
            f"{tuple(x.shape)} {x.dtype}, stride {x.stride()}"
        )
    if x.shape[1] > LONGEST_ROW:
        raise FormatError(f"a row of {x.shape[1]} is longer than a program holds, {LONGEST_ROW}")
    rotation.check(x.shape[1])


def check_tables(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, index: Tensor | None
) -> None:
    """Raise FormatError unless each row of x finds its shift and scale, or there are none."""
    for name, table in (("shift", shift), ("scale", scale)):
        if (table is None) != (shift is None):
            raise FormatError("shift and scale are given together or not at all")
        if table is not None:
            _check_table(name, table, x, index)


def _check_table(name: str, table: Tensor, x: Tensor, index: Tensor | None) -> None:
    if table.dim() != 2 or table.shape[1] != x.shape[1] or table.stride(1) != 1:
        raise FormatError(
            f"{name} is (U, {x.shape[1]}) with columns side by side, got {tuple(table.shape)}, "
            f"stride {table.stride()}"
        )
    lookup(table, index, len(x), name)


def empty_rows(x: Tensor, coding: Coding) -> ScaledRows:
    """Return memory for the codes of x; FormatError if its card has no such type."""
    if coding.dtype == torch.float8_e4m3fn and x.is_cuda and card_of(x).capability < FP8_FROM:
        raise FormatError(
            f"fp8 codes need compute capability 8.9, this card has {card_of(x).capability / 10}; "
            "take int8 or fp16"
        )
    codes = torch.empty(x.shape, dtype=coding.dtype, device=x.device)
    return ScaledRows(codes, codes.new_empty(len(x), dtype=torch.float32), coding.rotation)


def runs_kernel(x: Tensor) -> bool:
    """Tell whether Triton can work on x: on a GPU, or in the interpreter; warn if it is missing."""
    if HAVE_TRITON:
        return x.is_cuda or not isinstance(coded, triton.JITFunction)
    if x.is_cuda:
        warnings.warn(
            "kernels run as plain torch, which is slower than none: Triton is not installed",
            RuntimeWarning,
            stacklevel=3,
        )
    return False


def _quantize_into(x: Tensor, rotation: int, limit: float, codes: Tensor, scales: Tensor) -> None:
    coding = Coding(codes.dtype, Rotation(rotation), limit)
    if not runs_kernel(x):
        found = reference.quantize_rows(x, coding)
        codes.copy_(found.codes)
        scales.copy_(found.scales)
    elif len(x):
        constants = row_constants(x.shape[1], coding)
        with torch.cuda.device_of(x):
            _rows[(len(x),)](x, codes, scales, x.shape[1], x.stride(0), **constants)


def _norm_into(
    x: Tensor,
    tables: Sequence[Tensor | None],
    eps: float,
    rotation: int,
    limit: float,
    out: Sequence[Tensor],
) -> None:
    (shift, scale, index), (codes, scales) = tables, out
    coding = Coding(codes.dtype, Rotation(rotation), limit)
    if not runs_kernel(x):
        found = reference.norm_modulate_quantize(x, shift, scale, index, eps, coding)
        codes.copy_(found.codes)
        scales.copy_(found.scales)
    elif len(x):
        given, how = modulation(x, shift, scale, index)
        constants = row_constants(x.shape[1], coding) | {"LOOKUP": how}
        with torch.cuda.device_of(x):
            _norm_rows[(len(x),)](
                x, *given, codes, scales, x.shape[1], x.stride(0), eps, **constants
            )


def modulation(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, index: Tensor | None
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None, int, int], int]:
    """Return shift, scale, index and strides as `normed` takes them, and how rows are looked up."""
    if shift is None or scale is None:
        return (None, None, None, 0, 0), SHARED
    if index is None and len(shift) != len(scale):
        shift, scale = shift.expand(len(x), -1), scale.expand(len(x), -1)
    how = lookup(shift, index, len(x), "shift")
    return (shift, scale, index, shift.stride(0), scale.stride(0)), how


# With fewer warps triton 3.6 spills two registers of such rows on sm_80.
_UNTURNED_FP16 = Coding(torch.float16)


def row_constants(columns: int, coding: Coding) -> dict[str, Any]:
    """Return what kernels of rows are compiled for, at K columns."""
    width = 1 << max(4, (columns - 1).bit_length())
    return {
        "ROTATION": int(coding.rotation),
        "STEP": coding.step,
        "GROUPS": max(1, width // 256),
        "WIDTH": min(width, 256) if not coding.rotation else 256,
        "num_warps": row_warps(width) * (2 if coding == _UNTURNED_FP16 else 1),
        # int8 is rounded by a sum, which the twin rounds apart from the product before it. Other
        # codes are not, and fused need less: no spills in 2048 rotated columns on sm_120.
        "enable_fp_fusion": coding.dtype != torch.int8,
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define(
    "quantize_rows(Tensor x, int rotation, float limit, Tensor(a!) codes, Tensor(b!) scales) -> ()"
)
_library.define(
    "norm_modulate_quantize(Tensor x, Tensor?[] tables, float eps, int rotation, float limit, "
    "Tensor(a!)[] out) -> ()"
)
_library.impl("quantize_rows", _quantize_into, "CompositeExplicitAutograd")
_library.impl("norm_modulate_quantize", _norm_into, "CompositeExplicitAutograd")
for _name in ("quantize_rows", "norm_modulate_quantize"):
    _library.impl(_name, lambda *_: None, "Meta")


if HAVE_TRITON:
    # 1 / 127, and a smallest largest value, so that a row of zeros has a scale to divide by.
    INVERSE: tl.constexpr = tl.constexpr(1 / 127)
    SMALLEST: tl.constexpr = tl.constexpr(0x0DA24260)  # 1e-30
    # 1.5 * 2^23: in a sum of this size the last bit is one, so it rounds half to even.
    ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
    _SHARED, _OWN = tl.constexpr(SHARED), tl.constexpr(OWN)

    @triton.jit
    def largest_bits(values):
        """Return the bits of |values|, whose maximum as integers is NaN's if there is one."""
        return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF

    @triton.jit
    def as_largest(bits):
        """Return a maximum of `largest_bits` as a value, at least 1e-30."""
        return tl.maximum(bits, SMALLEST).to(tl.float32, bitcast=True)

    @triton.jit
    def power_of_two(value):
        """Return the power of two at or below a positive value."""
        bits = value.to(tl.int32, bitcast=True) & 0x7F800000
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def root(ROTATION: tl.constexpr):  # noqa: N803
        """Return 1 / √size of a rotation."""
        return 0.0625 if ROTATION == 256 else 0.08838834764831845

    @triton.jit
    def coded(values):
        """Round to int8, without the slow conversion of fp32 to integers."""
        values = tl.minimum(tl.maximum(values, -127.0), 127.0) + ROUNDER
        return values.to(tl.int32, bitcast=True).to(tl.int8)

    @triton.jit
    def exact_power(value):
        """Return the power of two at or below a positive value, and NaN for NaN."""
        bits = (value.to(tl.int32, bitcast=True) & 0x007FFFFF) | 0x3F800000
        return tl.div_rn(value, bits.to(tl.float32, bitcast=True))

    @triton.jit
    def store_codes(
        values,
        columns,
        row,
        codes,
        scales,
        K,  # noqa: N803
        ROTATION: tl.constexpr,  # noqa: N803
        STEP: tl.constexpr,  # noqa: N803
    ):
        """Rotate a row (G, WIDTH) fp32, round it to codes, and write it with its scale."""
        kind = codes.dtype.element_ty
        largest = as_largest(tl.max(tl.max(largest_bits(values), 1), 0))
        whole, unit = largest, 1.0
        if ROTATION:
            # A power of two changes no bit of the fp16 that the rotation rounds to.
            power = power_of_two(largest)
            values = rotate.rotated(values * tl.div_rn(1.0, power), columns, ROTATION)
            largest = as_largest(tl.max(tl.max(largest_bits(values), 1), 0))
            unit = power * root(ROTATION)
            whole = as_largest(largest_bits(largest * unit))
        if kind == tl.float16:
            scale = exact_power(whole) * STEP
            factor = tl.div_rn(unit, scale)
        else:
            scale = whole * STEP
            factor = tl.div_rn(1.0, largest * STEP)
        tl.store(scales + row, scale)
        out = codes + row * K + columns
        if kind == tl.int8:
            tl.store(out, coded(values * factor), mask=columns < K)
        else:
            tl.store(out, (values * factor).to(kind), mask=columns < K)

    @triton.jit
    def _rows(
        x,
        codes,
        scales,
        K,  # noqa: N803
        x_stride,
        ROTATION: tl.constexpr,  # noqa: N803
        STEP: tl.constexpr,  # noqa: N803
        GROUPS: tl.constexpr,  # noqa: N803
        WIDTH: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = tl.load(x + row * x_stride + columns, mask=columns < K, other=0.0)
        store_codes(values.to(tl.float32), columns, row, codes, scales, K, ROTATION, STEP)

    @triton.jit
    def normed(
        x,
        shift,
        scale,
        index,
        shift_stride,
        scale_stride,
        columns,
        row,
        K,  # noqa: N803
        x_stride,
        eps,
        LOOKUP: tl.constexpr,  # noqa: N803
    ):
        """Read a row (G, WIDTH), divide it by its root mean square and modulate it, in fp32."""
        mask = columns < K
        values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(tl.sum(values * values, 1), 0), K.to(tl.float32))
        values = values * tl.rsqrt(mean + eps)
        if shift is not None:
            if LOOKUP == _SHARED:
                at = row * 0
            elif LOOKUP == _OWN:
                at = row
            else:
                at = tl.load(index + row).to(tl.int64)
            factor = tl.load(scale + at * scale_stride + columns, mask=mask, other=0.0)
            term = tl.load(shift + at * shift_stride + columns, mask=mask, other=0.0)
            values = values * (1.0 + factor.to(tl.float32)) + term.to(tl.float32)
        return values

    @triton.jit
    def _norm_rows(
        x,
        shift,
        scale,
        index,
        shift_stride,
        scale_stride,
        codes,
        scales,
        K,  # noqa: N803
        x_stride,
        eps,
        ROTATION: tl.constexpr,  # noqa: N803
        STEP: tl.constexpr,  # noqa: N803
        GROUPS: tl.constexpr,  # noqa: N803
        WIDTH: tl.constexpr,  # noqa: N803
        LOOKUP: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = normed(
            x, shift, scale, index, shift_stride, scale_stride,
            columns, row, K, x_stride, eps, LOOKUP,
        )  # fmt: skip
        store_codes(values, columns, row, codes, scales, K, ROTATION, STEP)
