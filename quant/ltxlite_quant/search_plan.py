"""What a search may do: the shape of a format's scales, and how hard to look for them.

Two kinds of block.  Affine (Q2_K, Q4_K, Q5_K): value = (d * scale) * code - dmin * minimum.
Scaled (Q3_K, Q6_K, IQ4): value = (d * scale) * level, where a code is the index of a level.
Scales and minimums are integers of a few bits; d and dmin are fp16, one a block.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import Tensor

from ltxlite_quant.decode_codebook import IQ4_VALUES

Effort = Literal["default", "high"]
# "special" is for the few blocks whose loss hangs on how d happens to round to fp16: constants, one
# outlier, almost nothing.  It starts from more d; these two reach all but 1 dB of what fifteen do.
Patience = Literal["default", "high", "special"]


class AffinePlan(NamedTuple):
    """A search for scales and minimums.

    widths, shifts: of the code range to begin with, over the range of the group's values.
    refits: least-squares steps from each.  scale_divisors, minimum_divisors: largest integer that
    d and dmin may begin with.  rounds: searches for integers, each followed by a fit of d and dmin.
    """

    group: int
    highest_code: float
    highest_scale: float
    widths: tuple[float, ...]
    shifts: tuple[float, ...]
    refits: int
    scale_divisors: tuple[float, ...]
    minimum_divisors: tuple[float, ...]
    rounds: int


class ScaledPlan(NamedTuple):
    """A search for signed scales.

    levels: what codes mean, ascending.  starts: scales to begin with, over the group's value of
    largest magnitude.  divisors: integers that the largest scale may begin with.
    nearby: integers to try beside the nearest.  The rest as in `AffinePlan`.
    """

    group: int
    levels: tuple[float, ...]
    lowest_scale: float
    highest_scale: float
    starts: tuple[float, ...]
    refits: int
    divisors: tuple[float, ...]
    nearby: tuple[float, ...]
    rounds: int


class AffineScales(NamedTuple):
    """Scales of n blocks of G groups: d, dmin (n,) fp16 values; scales, minimums (n, G) integers.

    All are fp32.
    """

    d: Tensor
    dmin: Tensor
    scales: Tensor
    minimums: Tensor


class Scales(NamedTuple):
    """Scales of n blocks of G groups: d (n,) fp16 values, scales (n, G) integers; all fp32."""

    d: Tensor
    scales: Tensor


def _even(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(low + (high - low) * i / (count - 1) for i in range(count))


def _affine(
    group: int, highest_code: int, highest_scale: int, widths: tuple[float, float]
) -> dict[Patience, AffinePlan]:
    top = float(highest_scale)
    three = (top, top - 0.5, top - 1.0)
    two = (top, top * 0.8)
    given = (group, float(highest_code), top)
    return {
        "default": AffinePlan(
            *given, _even(*widths, 5), (-0.02, 0.0, 0.02), 1, three[:1], three[:1], 2
        ),
        "high": AffinePlan(
            *given, _even(*widths, 12), (-0.03, -0.015, 0.0, 0.015, 0.03), 2, three, three[:1], 3
        ),
        "special": AffinePlan(*given, _even(*widths, 5), (-0.02, 0.0, 0.02), 1, two, two, 2),
    }


def _scaled(
    group: int,
    levels: tuple[float, ...],
    scales: tuple[int, int],
    widths: tuple[float, float],
) -> dict[Patience, ScaledPlan]:
    low, high = map(float, scales)
    given = (group, levels, low, high)
    ends = (levels[0], levels[-1])

    def starts(count: int) -> tuple[float, ...]:
        return tuple(width / end for end in ends for width in _even(*widths, count))

    nearby = (0.0, -1.0, 1.0)
    if low == high:
        ratios = tuple(level / levels[0] for level in levels)
        return {
            "default": ScaledPlan(*given, starts(8), 2, (low,), nearby[:1], 2),
            "high": ScaledPlan(*given, starts(16), 3, (low,), nearby[:1], 3),
            "special": ScaledPlan(*given, starts(8), 2, (low, *ratios), nearby[:1], 2),
        }
    six = tuple(end + step for step in (0.0, 0.5, 1.0) for end in (low, -low - step * 2 - 0.5))
    four = (low, low * 0.7, high, high * 0.7)
    return {
        "default": ScaledPlan(*given, starts(4), 1, (low,), nearby, 2),
        "high": ScaledPlan(*given, starts(12), 3, six, nearby, 3),
        "special": ScaledPlan(*given, starts(4), 1, four, nearby, 2),
    }


def _integers(low: int, high: int) -> tuple[float, ...]:
    return tuple(float(i) for i in range(low, high + 1))


_IQ4 = tuple(float(value) for value in IQ4_VALUES)
PLANS: Mapping[str, Mapping[Patience, AffinePlan | ScaledPlan]] = MappingProxyType(
    {
        "Q2_K": _affine(16, 3, 15, (0.65, 1.05)),
        "Q3_K": _scaled(16, _integers(-4, 3), (-32, 31), (0.7, 1.2)),
        "Q4_K": _affine(32, 15, 63, (0.88, 1.1)),
        "Q5_K": _affine(32, 31, 63, (0.9, 1.08)),
        "Q6_K": _scaled(16, _integers(-32, 31), (-128, 127), (0.9, 1.1)),
        "IQ4_NL": _scaled(32, _IQ4, (1, 1), (0.7, 1.2)),
        "IQ4_XS": _scaled(32, _IQ4, (-32, 31), (0.7, 1.2)),
    }
)
