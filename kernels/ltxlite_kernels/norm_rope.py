"""Norms queries or keys over all heads and turns them by their positions, in one pass.

A row of 4096 in bf16 is read and written once, 16 KB, where norm, lookup of angles, rotation and
rounding apart move about 220. Angles come factorised, a row of cosines for each distinct position
of each axis: 1.8 MB in the second-level cache instead of 16 KB more for each token.
Twin: `reference_rows.norm_rope`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import reference_rows
from ltxlite_kernels.configs import LONGEST_ROW, ROPE_LOOPED, ROPE_TOKENS, rope_warps
from ltxlite_kernels.quantize import FLOATS, runs_kernel
from ltxlite_kernels.rotate import HAVE_TRITON
from ltxlite_quant.formats import FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl


@dataclass(frozen=True, slots=True, eq=False)
class RopeTables:
    """Cosines and sines of some tokens, one row for each distinct position of each axis.

    cosines, sines: (U, H, D/2) fp32, contiguous.  index: (B or 1, t, A) int32, contiguous in its
    last two dimensions: a token's angles are the sums of its A rows, which are zero where an angle
    belongs to another axis.  Values halves apart turn together ("split").
    """

    cosines: Tensor
    sines: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        cosines, sines, index = self.cosines, self.sines, self.index
        if cosines.dim() != 3 or sines.shape != cosines.shape or index.dim() != 3:
            raise FormatError(
                "rotation takes cosines and sines (U, H, D/2) and an index (B, t, A), got "
                f"{tuple(cosines.shape)}, {tuple(sines.shape)} and {tuple(index.shape)}"
            )
        tables = {cosines.dtype, sines.dtype} == {torch.float32}
        if not tables or index.dtype != torch.int32:
            raise FormatError(
                "rotation takes fp32 tables and an int32 index, got "
                f"{cosines.dtype}, {sines.dtype} and {index.dtype}"
            )
        in_order = index.stride()[1:] == (index.shape[2], 1) or 0 in index.shape
        if not (cosines.is_contiguous() and sines.is_contiguous() and in_order):
            raise FormatError(f"tables and index of a rotation lie apart: {index.stride()}")

    def rows(self, part: slice) -> "RopeTables":
        """Return the tables of some of the tokens, as views."""
        return replace(self, index=self.index[:, part])


def norm_rope(
    x: Tensor, weight: Tensor, rope: RopeTables | None, eps: float, out: Tensor | None = None
) -> Tensor:
    """Divide rows by their root mean square, scale them by a weight, and turn them.

    x: (B, t, W) fp32, fp16 or bf16, columns side by side, rows and samples at any stride.
    weight: (W,) floating.  rope: tables of the same t tokens, of one sample or of each, H D = W;
    None: rows are not turned.  out: (B, t, W) floating, of any strides likewise; it may be x
    itself; None for a new one of x's dtype.
    The arithmetic is fp32, with one rounding at the end.  Raises FormatError if anything does not
    fit.  Source: LTX-2 400fd31, ltx_core/model/transformer/{attention,rope}.py.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _check(x, weight, out)
    tables = []
    if rope is not None:
        _check_rope(rope, x)
        tables = [rope.cosines, rope.sines, rope.index]
    torch.ops.ltxlite.norm_rope.default(x, weight, tables, eps, out)
    return out


def _check(x: Tensor, weight: Tensor, out: Tensor) -> None:
    for name, rows in (("x", x), ("out", out)):
        if rows.dim() != 3 or rows.dtype not in FLOATS or rows.stride(2) != 1:
            raise FormatError(
                f"{name} is (B, t, W) fp32, fp16 or bf16 with columns side by side, got "
                f"{tuple(rows.shape)} {rows.dtype}, stride {rows.stride()}"
            )
    if out.shape != x.shape or weight.shape != x.shape[2:] or not weight.is_contiguous():
        raise FormatError(
            f"rows {tuple(x.shape)} fit neither a weight {tuple(weight.shape)} nor "
            f"out {tuple(out.shape)}"
            if out.shape != x.shape
            else f"a weight of {tuple(weight.shape)} does not fit rows of {x.shape[2]}"
        )
    if not 0 < x.shape[2] <= LONGEST_ROW:
        raise FormatError(f"a row of {x.shape[2]}; a program holds 1 to {LONGEST_ROW}")


def _check_rope(rope: RopeTables, x: Tensor) -> None:
    batch, tokens, width = x.shape
    samples, indexed, _ = rope.index.shape
    heads, half = rope.cosines.shape[1:]
    if 2 * heads * half != width or indexed != tokens or samples not in (1, batch):
        raise FormatError(
            f"tables of {heads} heads of {2 * half} and an index of {samples} x {indexed} tokens "
            f"do not turn rows {tuple(x.shape)}"
        )


