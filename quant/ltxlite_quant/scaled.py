"""Formats whose scales are tensors of their own: fp8, MXFP8, NVFP4, int8, bitsandbytes.

The scales and tables beside the blocks are called parts. A part is a matrix whose first dimension
is N, a row for each row of the weight, or 1, shared by all rows; so any rows decode alone. Only
`scale_tiles` differs: it stays in the order of NVIDIA's tensor cores, as files store it.
Source: formats.md 3. Bit-exact in fp32 to comfy-kitchen 0.2.40 (eager) and bitsandbytes 0.50.2;
ConvRot rounds once where comfy-kitchen rounds each partial sum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite_quant.decode import CPU_CHUNK_ELEMENTS
from ltxlite_quant.formats import BlockFormat, FormatError

Parts = Mapping[str, Tensor]

# Scales of 128 rows and 4 groups of inputs lie together in the tensor cores' order.
TILE_ROWS, TILE_COLUMNS = 128, 4
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How the rows of a format with parts decode.

    decode: (blocks (n, row_bytes) uint8, parts of these rows) -> (n, K) fp32.  parts: the ones it
    needs.  optional: the ones it may have.  group: inputs that share a scale of `scale_tiles`.
    padding: rows and columns are stored padded to a multiple of this.
    """

    decode: Callable[[Tensor, Parts], Tensor]
    parts: tuple[str, ...] = ("scale",)
    optional: tuple[str, ...] = ()
    group: int = 1
    padding: int = 1


def dequantize(
    blocks: Tensor,
    block_format: BlockFormat,
    parts: Parts,
    columns: int,
    dtype: torch.dtype,
    rows: slice = slice(None),
) -> Tensor:
    """Decode rows of a weight: (rows, K) in `dtype`; fp32 arithmetic, one rounding.

    blocks: (N, row_bytes) uint8.  parts: as the format's `Scaling` names them.  columns: K.
    """
    scaling = scaling_of(block_format)
    first, last, _ = rows.indices(len(blocks))
    blocks, parts = blocks[first:last], _rows_of(parts, first, last)
    out = torch.empty(len(blocks), columns, dtype=dtype, device=blocks.device)
    step = max(1, len(blocks))
    if blocks.device.type == "cpu":
        step = max(1, CPU_CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, len(blocks), step):
        some = slice(start, start + step)
        chosen = {name: part[some] if len(part) > 1 else part for name, part in parts.items()}
        values = scaling.decode(blocks[some], chosen)
        if "column_scale" in chosen:
            values *= chosen["column_scale"]
        out[some].copy_(values)
    return out


def scaling_of(block_format: BlockFormat) -> Scaling:
    """Return how a format decodes; FormatError for one without parts."""
    if block_format.name not in SCALINGS:
        raise FormatError(f"{block_format.name} has no scales beside its blocks")
    return SCALINGS[block_format.name]


