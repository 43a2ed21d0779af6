"""Which arithmetic a product is computed in, as data: by mode, card and how a weight is stored.

Rates of the tensor cores differ by card: a GeForce multiplies int8 four times as fast as bf16,
fp16 with fp16 sums twice, fp8 twice; an H200 int8 and fp8 twice, fp16 not at all
(kernels.md 5; measured ones: `python -m benchmarks kernels`).
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Math(StrEnum):
    """How linears and long attention are computed; accumulation is never below what is said.

    AUTO   per card and stored format, the fastest that costs no visible quality: `AUTOMATIC`
    INT8   int8 with a scale a row, rotated; self-attention's scores in int8
    FP16   fp16, sums promoted to fp32 every 64 products: more exact than bf16
    FP8    weights stored in fp8 multiplied as they are; the rest as AUTO
    BF16   values in the dtype of the network, by cuBLAS and flash attention
    """

    AUTO = "auto"
    INT8 = "int8"
    FP16 = "fp16"
    FP8 = "fp8"
    BF16 = "bf16"


class Stored(StrEnum):
    """Kinds of stored weights that are treated alike."""

    BLOCKS = "blocks"  # GGUF and other packed formats: already off by more than int8 adds
    FP8 = "fp8"
    PLAIN = "plain"  # bf16, fp16, fp32


# From a compute capability on: the choice for each kind of weight. 80 and 90 are data-centre
# cards, which gain nothing by fp16 sums.
AUTOMATIC: Mapping[int, Mapping[Stored, Math]] = MappingProxyType(
    {
        80: {Stored.BLOCKS: Math.INT8, Stored.FP8: Math.INT8, Stored.PLAIN: Math.BF16},
        86: {Stored.BLOCKS: Math.INT8, Stored.FP8: Math.INT8, Stored.PLAIN: Math.FP16},
        89: {Stored.BLOCKS: Math.INT8, Stored.FP8: Math.INT8, Stored.PLAIN: Math.FP16},
        90: {Stored.BLOCKS: Math.INT8, Stored.FP8: Math.FP8, Stored.PLAIN: Math.BF16},
        120: {Stored.BLOCKS: Math.INT8, Stored.FP8: Math.INT8, Stored.PLAIN: Math.FP16},
    }
)
FP8_FROM = 89  # the first capability whose tensor cores take fp8
# Keys from which int8 scores pay for rounding the keys, a pass over them; shorter sequences take
# flash attention.
INT8_ATTENTION_FROM = 1024
_EXACT = (Math.BF16, Math.FP16)  # modes that must not round scores


def linear_math(mode: Math, capability: int | None, kind: Stored) -> Math:
    """Return how a linear is computed: INT8, FP16, FP8 or BF16.

    capability: of the card, 86 for an RTX 3060; None without a card or without Triton, where AUTO
    means BF16 and the other modes are computed by their twins.
    """
    if mode is Math.FP8 and kind is Stored.FP8:
        return Math.FP8
    if mode not in (Math.AUTO, Math.FP8):
        return mode
    if capability is None:
        return Math.BF16
    known = max((one for one in AUTOMATIC if one <= capability), default=min(AUTOMATIC))
    return AUTOMATIC[known][kind]


def attention_math(mode: Math, capability: int | None) -> Math:
    """Return how long self-attention is computed: INT8 scores, or BF16."""
    if mode in _EXACT or (mode is not Math.INT8 and capability is None):
        return Math.BF16
    return Math.INT8
