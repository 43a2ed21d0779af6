"""The twins of kernels in plain torch: what they mean, and what runs without Triton or a GPU.

Each has the signature of its kernel's wrapper. The twin of `dequant` is the decoder itself,
`ltxlite_quant.decode.dequantize`; those of the matmuls are in `reference_matmul`,
those of what works on rows and leaves values as they are in `reference_rows`.
"""

import math

import torch
from torch import Tensor

from ltxlite_kernels.coding import Coding
from ltxlite_kernels.reference_rows import norm_modulate
from ltxlite_kernels.rotate import Rotation, matrix, signs
from ltxlite_kernels.rows import ScaledRows
from ltxlite_quant import decode
from ltxlite_quant.formats import BlockFormat

LARGEST_CODE = 127
SMALLEST = 1e-30  # a row of zeros needs a scale to divide by


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


def quantize_rows(x: Tensor, coding: Coding | Rotation = Rotation.NONE) -> ScaledRows:
    """Round rows to codes with a scale each; see `quantize.quantize_rows`."""
    coding = Coding.of(coding)
    values = rotate(x, coding.rotation)
    scales = _absmax(values)
    if coding.dtype == torch.float16:
        mantissas = scales.view(torch.int32) & 0x007FFFFF | 0x3F800000
        scales = scales / mantissas.view(torch.float32)
    scales = scales * coding.step
    if coding.dtype == torch.int8:
        codes = _codes(values, scales)
    else:
        codes = (values * (1 / scales)[:, None]).to(coding.dtype)
    return ScaledRows(codes, scales, coding.rotation)


def _absmax(values: Tensor) -> Tensor:
    return values.abs().amax(dim=1).clamp(min=SMALLEST)


def row_scales_of(values: Tensor) -> Tensor:
    """Return absmax / 127 of rows (R, K) fp32: (R,), NaN where a row holds NaN."""
    return _absmax(values) * (1 / LARGEST_CODE)


def _codes(values: Tensor, scales: Tensor) -> Tensor:
    scaled = (values * (1 / scales)[:, None]).round_()
    return scaled.nan_to_num_(0.0).clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)


def norm_modulate_quantize(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    eps: float,
    coding: Coding | Rotation = Rotation.NONE,
) -> ScaledRows:
    """Norm, modulate and round rows; see `quantize.norm_modulate_quantize`."""
    return quantize_rows(norm_modulate(x.float(), shift, scale, index, eps), coding)


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
