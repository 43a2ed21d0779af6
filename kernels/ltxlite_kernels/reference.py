"""The twins of kernels in plain torch: what they mean, and what runs without Triton or a GPU.

Each has the signature of its kernel's wrapper. The twin of `dequant` is the decoder itself,
`ltxlite_quant.decode.dequantize`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxlite_kernels.rotate import Rotation, matrix, signs
from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows
from ltxlite_quant import decode
from ltxlite_quant.formats import BlockFormat

LARGEST_CODE = 127
SMALLEST = 1e-30  # a row of zeros needs a scale to divide by
# Sums of this many products of codes stay below 2^24 and are exact in fp32, in any order.
EXACT_COLUMNS = 1024


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn rows (..., K) by a rotation, in fp32; returns fp32."""
    wide = x.float()
    if rotation is Rotation.NONE:
        return wide
    if rotation is Rotation.SIGNS_128:
        wide = wide * signs(x.shape[-1], x.device)
    groups: Tensor = wide.unflatten(-1, (-1, int(rotation)))
    turned = groups @ matrix(rotation, x.device) / math.sqrt(rotation)
    return turned.flatten(-2)


def quantize_rows(x: Tensor, rotation: Rotation = Rotation.NONE) -> ScaledRows:
    """Round rows to int8 with a scale each; see `quantize.quantize_rows`."""
    values = rotate(x, rotation)
    scales = row_scales_of(values)
    return ScaledRows(_codes(values, scales), scales, rotation)


def row_scales_of(values: Tensor) -> Tensor:
    """Return absmax / 127 of rows (R, K) fp32: (R,), NaN where a row holds NaN."""
    return values.abs().amax(dim=1).clamp(min=SMALLEST) * (1 / LARGEST_CODE)


def _codes(values: Tensor, scales: Tensor) -> Tensor:
    scaled = (values * (1 / scales)[:, None]).round_()
    return scaled.nan_to_num_(0.0).clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)


def norm_modulate_quantize(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    eps: float,
    rotation: Rotation = Rotation.NONE,
) -> ScaledRows:
    """Norm, modulate and round rows; see `quantize.norm_modulate_quantize`."""
    wide = x.float()
    wide = wide * (wide.square().mean(dim=1, keepdim=True) + eps).rsqrt()
    if shift is not None and scale is not None:
        if index is not None:
            shift, scale = shift[index.long()], scale[index.long()]
        wide = wide * (1 + scale.float()) + shift.float()
    return quantize_rows(wide, rotation)


def row_scales(
    blocks: Tensor, block_format: BlockFormat, columns: int, rotation: Rotation = Rotation.NONE
) -> Tensor:
    """Return the scales of a weight's rows; see `int8_weight.row_scales`."""
    values = decode.dequantize(blocks, block_format, (len(blocks), columns), torch.float32)
    return row_scales_of(rotate(values, rotation))


def int8_codes(
    blocks: Tensor, block_format: BlockFormat, scales: Tensor, out: ScaledRows
) -> ScaledRows:
    """Decode blocks to int8 rows; see `int8_weight.int8_codes`."""
    values = decode.dequantize(blocks, block_format, out.codes.shape, torch.float32)
    out.codes.copy_(_codes(rotate(values, out.rotation), scales))
    out.scales.copy_(scales)
    return out


def matmul_int8(
    a: ScaledRows,
    w: ScaledRows,
    bias: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply int8 rows; see `matmul_int8.matmul_int8`."""
    y = _product(a.codes, w.codes) * a.scales[:, None] * w.scales[None, :]
    if bias is not None:
        y += bias
    if epilogue.gelu:
        y = F.gelu(y, approximate="tanh")
    if epilogue.gate is not None:
        gate = epilogue.gate.float()
        y *= gate if epilogue.index is None else gate[epilogue.index.long()]
    if epilogue.residual is not None:
        y += epilogue.residual
    return y.to(dtype) if out is None else out.copy_(y)


def _product(a: Tensor, w: Tensor) -> Tensor:
    """Return a wᵀ of codes, summed exactly and rounded to fp32 once."""
    total = torch.zeros(len(a), len(w), dtype=torch.int32, device=a.device)
    for first in range(0, a.shape[1], EXACT_COLUMNS):
        part = slice(first, first + EXACT_COLUMNS)
        total += (a[:, part].float() @ w[:, part].float().T).to(torch.int32)
    return total.float()
