"""Which blocks are special, compiled: the twin of `special`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltxlite_quant import special
from ltxlite_quant.compiled import ONE, ZERO, compiled
from ltxlite_quant.special import RUN

QUARTER = np.float32(0.25)


def find_special(values: Tensor, largest: Tensor) -> Tensor:
    """Tell which blocks must be searched again; the twin of `special.find_special`."""
    found = np.empty(len(values), np.bool_)
    # Arguments: constants of another module would stay what they were when numba compiled this.
    given = (special.TINY, special.HUGE, special.APART**2, special.SMOOTH)
    limits = tuple(np.float32(limit) for limit in given)
    _find_special(values.contiguous().numpy(), largest.numpy(), limits, found)
    return torch.from_numpy(found)


@compiled
def _find_special(x: Any, largest: Any, limits: Any, found: Any) -> None:
    for block in range(len(x)):
        found[block] = _is_special(x[block], largest[block], limits)


@compiled
def _is_special(values: Any, largest: Any, limits: Any) -> Any:
    if largest == ZERO:
        return False
    tiny, huge, apart, smooth = limits
    energy, outlier = ZERO, largest * largest
    for i in range(len(values)):  # by an index: over the values, it takes 16 times as long
        energy += values[i] * values[i]
    if largest < tiny or largest > huge or outlier * len(values) > (energy - outlier) * apart:
        return True
    bends = ZERO
    for i in range(len(values) - 2):  # counted from 0, or it takes five times as long
        bend = values[i] + values[i + 2] - values[i + 1] - values[i + 1]
        bends += bend * bend
    same = ZERO  # fp32, like the values: integers of another size would not be vectorised
    for i in range(len(values)):
        same += ONE if abs(values[i]) == largest else ZERO
    for i in range(1, len(values)):
        same += ONE if values[i] == values[i - 1] else ZERO
    return bends * smooth < energy or same > len(values) // 4 or _has_narrow_run(values)


@compiled
def _has_narrow_run(values: Any) -> Any:
    for start in range(0, len(values), RUN):
        low = high = values[start]
        for i in range(start, start + RUN):
            low, high = min(low, values[i]), max(high, values[i])
        if max(low, -high) >= max(high, -low) * QUARTER:
            return True
    return False