def _turn_into(
    x: Tensor, weight: Tensor, tables: Sequence[Tensor], eps: float, out: Tensor
) -> None:
    # tables: cosines, sines, index, or none.
    if not runs_kernel(x):
        rope = RopeTables(*tables) if tables else None
        reference_rows.norm_rope(x, weight, rope, eps, out)
        return
    batch, tokens, width = x.shape
    if not out.numel():
        return
    strides = (x.stride(0), x.stride(1), out.stride(0), out.stride(1))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if not tables:
            _norm[(tokens, batch)](x, weight, out, width, *strides, eps, **norm_constants(width))
            return
        cosines, sines, index = tables
        index_stride = index.stride(0) if len(index) > 1 else 0
        heads, half = cosines.shape[1:]
        constants = rope_constants(heads, half, index.shape[2], tokens)
        _turn[(triton.cdiv(tokens, constants["TOKENS"]), batch)](
            x, weight, cosines, sines, index, out,
            tokens, *strides, index_stride, eps, **constants,
        )  # fmt: skip


def norm_constants(width: int) -> dict[str, Any]:
    """Return what the kernel without rotation is compiled for, at W columns."""
    return {
        "WIDTH": 1 << (width - 1).bit_length(),
        "num_warps": rope_warps(width),
        "enable_fp_fusion": True,
    }


def rope_constants(heads: int, half: int, axes: int, tokens: int) -> dict[str, Any]:
    """Return what the kernel with rotation is compiled for."""
    return {
        "HEADS": heads,
        "HALF": half,
        "AXES": axes,
        "BLOCK_H": 1 << (heads - 1).bit_length(),
        "BLOCK_D": 1 << (half - 1).bit_length(),
        "TOKENS": ROPE_TOKENS if tokens >= ROPE_LOOPED else 1,
        "num_warps": rope_warps(2 * heads * half),
        "enable_fp_fusion": True,
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define(
    "norm_rope(Tensor x, Tensor weight, Tensor[] tables, float eps, Tensor(a!) out) -> ()"
)
_library.impl("norm_rope", _turn_into, "CompositeExplicitAutograd")
_library.impl("norm_rope", lambda *_: None, "Meta")


if HAVE_TRITON:

    @triton.jit
    def _norm(
        x,
        weight,
        out,
        W,  # noqa: N803
        x_batch,
        x_stride,
        out_batch,
        out_stride,
        eps,
        WIDTH: tl.constexpr,  # noqa: N803
    ):
        token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        columns = tl.arange(0, WIDTH)
        mask = columns < W
        at = x + sample * x_batch + token * x_stride + columns
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 0) / W + eps)
        values = values * scale * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        at = out + sample * out_batch + token * out_stride + columns
        tl.store(at, values.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _angles(table, rows, offs, mask, AXES: tl.constexpr, COUNT: tl.constexpr):  # noqa: N803
        # A vectors summed, which fetch the same sectors as a gathered value each, by loads of 16
        # bytes instead of 4: 344 instructions of this kernel instead of 416 (three axes, sm_86).
        found = tl.load(table + tl.load(rows).to(tl.int64) * COUNT + offs, mask=mask, other=0.0)
        for axis in tl.static_range(1, AXES):
            row = tl.load(rows + axis).to(tl.int64)
            found += tl.load(table + row * COUNT + offs, mask=mask, other=0.0)
        return found

    @triton.jit
    def _turn(
        x,
        weight,
        cosines,
        sines,
        index,
        out,
        tokens,
        x_batch,
        x_stride,
        out_batch,
        out_stride,
        index_batch,
        eps,
        HEADS: tl.constexpr,  # noqa: N803
        HALF: tl.constexpr,  # noqa: N803
        AXES: tl.constexpr,  # noqa: N803
        BLOCK_H: tl.constexpr,  # noqa: N803
        BLOCK_D: tl.constexpr,  # noqa: N803
        TOKENS: tl.constexpr,  # noqa: N803
    ):
        sample = tl.program_id(1).to(tl.int64)
        head, place = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
        mask = (head < HEADS) & (place < HALF)
        offs, angle = head * (2 * HALF) + place, head * HALF + place  # (H, D/2)
        first_weight = tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
        second_weight = tl.load(weight + HALF + offs, mask=mask, other=0.0).to(tl.float32)
        start = tl.program_id(0).to(tl.int64) * TOKENS
        # Tokens in a row share frame and row: their angles are found in the first-level cache.
        for near in range(0, tl.minimum(tokens - start, TOKENS)):
            token = start + near
            at = x + sample * x_batch + token * x_stride + offs
            first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
            squares = tl.sum(tl.sum(first * first + second * second, 1), 0)
            scale = tl.rsqrt(squares / (2 * HEADS * HALF) + eps)
            rows = index + sample * index_batch + token * AXES
            cos = _angles(cosines, rows, angle, mask, AXES, HEADS * HALF)
            sin = _angles(sines, rows, angle, mask, AXES, HEADS * HALF)
            first = first * scale * first_weight
            second = second * scale * second_weight
            at = out + sample * out_batch + token * out_stride + offs
            turned = first * cos - second * sin
            tl.store(at, turned.to(out.dtype.element_ty), mask=mask)
            turned = second * cos + first * sin
            tl.store(at + HALF, turned.to(out.dtype.element_ty), mask=mask)
