"""Values to formats whose scales are tensors of their own (see `scaled`), by the plain rules.

Codes and scales equal those of comfy-kitchen 0.2.40 (eager) for fp32 input. Source: formats.md 3.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite_quant.formats import BlockFormat, FormatError
from ltxlite_quant.scaled import E2M1, TILE_COLUMNS, TILE_ROWS, hadamard, stored_shape, tiles_shape
from ltxlite_quant.tensor import QuantTensor

Encoded = tuple[Tensor, dict[str, Tensor]]


def quantize_scaled(values: Tensor, block_format: BlockFormat) -> QuantTensor:
    """Quantize a weight (N, K), padded as the format asks; `cropped` takes the padding off again.

    Raises FormatError for other shapes, values that are not finite and formats without an encoder.
    """
    encode = ENCODERS.get(block_format.name)
    if encode is None or values.dim() != 2:
        raise FormatError(
            f"ltxlite quantizes matrices to {', '.join(ENCODERS)}, not a tensor of "
            f"{tuple(values.shape)} to {block_format.name}"
        )
    values = values.detach().float()
    if not values.isfinite().all():
        raise FormatError(f"{block_format.name} cannot hold NaN or infinity")
    rows, columns = stored_shape(block_format, values.shape)
    values = _padded(values, rows, columns)
    codes, parts = encode(values, block_format)
    return QuantTensor(codes.view(torch.uint8), block_format, (rows, columns), parts)


def tile(scales: Tensor, block_format: BlockFormat, shape: tuple[int, int]) -> Tensor:
    """Lay scales (N, groups) of a weight (N, K) out in the tensor cores' order, padded by zeros."""
    rows, groups = tiles_shape(block_format, shape)
    split = _padded(scales, rows, groups).view(
        rows // TILE_ROWS, 4, 32, groups // TILE_COLUMNS, TILE_COLUMNS
    )
    return split.permute(0, 3, 2, 1, 4).reshape(rows, groups)


def _fp8(dtype: torch.dtype) -> Callable[[Tensor, BlockFormat], Encoded]:
    def encode(values: Tensor, block_format: BlockFormat) -> Encoded:
        largest = torch.finfo(dtype).max
        scale = (values.abs().amax() / largest).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (values * scale.reciprocal()).clamp(-largest, largest)
        return codes.to(dtype), {"scale": scale.view(1, 1)}

    return encode


def _int8(values: Tensor, block_format: BlockFormat) -> Encoded:
    scale = (values.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)  # (N, 1)
    return (values / scale).round().clamp(-128, 127).to(torch.int8), {"scale": scale}


def _convrot(values: Tensor, block_format: BlockFormat) -> Encoded:
    size = block_format.block_size
    signs = hadamard(size, values.device) / math.isqrt(size)
    return _int8((values.unflatten(1, (-1, size)) @ signs).flatten(1), block_format)


def _mxfp8(values: Tensor, block_format: BlockFormat) -> Encoded:
    grouped = values.unflatten(1, (-1, 32))
    largest = grouped.abs().amax(dim=2)  # (N, K / 32)
    exponent = (largest / 448).clamp(min=2.0**-127).log2().ceil().clamp(-127, 127).int() + 127
    exponent.masked_fill_(largest == 0, 0)
    scale = torch.where(exponent > 0, exponent << 23, 1 << 23).view(torch.float32)
    codes = (grouped / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(1)
    return codes, {"scale_tiles": tile(exponent.to(torch.uint8), block_format, _matrix(values))}


def _nvfp4(values: Tensor, block_format: BlockFormat) -> Encoded:
    grouped = values.unflatten(1, (-1, 16))
    tensor_scale = values.abs().amax() / (448 * 6)
    scale = (grouped.abs().amax(dim=2) / 6 / tensor_scale).nan_to_num(0).clamp(max=448)
    stored = scale.to(torch.float8_e4m3fn)  # (N, K / 16)
    total = (stored.float() * tensor_scale)[..., None]
    ratios = torch.where(total == 0, 0.0, grouped / total).flatten(1)
    codes = _e2m1(ratios)
    parts = {
        "scale": tensor_scale.view(1, 1),
        "scale_tiles": tile(stored.view(torch.uint8), block_format, _matrix(values)),
    }
    return codes[:, ::2] << 4 | codes[:, 1::2], parts


def _e2m1(values: Tensor) -> Tensor:
    """Round to the nearest 4-bit float, ties to the even code."""
    magnitudes, codes = values.abs(), torch.zeros_like(values, dtype=torch.uint8)
    for code, (low, high) in enumerate(itertools.pairwise(E2M1)):
        middle = (low + high) / 2
        codes += magnitudes >= middle if code % 2 else magnitudes > middle
    return codes | values.signbit().to(torch.uint8) << 3


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    out = values.new_zeros(rows, columns)
    out[: values.shape[0], : values.shape[1]] = values
    return out


def _matrix(values: Tensor) -> tuple[int, int]:
    return values.shape[0], values.shape[1]


ENCODERS: Mapping[str, Callable[[Tensor, BlockFormat], Encoded]] = MappingProxyType(
    {
        "F8_E4M3_SCALED": _fp8(torch.float8_e4m3fn),
        "F8_E5M2_SCALED": _fp8(torch.float8_e5m2),
        "MXFP8": _mxfp8,
        "NVFP4_TILED": _nvfp4,
        "INT8": _int8,
        "INT8_CONVROT": _convrot,
        "INT8_CONVROT_64": _convrot,
        "INT8_CONVROT_16": _convrot,
    }
)
