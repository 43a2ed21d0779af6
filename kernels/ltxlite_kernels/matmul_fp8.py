"""Multiplies fp8 rows (e4m3) as native fp8 checkpoints hold them, on sm_89 and later.

Rounding activations to e4m3 costs three times the error of int8, and GeForce cards do int8 at the
same rate or twice it (kernels.md 5): this is for Hopper and for weights that are fp8 already.
Twin of both: `reference_matmul.matmul`.
"""

import torch
from torch import Tensor

from ltxlite_kernels.card import card_of
from ltxlite_kernels.matmul import multiply, operands_of, output_of
from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows
from ltxlite_quant.formats import FormatError

LEAST_CAPABILITY = 89
# Of the largest codes of both sides, where fp16 sums: 64 products are at most 65472 < 65504.
# 28 on both, or activations of 2 beside weights as files hold them, up to 448.
LARGEST_PRODUCT = 1023.0


def matmul_fp8(
    a: ScaledRows,
    w: ScaledRows,
    bias: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply token rows by the rows of a weight, both e4m3.

    a: (M, K).  w: (N, K), of the same rotation; one scale for a whole weight is repeated N times.
    bias, epilogue, out, dtype: as of `matmul_int8.matmul_int8`.
    Tensor cores sum 64 or 128 products with 13 bits, and fp32 the rest: an error of 1e-4 beside
    3.7e-2 of the codes.  Raises FormatError if anything does not fit or the card has no fp8.
    """
    return _multiply("fp8", a, w, bias, epilogue, output_of(a, w, torch.float8_e4m3fn, out, dtype))


def matmul_fp8_capped(
    a: ScaledRows,
    w: ScaledRows,
    bias: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply as `matmul_fp8` does, summing 64 products in fp16: twice the rate on GeForce cards.

    The largest code of a times the largest of w must be at most 1023, or fp16 may overflow: 28
    each, or 2 for activations beside a weight as its file holds it.  That is not checked.
    """
    out = output_of(a, w, torch.float8_e4m3fn, out, dtype)
    return _multiply("fp8_capped", a, w, bias, epilogue, out)


def _multiply(
    kind: str,
    a: ScaledRows,
    w: ScaledRows,
    bias: Tensor | None,
    epilogue: Epilogue,
    out: Tensor,
) -> Tensor:
    if out.is_cuda and (found := card_of(out).capability) < LEAST_CAPABILITY:
        raise FormatError(
            f"tensor cores multiply fp8 from compute capability 8.9 on, this card has "
            f"{found / 10}; decode the weight and use --math int8 or fp16 instead"
        )
    return multiply(kind, operands_of(a, w), bias, epilogue, out)
