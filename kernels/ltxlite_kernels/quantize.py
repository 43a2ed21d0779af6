"""Rounds rows of an activation to int8, once for all matmuls that share them.

`norm_modulate_quantize` is the fused form: a video token's row of 4096 is read once (8 KB) and
written once (4 KB) where norm, modulation, rotation and rounding apart would move 60 KB.
Codes are value / scale, rounded half to even, where scale = absmax / 127 of the turned row.
Twins: `reference.quantize_rows`, `reference.norm_modulate_quantize`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

import warnings
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import reference, rotate
from ltxlite_kernels.configs import LONGEST_ROW, row_warps
from ltxlite_kernels.rotate import HAVE_TRITON, Rotation
from ltxlite_kernels.rows import OWN, SHARED, ScaledRows, lookup
from ltxlite_quant.formats import FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize_rows(x: Tensor, rotation: Rotation = Rotation.NONE) -> ScaledRows:
    """Round rows to int8 with a scale each.

    x: (R, K) fp32, fp16 or bf16; columns side by side, any row stride.  K at most 32768.
    Without rotation codes and scales have the bits of the twin; with one, a value within 1e-3 of
    the middle between two codes may round to the other.  Raises FormatError if x does not fit.
    """
    _check(x, rotation)
    found = _empty(x, rotation)
    torch.ops.ltxlite.quantize_rows.default(x, int(rotation), found.codes, found.scales)
    return found


def norm_modulate_quantize(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    eps: float,
    rotation: Rotation = Rotation.NONE,
) -> ScaledRows:
    """Divide rows by their root mean square, modulate them, and round them to int8.

    x: (M, K) as for `quantize_rows`.  shift, scale: (U, K) floating, both or neither:
    norm(x) * (1 + scale) + shift.  index: (M,) int32, the row of shift and scale for each row of
    x; without it U is 1 or M.  The arithmetic is fp32.
    A code may differ from the twin's by one: sums over K have another order.
    """
    _check(x, rotation)
    for name, table in (("shift", shift), ("scale", scale)):
        if (table is None) != (shift is None):
            raise FormatError("shift and scale are given together or not at all")
        if table is not None:
            _check_table(name, table, x, index)
    found = _empty(x, rotation)
    torch.ops.ltxlite.norm_modulate_quantize.default(
        x, shift, scale, index, eps, int(rotation), found.codes, found.scales
    )
    return found


def _check(x: Tensor, rotation: Rotation) -> None:
    if x.dim() != 2 or x.dtype not in FLOATS or x.stride(1) != 1 or not x.shape[1]:
        raise FormatError(
            "rows to round to int8 are (R, K) fp32, fp16 or bf16 with columns side by side, got "
            f"{tuple(x.shape)} {x.dtype}, stride {x.stride()}"
        )
    if x.shape[1] > LONGEST_ROW:
        raise FormatError(f"a row of {x.shape[1]} is longer than a program holds, {LONGEST_ROW}")
    rotation.check(x.shape[1])


def _check_table(name: str, table: Tensor, x: Tensor, index: Tensor | None) -> None:
    if table.dim() != 2 or table.shape[1] != x.shape[1] or table.stride(1) != 1:
        raise FormatError(
            f"{name} is (U, {x.shape[1]}) with columns side by side, got {tuple(table.shape)}, "
            f"stride {table.stride()}"
        )
    lookup(table, index, len(x), name)


def _empty(x: Tensor, rotation: Rotation) -> ScaledRows:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return ScaledRows(codes, codes.new_empty(len(x), dtype=torch.float32), rotation)


def runs_kernel(x: Tensor) -> bool:
    """Tell whether Triton can work on x: on a GPU, or in the interpreter; warn if it is missing."""
    if HAVE_TRITON:
        return x.is_cuda or not isinstance(coded, triton.JITFunction)
    if x.is_cuda:
        warnings.warn(
            "int8 arithmetic by plain torch is slower than none: Triton is not installed",
            RuntimeWarning,
            stacklevel=3,
        )
    return False


def _quantize_into(x: Tensor, rotation: int, codes: Tensor, scales: Tensor) -> None:
    if not runs_kernel(x):
        found = reference.quantize_rows(x, Rotation(rotation))
        codes.copy_(found.codes)
        scales.copy_(found.scales)
    elif len(x):
        constants = row_constants(x.shape[1], rotation)
        with torch.cuda.device_of(x):
            _rows[(len(x),)](x, codes, scales, x.shape[1], x.stride(0), **constants)


def _norm_into(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    eps: float,
    rotation: int,
    codes: Tensor,
    scales: Tensor,
) -> None:
    if not runs_kernel(x):
        found = reference.norm_modulate_quantize(x, shift, scale, index, eps, Rotation(rotation))
        codes.copy_(found.codes)
        scales.copy_(found.scales)
        return
    if not len(x):
        return
    if shift is not None and scale is not None and index is None and len(shift) != len(scale):
        shift, scale = shift.expand(len(x), -1), scale.expand(len(x), -1)
    how = SHARED if shift is None else lookup(shift, index, len(x), "shift")
    shift_stride, scale_stride = (0 if t is None else t.stride(0) for t in (shift, scale))
    constants = row_constants(x.shape[1], rotation) | {"LOOKUP": how}
    with torch.cuda.device_of(x):
        _norm_rows[(len(x),)](
            x, shift, scale, index, codes, scales,
            x.shape[1], x.stride(0), shift_stride, scale_stride, eps, **constants,
        )  # fmt: skip


def row_constants(columns: int, rotation: int) -> dict[str, Any]:
    """Return what the kernels of this file are compiled for, at K columns."""
    width = 1 << max(4, (columns - 1).bit_length())
    return {
        "ROTATION": int(rotation),
        "GROUPS": max(1, width // 256),
        "WIDTH": min(width, 256) if not rotation else 256,
        "num_warps": row_warps(width),
        "enable_fp_fusion": False,  # the twin rounds products and sums apart
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define("quantize_rows(Tensor x, int rotation, Tensor(a!) codes, Tensor(b!) scales) -> ()")
_library.define(
    "norm_modulate_quantize(Tensor x, Tensor? shift, Tensor? scale, Tensor? index, float eps, "
    "int rotation, Tensor(a!) codes, Tensor(b!) scales) -> ()"
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
    def _store(values, columns, row, codes, scales, K, ROTATION: tl.constexpr):  # noqa: N803
        largest = as_largest(tl.max(tl.max(largest_bits(values), 1), 0))
        whole = largest
        if ROTATION:
            # A power of two changes no bit of the fp16 that the rotation rounds to.
            power = power_of_two(largest)
            values = rotate.rotated(values * tl.div_rn(1.0, power), columns, ROTATION)
            largest = as_largest(tl.max(tl.max(largest_bits(values), 1), 0))
            whole = as_largest(largest_bits(largest * (power * root(ROTATION))))
        step = largest * INVERSE
        tl.store(scales + row, whole * INVERSE)
        out = codes + row * K + columns
        tl.store(out, coded(values * tl.div_rn(1.0, step)), mask=columns < K)

    @triton.jit
    def _rows(
        x,
        codes,
        scales,
        K,  # noqa: N803
        x_stride,
        ROTATION: tl.constexpr,  # noqa: N803
        GROUPS: tl.constexpr,  # noqa: N803
        WIDTH: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = tl.load(x + row * x_stride + columns, mask=columns < K, other=0.0)
        _store(values.to(tl.float32), columns, row, codes, scales, K, ROTATION)

    @triton.jit
    def _norm_rows(
        x,
        shift,
        scale,
        index,
        codes,
        scales,
        K,  # noqa: N803
        x_stride,
        shift_stride,
        scale_stride,
        eps,
        ROTATION: tl.constexpr,  # noqa: N803
        GROUPS: tl.constexpr,  # noqa: N803
        WIDTH: tl.constexpr,  # noqa: N803
        LOOKUP: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
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
        _store(values, columns, row, codes, scales, K, ROTATION)
