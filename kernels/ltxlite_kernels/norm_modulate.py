"""Norms and modulates rows for matmuls of bf16, in one pass: 8 KB read and 8 KB written a token.

The arithmetic is that of `quantize.norm_modulate_quantize`; the result is not rounded to codes.
Twin: `reference_rows.norm_modulate`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import quantize, reference_rows
from ltxlite_kernels.coding import Coding
from ltxlite_kernels.rotate import HAVE_TRITON

if HAVE_TRITON:
    import triton
    import triton.language as tl


def norm_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, index: Tensor | None, eps: float
) -> Tensor:
    """Divide rows by their root mean square and modulate them: norm(x) * (1 + scale) + shift.

    x, shift, scale, index: as of `quantize.norm_modulate_quantize`.  Returns (M, K) in x's dtype:
    fp32 arithmetic, rounded once.  Raises FormatError if anything does not fit.
    """
    quantize.check_rows(x)
    quantize.check_tables(x, shift, scale, index)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.ltxlite.norm_modulate.default(x, [shift, scale, index], eps, out)
    return out


def _norm_into(x: Tensor, tables: Sequence[Tensor | None], eps: float, out: Tensor) -> None:
    shift, scale, index = tables
    if not quantize.runs_kernel(x):
        out.copy_(reference_rows.norm_modulate(x, shift, scale, index, eps))
    elif len(x):
        given, how = quantize.modulation(x, shift, scale, index)
        with torch.cuda.device_of(x):
            _norm_values[(len(x),)](
                x, *given, out, x.shape[1], x.stride(0), eps, **constants(x.shape[1], how)
            )


def constants(columns: int, how: int) -> dict[str, Any]:
    """Return what the kernel is compiled for, at K columns."""
    given = quantize.row_constants(columns, Coding())
    kept = ("GROUPS", "WIDTH", "num_warps", "enable_fp_fusion")
    return {key: given[key] for key in kept} | {"LOOKUP": how}


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define("norm_modulate(Tensor x, Tensor?[] tables, float eps, Tensor(a!) out) -> ()")
_library.impl("norm_modulate", _norm_into, "CompositeExplicitAutograd")
_library.impl("norm_modulate", lambda *_: None, "Meta")


if HAVE_TRITON:

    @triton.jit
    def _norm_values(
        x,
        shift,
        scale,
        index,
        shift_stride,
        scale_stride,
        out,
        K,  # noqa: N803
        x_stride,
        eps,
        GROUPS: tl.constexpr,  # noqa: N803
        WIDTH: tl.constexpr,  # noqa: N803
        LOOKUP: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = quantize.normed(
            x, shift, scale, index, shift_stride, scale_stride,
            columns, row, K, x_stride, eps, LOOKUP,
        )  # fmt: skip
        tl.store(out + row * K + columns, values.to(out.dtype.element_ty), mask=columns < K)
