"""The twin of the matmuls in plain torch: what they mean, and what runs without Triton or a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows

# Sums of this many products of int8 codes stay below 2^24 and are exact in fp32, in any order.
EXACT_COLUMNS = 1024


def matmul(
    a: ScaledRows,
    w: ScaledRows | Tensor,
    bias: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply rows of any codes; see `matmul_int8`, `matmul_fp16` and `matmul_fp8`.

    The sum over K is exact for int8, in fp32 for others: products of fp16 and fp8 codes are exact
    in it, so the error is 2^-24 for each sum, in the order of torch's own matmul.
    """
    codes = w.codes if isinstance(w, ScaledRows) else w
    y = (
        _integers(a.codes, codes)
        if codes.dtype == torch.int8
        else a.codes.float() @ codes.float().T
    )
    y *= a.scales[:, None]
    if isinstance(w, ScaledRows):
        y *= w.scales[None, :]
    y = finished(y, bias, epilogue)
    return y.to(dtype) if out is None else out.copy_(y)


def finished(y: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    """Return what follows a product (M, N) fp32: bias, GELU, gate, residual; y may be written."""
    if bias is not None:
        y += bias
    if epilogue.gelu:
        y = F.gelu(y, approximate="tanh")
    if epilogue.gate is not None:
        gate = epilogue.gate.float()
        y *= gate if epilogue.index is None else gate[epilogue.index.long()]
    if epilogue.residual is not None:
        y += epilogue.residual
    return y


def _integers(a: Tensor, w: Tensor) -> Tensor:
    """Return a wᵀ of int8 codes, summed exactly and rounded to fp32 once."""
    total = torch.zeros(len(a), len(w), dtype=torch.int32, device=a.device)
    for first in range(0, a.shape[1], EXACT_COLUMNS):
        part = slice(first, first + EXACT_COLUMNS)
        total += (a[:, part].float() @ w[:, part].float().T).to(torch.int32)
    return total.float()
