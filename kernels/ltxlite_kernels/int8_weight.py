"""Weights as row-scaled int8: from raw blocks of any format, rotated or not, in one pass.

The scales of a weight are computed once, `row_scales`, and kept: 4 bytes a row, 18 MB for all of
LTX-2.3. With them `int8_codes` writes int8 straight from the blocks, whenever they are needed.
Twins: `reference.row_scales`, `reference.int8_codes`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import quantize, reference, rotate
from ltxlite_kernels.configs import DEQUANT, INT8_ELEMENTS, INT8_WARPS
from ltxlite_kernels.rotate import HAVE_TRITON, Rotation
from ltxlite_kernels.rows import ScaledRows
from ltxlite_quant import decode
from ltxlite_quant.formats import FORMATS, BlockFormat, FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from ltxlite_kernels import unpack

# The most int8 a piece of a weight takes: it stays in the second-level cache of an Ada card, and
# the matmul loses nothing at LTX token counts (kernels/README.md).
SCRATCH_BYTES = 32 << 20
ROW_MULTIPLE = 256  # rows of a piece but the last, so that tiles of the matmul are whole


def int8_pieces(
    blocks: Tensor,
    block_format: BlockFormat,
    columns: int,
    rotation: Rotation = Rotation.NONE,
    scales: Tensor | None = None,
) -> Iterator[tuple[slice, ScaledRows]]:
    """Yield a weight as int8 rows, piece by piece, and where in the weight each piece lies.

    blocks: (N, row_bytes) uint8, contiguous; or rows (N, K) themselves of a plain format (F32, F16,
    BF16).  columns: K.  scales: (N,) fp32 from `row_scales`, computed if None; a plain weight needs
    none.  Without rotation, codes and scales have the bits of the twin.
    Pieces of a quantized weight lie in the same memory of at most SCRATCH_BYTES, one after the
    other: use one before the next comes, on the same stream.
    Raises FormatError if blocks, format, K and rotation do not fit.
    """
    scratch: Tensor | None = None
    for part in row_slices(len(blocks), columns):
        if scratch is None and block_format.is_quantized:
            scratch = torch.empty(part.stop, columns, dtype=torch.int8, device=blocks.device)
        some = None if scales is None else scales[part]
        out = None if scratch is None else scratch[: part.stop - part.start]
        yield part, _int8(blocks[part], block_format, columns, rotation, some, out)


def int8_rows(
    blocks: Tensor,
    block_format: BlockFormat,
    columns: int,
    rotation: Rotation = Rotation.NONE,
    scales: Tensor | None = None,
) -> ScaledRows:
    """Decode a weight as `int8_pieces` does, at once."""
    return _int8(blocks, block_format, columns, rotation, scales, None)


def row_slices(rows: int, row_bytes: int) -> Iterator[slice]:
    """Cut `rows` rows of `row_bytes` decoded bytes into pieces of at most SCRATCH_BYTES."""
    fitting = SCRATCH_BYTES // row_bytes
    step = max(1, fitting // ROW_MULTIPLE * ROW_MULTIPLE or fitting)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _int8(
    blocks: Tensor,
    block_format: BlockFormat,
    columns: int,
    rotation: Rotation,
    scales: Tensor | None,
    codes: Tensor | None,
) -> ScaledRows:
    if not block_format.is_quantized:
        return quantize.quantize_rows(plain_rows(blocks, block_format, columns), rotation)
    if scales is None:
        scales = row_scales(blocks, block_format, columns, rotation)
    if codes is None:
        codes = torch.empty(len(blocks), columns, dtype=torch.int8, device=blocks.device)
    return int8_codes(blocks, block_format, scales, ScaledRows(codes, scales, rotation))


def row_scales(
    blocks: Tensor, block_format: BlockFormat, columns: int, rotation: Rotation = Rotation.NONE
) -> Tensor:
    """Return what `int8_codes` divides rows by: absmax / 127 of each, rotated, (N,) fp32.

    Arguments and errors as of `int8_pieces`, for quantized formats.
    """
    _check(blocks, block_format, columns, rotation)
    scales = torch.empty(len(blocks), dtype=torch.float32, device=blocks.device)
    torch.ops.ltxlite.row_scales.default(blocks, block_format.name, columns, int(rotation), scales)
    return scales


def int8_codes(
    blocks: Tensor, block_format: BlockFormat, scales: Tensor, out: ScaledRows
) -> ScaledRows:
    """Decode blocks (N, row_bytes) of a quantized format into `out`, by scales (N,).

    Codes are value / scale, rounded half to even and held within ±127.  Returns `out`, whose scales
    may be the given ones.
    """
    rows, columns = out.codes.shape
    _check(blocks, block_format, columns, out.rotation)
    if scales.shape != (len(blocks),) or rows != len(blocks) or not out.codes.is_contiguous():
        raise FormatError(
            f"scales (N,) and contiguous codes (N, K) of {len(blocks)} rows, got "
            f"{tuple(scales.shape)} and {tuple(out.codes.shape)}"
        )
    torch.ops.ltxlite.int8_codes.default(
        blocks, block_format.name, scales, int(out.rotation), out.codes
    )
    if out.scales is not scales:
        out.scales.copy_(scales)
    return out


def plain_rows(rows: Tensor, block_format: BlockFormat, columns: int) -> Tensor:
    """Return rows of a plain format, perhaps given as bytes, (N, K); FormatError for others."""
    if rows.dtype == torch.uint8 and block_format.dtype is not None:
        rows = rows.view(block_format.dtype)
    if rows.dtype != block_format.dtype or rows.dim() != 2 or rows.shape[1] != columns:
        raise FormatError(
            f"rows of {block_format.name} with K = {columns} expected, got {tuple(rows.shape)} "
            f"{rows.dtype}"
        )
    return rows


def _check(blocks: Tensor, block_format: BlockFormat, columns: int, rotation: Rotation) -> None:
    decode.decoder_of(block_format)
    decode.check_blocks(blocks, block_format, (len(blocks), columns))
    rotation.check(columns)
    alignment = DEQUANT[block_format.name].alignment if block_format.name in DEQUANT else 1
    if not blocks.is_contiguous() or (not blocks.is_meta and blocks.data_ptr() % alignment):
        raise FormatError(
            f"{block_format.name} blocks must be contiguous and start at a multiple of "
            f"{alignment} bytes"
        )


def _scales_into(blocks: Tensor, name: str, columns: int, rotation: int, scales: Tensor) -> None:
    if not quantize.runs_kernel(blocks):
        scales.copy_(reference.row_scales(blocks, FORMATS[name], columns, Rotation(rotation)))
    elif len(blocks):
        per_row = columns // FORMATS[name].block_size
        with torch.cuda.device_of(blocks):
            _scales[(len(blocks),)](blocks, scales, per_row, **constants(name, rotation))


def _codes_into(blocks: Tensor, name: str, scales: Tensor, rotation: int, codes: Tensor) -> None:
    if not quantize.runs_kernel(blocks):
        out = ScaledRows(codes, torch.empty_like(scales), Rotation(rotation))
        reference.int8_codes(blocks, FORMATS[name], scales, out)
    elif codes.numel():
        per_row = codes.shape[1] // unit_of(name, rotation)
        grid = (triton.cdiv(codes.numel(), INT8_ELEMENTS),)
        with torch.cuda.device_of(blocks):
            _codes[grid](
                blocks, scales, codes, len(blocks) * per_row, per_row,
                **constants(name, rotation), UNIT=unit_of(name, rotation),
            )  # fmt: skip


def unit_of(name: str, rotation: int) -> int:
    """Return how many elements have one row for certain: a rotated group or a block."""
    return int(rotation) or FORMATS[name].block_size


def constants(name: str, rotation: int) -> dict[str, Any]:
    """Return what the kernels of this file are compiled for."""
    block_format = FORMATS[name]
    return {
        "UNPACK": getattr(unpack, name.lower()),
        "BYTES": block_format.block_bytes,
        "SIZE": block_format.block_size,
        "BLOCKS": INT8_ELEMENTS // block_format.block_size,
        "ROTATION": int(rotation),
        "num_warps": INT8_WARPS,
        "enable_fp_fusion": False,  # d * q - m has the bits of the decoder
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define(
    "row_scales(Tensor blocks, str block_format, int columns, int rotation, Tensor(a!) scales) "
    "-> ()"
)
_library.define(
    "int8_codes(Tensor blocks, str block_format, Tensor scales, int rotation, Tensor(a!) codes) "
    "-> ()"
)
_library.impl("row_scales", _scales_into, "CompositeExplicitAutograd")
_library.impl("int8_codes", _codes_into, "CompositeExplicitAutograd")
for _name in ("row_scales", "int8_codes"):
    _library.impl(_name, lambda *_: None, "Meta")


if HAVE_TRITON:

    @triton.jit
    def _scales(
        blocks,
        scales,
        per_row,
        UNPACK: tl.constexpr,  # noqa: N803
        BYTES: tl.constexpr,  # noqa: N803
        SIZE: tl.constexpr,  # noqa: N803
        BLOCKS: tl.constexpr,  # noqa: N803
        ROTATION: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        GROUPS: tl.constexpr = BLOCKS * SIZE // 256  # noqa: N806
        offs = tl.arange(0, GROUPS)[:, None] * 256 + tl.arange(0, 256)[None, :]
        found = 0.0
        for first in range(0, per_row, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            values = UNPACK(blocks + (row * per_row + block) * BYTES, block < per_row)
            values = tl.reshape(values, (GROUPS, 256))
            largest = _maximum(values)
            if ROTATION:
                power = quantize.power_of_two(largest)
                scaled = values * tl.div_rn(1.0, power)
                turned = rotate.rotated(scaled, first * SIZE + offs, ROTATION)
                largest = _maximum(turned) * (power * quantize.root(ROTATION))
            found = tl.maximum(found, largest, propagate_nan=tl.PropagateNan.ALL)
        found = quantize.as_largest(quantize.largest_bits(found))
        tl.store(scales + row, found * quantize.INVERSE)

    @triton.jit
    def _maximum(values):
        return quantize.as_largest(tl.max(tl.max(quantize.largest_bits(values), 1), 0))

    @triton.jit
    def _codes(
        blocks,
        scales,
        codes,
        units,
        per_row,
        UNPACK: tl.constexpr,  # noqa: N803
        BYTES: tl.constexpr,  # noqa: N803
        SIZE: tl.constexpr,  # noqa: N803
        BLOCKS: tl.constexpr,  # noqa: N803
        ROTATION: tl.constexpr,  # noqa: N803
        UNIT: tl.constexpr,  # noqa: N803
    ):
        COUNT: tl.constexpr = BLOCKS * SIZE // UNIT  # noqa: N806
        unit = tl.program_id(0) * COUNT + tl.arange(0, COUNT)  # (COUNT,) below 2^31 by far
        mask = unit < units
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block * SIZE < units.to(tl.int64) * UNIT
        values = tl.reshape(UNPACK(blocks + block * BYTES, inside), (COUNT, UNIT))
        scale = tl.load(scales + unit // per_row, mask=mask, other=1.0)
        factor = tl.div_rn(1.0, scale)
        if ROTATION:
            # Values are below √size * 127 scales, so by this power they lie within ±256.
            power = quantize.power_of_two(scale * 127.0)
            values = values * tl.div_rn(1.0, power)[:, None]
            columns = (unit % per_row)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
            groups: tl.constexpr = BLOCKS * SIZE // 256
            columns = tl.reshape(columns, (groups, 256))
            values = rotate.rotated(tl.reshape(values, (groups, 256)), columns, ROTATION)
            values = tl.reshape(values, (COUNT, UNIT))
            factor = tl.div_rn(power * quantize.root(ROTATION), scale)
        offs = unit[:, None].to(tl.int64) * UNIT + tl.arange(0, UNIT)[None, :]
        tl.store(codes + offs, quantize.coded(values * factor[:, None]), mask=mask[:, None])