def stored_shape(block_format: BlockFormat, shape: Sequence[int]) -> tuple[int, ...]:
    """Return a weight's shape with the padding that its format adds in files."""
    scaling = SCALINGS.get(block_format.name)
    if scaling is None or len(shape) != 2:
        return tuple(shape)
    return tuple(-(-size // scaling.padding) * scaling.padding for size in shape)


def tiles_shape(block_format: BlockFormat, shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the `scale_tiles` of a weight (N, K)."""
    groups = -(-shape[1] // scaling_of(block_format).group)
    return (
        -(-shape[0] // TILE_ROWS) * TILE_ROWS,
        -(-groups // TILE_COLUMNS) * TILE_COLUMNS,
    )


def untile(tiles: Tensor, first: int, last: int) -> Tensor:
    """Return rows `first` to `last` of tiled scales (rows, groups), in plain order.

    tiles: (R, C) with R a multiple of 128 and C of 4; element (r, c) lies at
    ((r//128) C/4 + c//4) 512 + (r%32) 16 + (r%128)//32 4 + c%4.
    """
    start, groups = first // TILE_ROWS * TILE_ROWS, tiles.shape[1]
    covering = tiles[start : -(-last // TILE_ROWS) * TILE_ROWS]
    split = covering.reshape(-1, groups // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    plain = split.permute(0, 3, 2, 1, 4).reshape(-1, groups)  # (tile, r//32, r%32, c//4, c%4)
    return plain[first - start : last - start]


def check_parts(block_format: BlockFormat, parts: Parts, shape: Sequence[int]) -> None:
    """Raise FormatError unless `parts` are those of a tensor of `shape` in this format."""
    scaling = SCALINGS.get(block_format.name)
    needed = set(scaling.parts) if scaling else set()
    allowed = needed | set(scaling.optional if scaling else ())
    if not needed <= parts.keys() <= allowed:
        raise FormatError(
            f"{block_format.name} needs the parts {sorted(needed)}, got {sorted(parts)}"
        )
    rows = math.prod(shape[:-1])
    for name, part in parts.items():
        fits = part.dim() == 2 and len(part) in (1, rows)
        if name == "scale_tiles":
            fits = part.dim() == 2 and _covers(part, block_format, shape)
        if not fits:
            raise FormatError(
                f"{block_format.name}: the part {name} {tuple(part.shape)} does not fit a tensor "
                f"of {tuple(shape)}"
            )


def _covers(tiles: Tensor, block_format: BlockFormat, shape: Sequence[int]) -> bool:
    wanted = tiles_shape(block_format, shape) if len(shape) == 2 else (math.inf, math.inf)
    multiples = tiles.shape[0] % TILE_ROWS == 0 and tiles.shape[1] % TILE_COLUMNS == 0
    return multiples and tiles.shape[0] >= wanted[0] and tiles.shape[1] >= wanted[1]


def _rows_of(parts: Parts, first: int, last: int) -> dict[str, Tensor]:
    chosen = {}
    for name, part in parts.items():
        if name == "scale_tiles":
            chosen[name] = untile(part, first, last)
        else:
            chosen[name] = part[first:last] if len(part) > 1 else part
    return chosen


def _by_group(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Multiply each `size` inputs of values (n, K) by one of scales (n, >= K / size)."""
    rows, columns = values.shape
    if columns % size == 0:
        groups = columns // size
        return values.view(rows, groups, size).mul_(scales[:, :groups, None]).view(rows, columns)
    return values.mul_(scales.repeat_interleave(size, dim=1)[:, :columns])


def _high_nibble_first(blocks: Tensor, table: Tensor) -> Tensor:
    """Look two codes a byte up in a table (16,): (n, 2 row_bytes) fp32."""
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)  # (256, 2)
    return pairs[blocks.int()].flatten(1)


def _plain_fp8(dtype: torch.dtype) -> Callable[[Tensor, Parts], Tensor]:
    return lambda blocks, parts: blocks.view(dtype).float()


def _scaled_fp8(dtype: torch.dtype) -> Callable[[Tensor, Parts], Tensor]:
    return lambda blocks, parts: blocks.view(dtype).float().mul_(parts["scale"])


def _mxfp8(blocks: Tensor, parts: Parts) -> Tensor:
    # A scale byte e is the exponent field of an fp32: 2**(e - 127), and 0 for 0.
    scales = (parts["scale_tiles"].int() << 23).view(torch.float32)
    return _by_group(blocks.view(torch.float8_e4m3fn).float(), scales, 32)


def _nvfp4(blocks: Tensor, parts: Parts) -> Tensor:
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=blocks.device)
    scales = parts["scale_tiles"].view(torch.float8_e4m3fn).float() * parts["scale"]
    return _by_group(_high_nibble_first(blocks, table), scales, 16)


def _int8(blocks: Tensor, parts: Parts) -> Tensor:
    return blocks.view(torch.int8).float().mul_(parts["scale"])


def _bnb_int8(blocks: Tensor, parts: Parts) -> Tensor:
    # Two roundings and the rounded reciprocal, as bitsandbytes does.
    return _int8(blocks, parts).mul_(1 / 127)


def _convrot(size: int) -> Callable[[Tensor, Parts], Tensor]:
    def decode(blocks: Tensor, parts: Parts) -> Tensor:
        codes = blocks.reshape(len(blocks), -1, size).view(torch.int8).float()
        # Sums of at most 256 products of int8 codes and signs are exact in fp32, in any order.
        turned = codes @ hadamard(size, blocks.device)
        return turned.flatten(1).mul_(parts["scale"] / math.isqrt(size))

    return decode


@lru_cache(maxsize=8)
def hadamard(size: int, device: torch.device) -> Tensor:
    """Return ConvRot's matrix of signs (size, size) fp32; over sqrt(size) it inverts itself."""
    four = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(1)
    signs = four
    while len(signs) < size:
        signs = torch.kron(signs, four)
    return signs


def _bnb_4bit(blocks: Tensor, parts: Parts) -> Tensor:
    values = _high_nibble_first(blocks, parts["code"][0])
    scales = parts["scale"]
    if "nested_scale" in parts:  # the scales are quantized themselves, to 8 bits
        spread = scales.shape[1] // parts["nested_scale"].shape[1]
        scales = parts["nested_code"][0][scales.int()]
        scales = _by_group(scales, parts["nested_scale"], spread) + parts["nested_offset"]
    return _by_group(values, scales, values.shape[1] // scales.shape[1])


_NESTED = ("nested_scale", "nested_code", "nested_offset")
_COLUMN = ("column_scale",)
SCALINGS: Mapping[str, Scaling] = MappingProxyType(
    {
        "F8_E4M3": Scaling(_plain_fp8(torch.float8_e4m3fn), parts=()),
        "F8_E5M2": Scaling(_plain_fp8(torch.float8_e5m2), parts=()),
        "F8_E4M3_SCALED": Scaling(_scaled_fp8(torch.float8_e4m3fn), optional=_COLUMN),
        "F8_E5M2_SCALED": Scaling(_scaled_fp8(torch.float8_e5m2), optional=_COLUMN),
        "MXFP8": Scaling(_mxfp8, ("scale_tiles",), _COLUMN, group=32, padding=32),
        "NVFP4_TILED": Scaling(_nvfp4, ("scale", "scale_tiles"), _COLUMN, group=16, padding=16),
        "INT8": Scaling(_int8, optional=_COLUMN),
        "INT8_CONVROT": Scaling(_convrot(256)),
        "INT8_CONVROT_64": Scaling(_convrot(64)),
        "INT8_CONVROT_16": Scaling(_convrot(16)),
        "BNB_INT8": Scaling(_bnb_int8),
        "BNB_NF4": Scaling(_bnb_4bit, ("scale", "code"), _NESTED),
        "BNB_FP4": Scaling(_bnb_4bit, ("scale", "code"), _NESTED),
    }
)
