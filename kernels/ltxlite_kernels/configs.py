"""Launch configurations: chosen once, by measurement or static count, never tuned at run time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ltxlite_kernels.card import Card


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


# Consecutive tokens a program turns: they mostly share frame and row, so two of three angles are
# found in the first-level cache, and 24 KB of tables a token come from the second instead of 48.
ROPE_TOKENS = 4
ROPE_LOOPED = 1024  # tokens from which such programs still fill the card


def rope_warps(width: int) -> int:
    """Return the warps for a row that is turned: 16 values a thread and as many angles."""
    return min(16, max(1, width // 512))


# Channels that a program of `norm_silu` holds for each of its places.
MOST_CHANNELS = 2048


def norm_silu_places(channels: int) -> int:
    """Return the places a program takes: 8192 values, but no less than a sector of 32 bytes."""
    return max(16, 8192 >> (channels - 1).bit_length())


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """Tiles of a matmul: (block_m, block_k) by (block_n, block_k), and who computes them.

    group: tile rows that run together, so that they share weights in the second-level cache.
    half: the products of a step over K are summed in fp16, steps in fp32.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int
    half: bool = False

    def tiles(self, rows: int, features: int) -> int:
        """Return how many tiles a result (rows, features) has."""
        return -(-rows // self.block_m) * -(-features // self.block_n)


# Products of a step that fp16 may sum: 64 * 64 * 15.9 is below its largest number, 65504, and at
# every 64 of K the error is 4.4e-4, at all of 4096 2.4e-3 (kernels.md 0 and 5).
HALF_SUM = 64

# A matmul by the kind of its products and the compute capability: (from so many rows up,
# configuration), largest tiles first. fp16 sums double the rate of GeForce cards alone (86, 89,
# 120), so A100 and Hopper (80, 90) sum in fp32. Registers and shared memory are in
# benchmarks/compiled.json.
_INT8 = (
    (1024, MatmulConfig(128, 128, 64, group=8, warps=8, stages=3)),
    (257, MatmulConfig(64, 128, 64, group=8, warps=4, stages=4)),
    (0, MatmulConfig(64, 64, 128, group=8, warps=4, stages=3)),
)
_INT8_HOPPER = (
    (2048, MatmulConfig(128, 256, 128, group=8, warps=8, stages=3)),
    (257, MatmulConfig(128, 128, 128, group=8, warps=8, stages=3)),
    (0, MatmulConfig(64, 64, 128, group=8, warps=4, stages=4)),
)
_FP16 = (
    (1024, MatmulConfig(128, 128, 32, group=8, warps=8, stages=4)),
    (257, MatmulConfig(64, 128, 32, group=8, warps=4, stages=4)),
    (0, MatmulConfig(64, 64, 64, group=8, warps=4, stages=3)),
)
_FP16_GEFORCE = (
    (1024, MatmulConfig(128, 128, HALF_SUM, group=8, warps=8, stages=3, half=True)),
    (257, MatmulConfig(64, 128, HALF_SUM, group=8, warps=4, stages=3, half=True)),
    (0, MatmulConfig(64, 64, HALF_SUM, group=8, warps=4, stages=3, half=True)),
)
_FP16_HOPPER = (
    (2048, MatmulConfig(128, 256, 64, group=8, warps=8, stages=3)),
    (257, MatmulConfig(128, 128, 64, group=8, warps=8, stages=4)),
    (0, MatmulConfig(64, 64, 64, group=8, warps=4, stages=4)),
)
# With three stages, or 128 of K below 257 rows, a tail of K spills 8 times (sm_89) or 2 (sm_120).
_FP8 = (
    (1024, MatmulConfig(128, 128, 64, group=8, warps=8, stages=4)),
    (257, MatmulConfig(64, 128, 64, group=8, warps=4, stages=4)),
    (0, MatmulConfig(64, 64, 64, group=8, warps=4, stages=4)),
)
_FP8_HOPPER = (
    (257, MatmulConfig(128, 128, 128, group=8, warps=8, stages=3)),
    (0, MatmulConfig(64, 64, 128, group=8, warps=4, stages=4)),
)
_FP8_HALF = (
    (1024, MatmulConfig(128, 128, HALF_SUM, group=8, warps=8, stages=3, half=True)),
    (257, MatmulConfig(64, 128, HALF_SUM, group=8, warps=4, stages=4, half=True)),
    (0, MatmulConfig(64, 64, HALF_SUM, group=8, warps=4, stages=4, half=True)),
)
Table = Mapping[int, tuple[tuple[int, MatmulConfig], ...]]
MATMUL: Mapping[str, Table] = MappingProxyType(
    {
        "int8": {80: _INT8, 86: _INT8, 89: _INT8, 90: _INT8_HOPPER, 120: _INT8},
        "fp16": {
            **{80: _FP16, 86: _FP16_GEFORCE, 89: _FP16_GEFORCE},
            **{90: _FP16_HOPPER, 120: _FP16_GEFORCE},
        },
        "fp8": {89: _FP8, 90: _FP8_HOPPER, 120: _FP8},
        "fp8_capped": {89: _FP8_HALF, 90: _FP8_HOPPER, 120: _FP8_HALF},
    }
)
# A multiprocessor has four tensor cores, and two warps each hide the other's waiting.
FILLING_WARPS = 8
# A part of a split sum over K, so that writing and reading its fp32 result pays.
LEAST_PART = 2048


def matmul_config(
    kind: str, card: Card, rows: int, features: int, adds: bool = False
) -> MatmulConfig:
    """Return the configuration for a product (rows, features) on a card.

    The largest tiles that `rows` allow and that give each multiprocessor eight warps, else the
    smallest.  The audio stream has 126 rows in 5 s and 500 in 20; at 2048 features and 126 rows
    tiles of 64x64 are 64, of four warps: 2.7 to each of an RTX 4060's 24 multiprocessors, 2.3 on a
    3060's 28, where 64x128 would leave one to each.  At 500 rows they are 256, two to each of a
    4090's 128; at 126 a 4090 is filled by `matmul_parts`.  Smaller tiles than that gain nothing
    down to a single row: a weight's int8 takes 2.8 ps to read on a 3060 (1.0 on a 4090), its
    products with 64 rows 2.1 ps (0.32).
    adds: a residual or gates of rows come in at the end, for which tiles of 256 columns have no
    registers left (312 spills on sm_90).
    A capability that has none of its own gets that of the next lower one.
    """
    table = MATMUL[kind]
    known = max((one for one in table if one <= card.capability), default=min(table))
    fitting = [config for least, config in table[known] if rows >= least]
    if adds:
        fitting = [replace(one, block_n=min(one.block_n, 128)) for one in fitting]
    wanted = FILLING_WARPS * card.multiprocessors
    filling = (one for one in fitting if one.warps * one.tiles(rows, features) >= wanted)
    return next(filling, fitting[-1])


def matmul_parts(config: MatmulConfig, card: Card, shape: tuple[int, int], columns: int) -> int:
    """Return in how many parts to sum over K, where tiles of (M, N) leave a card half idle.

    Parts are at least 2048 of K.  The audio stream's last matmul (126 rows, K 8192, N 2048) has 64
    tiles: a 4090 takes four parts, 256 programs of 16 steps where 64 would take 64 each.  The
    4 MB of partial sums and the second launch cost a quarter of what that saves.  Cards of 24 to
    48 multiprocessors split none of its shapes.  (Counted, not measured.)
    """
    programs = config.warps * config.tiles(*shape)
    room = FILLING_WARPS * card.multiprocessors // max(1, programs)
    return max(1, min(room, columns // LEAST_PART))


# Head dims that have attention kernels; others, of test networks, are computed by the twins.
ATTENTION_HEAD_DIMS = (64, 128)
ATTENTION_PREPARE_WARPS = 4


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Tiles of attention: queries a program holds, keys it takes at a time, and who computes them.

    half_sums: products with the values of a tile are summed in fp16, tiles in fp32.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    half_sums: bool = False

    def tiles(self, queries: int) -> int:
        """Return how many tiles so many queries are."""
        return -(-queries // self.queries)


# By kind, compute capability, and (head dim, whether there is a bias): largest tiles first. Queries
# of video are many and have heads of 128; those of audio are few and have heads of 64. fp16 sums
# are no faster on A100 and Hopper (80, 90). Tiles of 64 keys with a bias spill on 90 and 120.
_HEADS_INT8 = {
    (128, False): (AttentionConfig(128, 64, warps=8, stages=3),),
    (128, True): (AttentionConfig(128, 64, warps=8, stages=3),),
    (64, False): (AttentionConfig(128, 64, warps=8, stages=3), AttentionConfig(64, 64, 4, 3)),
    (64, True): (AttentionConfig(128, 64, warps=8, stages=3), AttentionConfig(64, 64, 4, 3)),
}
_HEADS_GEFORCE = {
    key: tuple(replace(one, half_sums=True) for one in of) for key, of in _HEADS_INT8.items()
}
# triton 3.6 spills 10 registers of tiles of 64 keys on sm_80, 3.9 none.
_HEADS_AMPERE = _HEADS_INT8 | {(128, False): (AttentionConfig(128, 32, warps=8, stages=3),)}
_HEADS_HOPPER = _HEADS_INT8 | {(128, True): (AttentionConfig(128, 32, warps=8, stages=3),)}
_HEADS_BLACKWELL = _HEADS_GEFORCE | {
    (128, True): (AttentionConfig(128, 32, warps=8, stages=3, half_sums=True),)
}
_HEADS_FLASH = {
    **dict.fromkeys([(128, False), (128, True)], (AttentionConfig(128, 32, warps=8, stages=3),)),
    **dict.fromkeys(
        [(64, False), (64, True)],
        (AttentionConfig(128, 64, warps=8, stages=3), AttentionConfig(64, 32, 4, 3)),
    ),
}
Heads = Mapping[tuple[int, bool], tuple[AttentionConfig, ...]]
ATTENTION: Mapping[str, Mapping[int, Heads]] = MappingProxyType(
    {
        "int8": {
            **{80: _HEADS_AMPERE, 86: _HEADS_GEFORCE, 89: _HEADS_GEFORCE},
            **{90: _HEADS_HOPPER, 120: _HEADS_BLACKWELL},
        },
        "flash": dict.fromkeys((80, 86, 89, 90, 120), _HEADS_FLASH),
    }
)


def attention_config(
    kind: str, card: Card, head_dim: int, biased: bool, work: tuple[int, int]
) -> AttentionConfig:
    """Return the configuration for heads of `head_dim` on a card.

    kind: "int8" or "flash".  biased: something is added to scores.  work: queries, and heads
    of all samples.  The largest tiles that give each multiprocessor eight warps, else the smallest:
    32 heads of 126 audio queries are 64 tiles of 64.
    A capability that has none of its own gets that of the next lower one.
    """
    table = ATTENTION[kind]
    known = max((one for one in table if one <= card.capability), default=min(table))
    fitting = table[known][head_dim, biased]
    queries, heads = work
    wanted = FILLING_WARPS * card.multiprocessors
    filling = (one for one in fitting if one.warps * one.tiles(queries) * heads >= wanted)
    return next(filling, fitting[-1])
