"""Launch configurations: chosen once, by measurement or static count, never tuned at run time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class DequantConfig:
    """How one format is decoded: blocks a program takes, its warps, bytes its loads align to."""

    blocks: int
    warps: int
    alignment: int


# A program takes 2048 elements, so that a thread of its four warps stores 16 values, two vectors of
# 16 bytes in bf16, whatever the format: at most 42 registers, no spills (kernels/README.md).
# Alignment: that of a block's widest load, which the size of a block must keep.
DEQUANT: Mapping[str, DequantConfig] = MappingProxyType(
    {
        "Q4_0": DequantConfig(blocks=64, warps=4, alignment=2),
        "Q4_1": DequantConfig(blocks=64, warps=4, alignment=4),
        "Q5_0": DequantConfig(blocks=64, warps=4, alignment=2),
        "Q5_1": DequantConfig(blocks=64, warps=4, alignment=4),
        "Q8_0": DequantConfig(blocks=64, warps=4, alignment=2),
        "Q2_K": DequantConfig(blocks=8, warps=4, alignment=4),
        "Q3_K": DequantConfig(blocks=8, warps=4, alignment=2),
        "Q4_K": DequantConfig(blocks=8, warps=4, alignment=4),
        "Q5_K": DequantConfig(blocks=8, warps=4, alignment=4),
        "Q6_K": DequantConfig(blocks=8, warps=4, alignment=2),
        "IQ4_NL": DequantConfig(blocks=64, warps=4, alignment=2),
        "IQ4_XS": DequantConfig(blocks=8, warps=4, alignment=4),
        "MXFP4": DequantConfig(blocks=64, warps=4, alignment=1),
        "NVFP4": DequantConfig(blocks=32, warps=4, alignment=4),
    }
)

# Blocks to int8: blocks a program takes of a format with `size` elements in one, and its warps.
# 2048 elements as above: eight groups of 256 to rotate.
INT8_ELEMENTS = 2048
INT8_WARPS = 4

# A row is rounded by one program that holds it in registers; the widest feed-forward has 16384.
LONGEST_ROW = 32768


def row_warps(width: int) -> int:
    """Return the warps for a row of `width` elements: 32 a thread, 64 beyond 16384."""
    return min(16, max(1, width // 1024))


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """Tiles of a matmul: (block_m, block_k) by (block_n, block_k), and who computes them.

    group: tile rows that run together, so that they share weights in the second-level cache.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int


# By compute capability: (from so many rows up, configuration), most rows first. Registers and
# shared memory are in benchmarks/compiled.json.
_AMPERE = (
    (1024, MatmulConfig(128, 128, 64, group=8, warps=8, stages=3)),
    (257, MatmulConfig(64, 128, 64, group=8, warps=4, stages=4)),
    (0, MatmulConfig(64, 64, 128, group=8, warps=4, stages=3)),
)
_HOPPER = (
    (2048, MatmulConfig(128, 256, 128, group=8, warps=8, stages=3)),
    (257, MatmulConfig(128, 128, 128, group=8, warps=8, stages=3)),
    (0, MatmulConfig(64, 64, 128, group=8, warps=4, stages=4)),
)
MATMUL_INT8: Mapping[int, tuple[tuple[int, MatmulConfig], ...]] = MappingProxyType(
    {80: _AMPERE, 86: _AMPERE, 89: _AMPERE, 90: _HOPPER, 120: _AMPERE}
)


def matmul_int8_config(capability: int, rows: int, adds: bool = False) -> MatmulConfig:
    """Return the configuration for a product of `rows` rows on a card: 86 is an RTX 3060.

    adds: a residual or gates of rows come in at the end, for which tiles of 256 columns have no
    registers left (312 spills on sm_90).
    A capability that has none of its own gets that of the next lower one.
    """
    known = max((one for one in MATMUL_INT8 if one <= capability), default=min(MATMUL_INT8))
    found = next(config for least, config in MATMUL_INT8[known] if rows >= least)
    return replace(found, block_n=min(found.block_n, 128)) if adds else found
