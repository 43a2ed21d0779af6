"""Multiplies fp16 rows: the "exact" mode, twice the rate of bf16 on a GeForce card, and closer.

GeForce cards sum fp16 products in fp16 at twice the rate at which they sum in fp32. Every 64
products the sum joins one in fp32: 4.4e-4 of error beside 2.3e-3 of bf16 (kernels.md 0), where
torch's `allow_fp16_accumulation` sums all of K in fp16. Cards that gain nothing by it sum in fp32.
Twin: `reference_matmul.matmul`.
"""

import torch
from torch import Tensor

from ltxlite_kernels.matmul import multiply, operands_of, output_of
from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows

# Beside codes of activations up to 64: 64 products are at most 63488, fp16 ends at 65504.
LARGEST_WEIGHT = 15.5


def matmul_fp16(
    a: ScaledRows,
    w: Tensor | ScaledRows,
    bias: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply token rows by the rows of a decoded weight.

    a: (M, K) fp16 codes within ±64, scales powers of two.  w: (N, K) fp16, contiguous, within
    ±15.5: no 64 products then overflow fp16, whatever their signs.  Larger weights, or those so
    small that fp16 rounds them coarsely (below 1e-4), come as ScaledRows with powers of two as
    scales.  Values are not checked.  bias, epilogue, out, dtype and errors: as of
    `matmul_int8.matmul_int8`.
    Returns epilogue(a wᵀ + bias).  Error: 4.4e-4 for random rows where fp16 sums, else fp32's.
    """
    out = output_of(a, w, torch.float16, out, dtype)
    return multiply("fp16", operands_of(a, w), bias, epilogue, out)
