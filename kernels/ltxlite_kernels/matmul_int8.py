"""Multiplies int8 rows on the int8 tensor cores, four times the rate of bf16 on a GeForce card.

The sum over K is exact in int32; scales, bias, GELU, gate and residual follow in fp32 before the
result is written once. cuBLAS returns the int32 sums: 8 bytes of traffic an output more.
Twin: `reference_matmul.matmul`.
"""

import torch
from torch import Tensor

from ltxlite_kernels.matmul import multiply, operands_of, output_of
from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows
from ltxlite_quant.formats import FormatError

LARGEST_SUM_COLUMNS = (1 << 31) // (127 * 127)  # of K: beyond, int32 might overflow


def matmul_int8(
    a: ScaledRows,
    w: ScaledRows,
    bias: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply token rows by the rows of a weight.

    a: (M, K).  w: (N, K), of the same rotation.  bias: (N,) floating.  out: (M, N) floating, any
    row stride, columns side by side, or None for a new one of `dtype`.
    Returns epilogue(a wᵀ + bias): with `a` and `w` exact, the error is that of fp32 and of the
    rounding to the output's dtype.  Raises FormatError if anything does not fit.
    """
    out = output_of(a, w, torch.int8, out, dtype)
    if a.codes.shape[1] > LARGEST_SUM_COLUMNS:
        raise FormatError(
            f"K = {a.codes.shape[1]} may overflow int32; at most {LARGEST_SUM_COLUMNS}"
        )
    return multiply("int8", operands_of(a, w), bias, epilogue, out)
