"""Weights for the matmuls that need no rounding to int8: decoded to fp16, or as files hold them.

Stored int8 with a scale a row in ConvRot's rotation is what `matmul_int8` takes, and e4m3 with a
scale a row or a tensor what `matmul_fp8` takes: nothing is decoded, and there is no scratch.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ltxlite_kernels.dequant import dequantize
from ltxlite_kernels.int8_weight import plain_rows, row_scales, row_slices
from ltxlite_kernels.matmul_fp16 import LARGEST_WEIGHT
from ltxlite_kernels.reference import LARGEST_CODE
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import ScaledRows
from ltxlite_quant.formats import BlockFormat

# A row's largest weight in fp16, as it is: the last steps, 2^-24, then leave an error of at most
# 2^-15 of it, a sixteenth of what bf16 leaves at the largest.
SMALLEST_WEIGHT = 2.0**-10
Parts = Mapping[str, Tensor]


def fp16_scales(blocks: Tensor, block_format: BlockFormat, columns: int) -> Tensor | None:
    """Return powers of two, (N,) fp32, that bring rows into the range of `matmul_fp16`.

    None if all rows lie within it as they are: then one kernel decodes.  Waits for the card; to be
    called once a weight.  Arguments and errors: as of `int8_weight.int8_pieces`.
    """
    if block_format.is_quantized:
        largest = row_scales(blocks, block_format, columns) * LARGEST_CODE
    else:
        largest = plain_rows(blocks, block_format, columns).abs().amax(dim=1).float()
    largest = largest.masked_fill(largest < 1e-28, 1.0)  # rows of zeros
    if bool(((largest >= SMALLEST_WEIGHT) & (largest <= LARGEST_WEIGHT)).all()):
        return None
    return (largest / LARGEST_WEIGHT).log2().ceil().exp2()


def fp16_pieces(
    blocks: Tensor, block_format: BlockFormat, columns: int, scales: Tensor | None = None
) -> Iterator[tuple[slice, Tensor | ScaledRows]]:
    """Yield a weight for `matmul_fp16`, piece by piece, and where in the weight each piece lies.

    Blocks, K, scratch and errors: as of `int8_weight.int8_pieces`.  scales: of `fp16_scales`; with
    them pieces are ScaledRows, decoded by way of fp32.  F16 rows come in one piece, as they lie.
    """
    if block_format.dtype == torch.float16 and scales is None:
        yield slice(0, len(blocks)), plain_rows(blocks, block_format, columns)
        return
    scratch: Tensor | None = None
    for part in row_slices(len(blocks), columns * torch.float16.itemsize):
        if scratch is None:
            scratch = torch.empty(part.stop, columns, dtype=torch.float16, device=blocks.device)
        out = scratch[: part.stop - part.start]
        if scales is None:
            yield part, _values(blocks[part], block_format, out)
            continue
        wide = _values(blocks[part], block_format, torch.empty_like(out, dtype=torch.float32))
        out.copy_(wide.div_(scales[part, None]))
        yield part, ScaledRows(out, scales[part], Rotation.NONE)


def _values(blocks: Tensor, block_format: BlockFormat, out: Tensor) -> Tensor:
    if block_format.is_quantized:
        return dequantize(blocks, block_format, out.shape, out.dtype, out)
    return out.copy_(plain_rows(blocks, block_format, out.shape[1]))


def stored_int8(blocks: Tensor, block_format: BlockFormat, parts: Parts) -> ScaledRows | None:
    """Return a stored int8 weight as `matmul_int8` takes it, without copying its codes.

    blocks: (N, K) uint8.  parts: of the format (`ltxlite_quant.scaled`).
    None for all but INT8_CONVROT.  ConvRot in groups of 64 or 16 has no kernel that turns an
    activation alike.  Codes of INT8, not rotated, would need an activation that is not either, and
    its outliers would cost three times the error of rounding such a weight again, rotated.
    """
    if block_format.name != "INT8_CONVROT":
        return None
    Rotation.REGULAR_256.check(blocks.shape[1])
    scales = _row_scales(parts, len(blocks))
    if scales is None:
        return None
    return ScaledRows(blocks.view(torch.int8), scales, Rotation.REGULAR_256)


def stored_fp8(blocks: Tensor, block_format: BlockFormat, parts: Parts) -> ScaledRows | None:
    """Return a stored fp8 weight as `matmul_fp8` takes it, without copying its codes.

    blocks: (N, K) uint8.  parts: of the format: a scale for the tensor or one for each row.
    None for scales of groups of inputs (MXFP8) or of columns, which no product of whole rows can
    apply, and for e5m2, whose two bits of mantissa are better decoded.
    """
    if block_format.name == "F8_E4M3":
        scales: Tensor | None = torch.ones(len(blocks), device=blocks.device)
    elif block_format.name == "F8_E4M3_SCALED":
        scales = _row_scales(parts, len(blocks))
    else:
        return None
    if scales is None:
        return None
    return ScaledRows(blocks.view(torch.float8_e4m3fn), scales, Rotation.NONE)


def _row_scales(parts: Parts, rows: int) -> Tensor | None:
    scale = parts["scale"]
    if scale.shape[1] != 1 or "column_scale" in parts:
        return None
    return scale.float().expand(rows, 1).reshape(rows).contiguous()
