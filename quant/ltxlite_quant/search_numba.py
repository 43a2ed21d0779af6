"""The search for scales, compiled: the twin of `search_torch`, one block at a time.

Imported when first needed, and of use only where numba is installed.  It differs from its twin in
the order of sums alone.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltxlite_quant.compiled import HALF, ONE, ZERO, Floats, compiled
from ltxlite_quant.decode_codebook import IQ4_VALUES
from ltxlite_quant.search_plan import AffinePlan, AffineScales, ScaledPlan, Scales
from ltxlite_quant.search_torch import FP16_MAX, FP16_TINY, SINGULAR, are_integers
from ltxlite_quant.special_numba import find_special as find_special

STEPS = (ZERO, -ONE, ONE)
IQ4_LEVELS = np.array(IQ4_VALUES, np.float32)
IQ4_MIDDLES = (IQ4_LEVELS[1:] + IQ4_LEVELS[:-1]) / 2
IQ4_STEPS = IQ4_LEVELS[1:] - IQ4_LEVELS[:-1]
SMALLEST = np.float32(1e-37)  # of what is smaller, the inverse may overflow
NOISE = np.float32(SINGULAR)
WORST = np.float32(3e38)


class _Affine(NamedTuple):
    highest_code: np.float32
    highest_scale: np.float32
    widths: Floats
    shifts: Floats
    refits: int
    scale_divisors: Floats
    minimum_divisors: Floats
    rounds: int


class _Levels(NamedTuple):
    are_integers: bool
    lowest: np.float32
    highest: np.float32


class _Scaled(NamedTuple):
    levels: _Levels
    lowest_scale: np.float32
    highest_scale: np.float32
    starts: Floats
    refits: int
    divisors: Floats
    nearby: Floats
    rounds: int


def search_affine(values: Tensor, weights: Tensor, plan: AffinePlan) -> AffineScales:
    """Find scales and minimums of least weighted squared error.

    values, weights: (n, 256) fp32 on a CPU; weights of one row serve all blocks.
    """
    x, w = _groups(values, plan.group), _groups(weights, plan.group)
    d, integers = np.empty((len(x), 2), np.float32), np.empty((len(x), 2, x.shape[1]), np.float32)
    settings = _Affine(*(_as_float32(item) for item in plan[1:]))
    _affine_blocks(x, w, settings, d, integers)
    return AffineScales(*torch.from_numpy(d).unbind(1), *torch.from_numpy(integers).unbind(1))


def search_scaled(values: Tensor, weights: Tensor, plan: ScaledPlan) -> Scales:
    """Find signed scales of least weighted squared error.

    values, weights: (n, 256 or 32) fp32 on a CPU; weights of one row serve all blocks.
    """
    x, w = _groups(values, plan.group), _groups(weights, plan.group)
    d, integers = np.empty(len(x), np.float32), np.empty(x.shape[:2], np.float32)
    ends = np.float32(plan.levels[0]), np.float32(plan.levels[-1])
    levels = _Levels(are_integers(plan.levels), *ends)
    settings = _Scaled(levels, *(_as_float32(item) for item in plan[2:]))
    _scaled_blocks(x, w, settings, d, integers)
    return Scales(torch.from_numpy(d), torch.from_numpy(integers))


def _groups(values: Tensor, group: int) -> Floats:
    return values.contiguous().view(len(values), -1, group).numpy()


def _as_float32(item: float | tuple[float, ...]) -> Any:
    if isinstance(item, tuple):
        return np.array(item, np.float32)
    return item if isinstance(item, int) else np.float32(item)


@compiled
def _round_fp16(number: Any) -> Any:
    # Neither to infinity nor, from something, to nothing.
    size = abs(number)
    if size == 0.0:
        return ZERO
    exponent = max(math.frexp(size)[1], -13)  # below 2^-14, steps stay 2^-24
    step = math.ldexp(1.0, exponent - 11)
    rounded = min(max(np.rint(size / step) * step, FP16_TINY), FP16_MAX)
    return np.float32(math.copysign(rounded, number))


@compiled
def _affine_pass(x: Any, w: Any, scale: Any, minimum: Any, highest: Any) -> Any:
    # Sums over the group: error; weighted code, its square, its product with the value.
    error = linear = squares = products = ZERO
    inverse = ONE / scale if scale > SMALLEST else ZERO
    for i in range(len(x)):
        code = np.rint(min(max((x[i] - minimum) * inverse, ZERO), highest))
        miss = code * scale + minimum - x[i]
        weighted = w[i] * code
        error += w[i] * miss * miss
        linear += weighted
        squares += weighted * code
        products += weighted * x[i]
    return error, linear, squares, products


@compiled
def _affine_sums(x: Any, w: Any) -> Any:
    # Of a group: weight, weighted value, largest value, smallest value or 0.
    weight = total = low = ZERO
    high = x[0]
    for i in range(len(x)):
        weight += w[i]
        total += w[i] * x[i]
        low, high = min(low, x[i]), max(high, x[i])
    return weight, total, low, high


@compiled
def _fit_affine_group(trial: Any, sums: Any, scale: Any, minimum: Any) -> Any:
    # Least squares for given codes; the minimum of a group cannot be above 0.
    _, linear, squares, products = trial
    weight, total = sums[0], sums[1]
    determinant = weight * squares - linear * linear
    if determinant <= weight * squares * NOISE:
        return scale, minimum
    slope = (weight * products - linear * total) / determinant
    offset = (squares * total - linear * products) / determinant
    if offset > ZERO:
        slope, offset = products / squares, ZERO
    return (slope, offset) if slope > ZERO else (scale, minimum)


@compiled
def _fit_affine(x: Any, w: Any, sums: Any, plan: Any) -> Any:
    # Scale and minimum of a group for itself, not yet integers.
    low, high = sums[2], sums[3]
    middle, extent = (high + low) * HALF, high - low
    best_scale, best_minimum = ZERO, low
    least = _affine_pass(x, w, ZERO, low, plan.highest_code)[0]
    for width in plan.widths:
        for shift in plan.shifts:
            scale = extent * width / plan.highest_code
            minimum = min(middle + extent * (shift - HALF * width), ZERO)
            for _ in range(plan.refits + 1):
                trial = _affine_pass(x, w, scale, minimum, plan.highest_code)
                if trial[0] < least:
                    least, best_scale, best_minimum = trial[0], scale, minimum
                scale, minimum = _fit_affine_group(trial, sums, scale, minimum)
    return best_scale, best_minimum


@compiled
def _affine_integers(x: Any, w: Any, wanted: Any, units: Any, plan: Any) -> Any:
    # The integers of least error among those around `wanted`, and the sums they give.
    d, dmin = units
    scale_centre = np.rint(wanted[0] / d) if d > ZERO else ZERO
    minimum_centre = np.rint(-wanted[1] / dmin) if dmin > ZERO else ZERO
    best_scale = best_minimum = ZERO
    best = (WORST, ZERO, ZERO, ZERO)
    for scale_step in STEPS:
        scale = min(max(scale_centre + scale_step, ZERO), plan.highest_scale)
        for minimum_step in STEPS:
            minimum = min(max(minimum_centre + minimum_step, ZERO), plan.highest_scale)
            trial = _affine_pass(x, w, d * scale, -dmin * minimum, plan.highest_code)
            if trial[0] < best[0]:
                best, best_scale, best_minimum = trial, scale, minimum
    return best_scale, best_minimum, best


@compiled
def _affine_round(x: Any, w: Any, fits: Any, units: Any, plan: Any, found: Any) -> Any:
    # Integers of all groups for these d and dmin into `found`; their error, and the next d, dmin.
    error = scale_squares = minimum_squares = mixed = scale_product = minimum_product = ZERO
    for group in range(len(x)):
        wanted = (fits[0, group], fits[1, group])
        scale, minimum, trial = _affine_integers(x[group], w[group], wanted, units, plan)
        found[0, group], found[1, group] = scale, minimum
        error += trial[0]
        scale_squares += scale * scale * trial[2]
        minimum_squares += minimum * minimum * fits[2, group]
        mixed -= scale * minimum * trial[1]
        scale_product += scale * trial[3]
        minimum_product -= minimum * fits[3, group]
    normal = (scale_squares, minimum_squares, mixed, scale_product, minimum_product)
    return error, _fit_affine_block(normal, units)


@compiled
def _fit_affine_block(normal: Any, units: Any) -> Any:
    # Least squares for d and dmin, with the integers and codes of all groups as they are.
    scale_squares, minimum_squares, mixed, scale_product, minimum_product = normal
    if minimum_squares == ZERO and scale_squares > ZERO and scale_product > ZERO:
        return _round_fp16(scale_product / scale_squares), units[1]
    both = scale_squares * minimum_squares
    determinant = both - mixed * mixed
    if determinant <= both * NOISE:
        return units
    d = (minimum_squares * scale_product - mixed * minimum_product) / determinant
    dmin = (scale_squares * minimum_product - mixed * scale_product) / determinant
    if d <= ZERO or dmin < ZERO:
        return units
    return _round_fp16(d), _round_fp16(dmin)


@compiled
def _affine_block(x: Any, w: Any, plan: Any, scratch: Any, best: Any, best_units: Any) -> Any:
    # One block: the best integers into `best` (2, G), d and dmin into `best_units` (2,).
    fits, found = scratch
    scale_top = minimum_top = ZERO
    for group in range(len(x)):
        sums = _affine_sums(x[group], w[group])
        fits[0, group], fits[1, group] = _fit_affine(x[group], w[group], sums, plan)
        fits[2, group], fits[3, group] = sums[0], sums[1]
        scale_top = max(scale_top, fits[0, group])
        minimum_top = max(minimum_top, -fits[1, group])
    least = WORST
    for scale_divisor in plan.scale_divisors:
        for minimum_divisor in plan.minimum_divisors:
            d, dmin = (
                _round_fp16(scale_top / scale_divisor),
                _round_fp16(minimum_top / minimum_divisor),
            )
            units = (d, dmin)
            for _ in range(plan.rounds):
                error, following = _affine_round(x, w, fits, units, plan, found)
                if error < least:
                    least = error
                    best[:] = found
                    best_units[0], best_units[1] = units
                units = following


@compiled
def _affine_blocks(x: Any, w: Any, plan: Any, units: Any, integers: Any) -> None:
    groups = x.shape[1]
    scratch = (np.empty((4, groups), np.float32), np.empty((2, groups), np.float32))
    for block in range(len(x)):
        weights = w[block % len(w)]
        _affine_block(x[block], weights, plan, scratch, integers[block], units[block])


@compiled
def _integer_pass(x: Any, w: Any, scale: Any, low: Any, high: Any) -> Any:
    # Sums over the group: error; weighted square of the level, its product with the value.
    error = squares = products = ZERO
    inverse = ONE / scale if abs(scale) > SMALLEST else ZERO
    for i in range(16):  # the group of Q3_K and Q6_K; a constant is 3.5 times as fast
        level = np.rint(min(max(x[i] * inverse, low), high))
        miss = level * scale - x[i]
        weighted = w[i] * level
        error += w[i] * miss * miss
        squares += weighted * level
        products += weighted * x[i]
    return error, squares, products


@compiled
def _iq4_pass(x: Any, w: Any, scale: Any) -> Any:
    # The same for the sixteen levels of IQ4.
    error = squares = products = ZERO
    inverse = ONE / scale if abs(scale) > SMALLEST else ZERO
    for i in range(32):  # the group of IQ4_NL and IQ4_XS
        number, level = x[i] * inverse, IQ4_LEVELS[0]
        for step in range(len(IQ4_MIDDLES)):  # unrolled, so that the loop over i is vectorised
            level += IQ4_STEPS[step] if number >= IQ4_MIDDLES[step] else ZERO
        miss = level * scale - x[i]
        weighted = w[i] * level
        error += w[i] * miss * miss
        squares += weighted * level
        products += weighted * x[i]
    return error, squares, products


@compiled
def _scaled_pass(x: Any, w: Any, scale: Any, levels: Any) -> Any:
    if levels.are_integers:
        return _integer_pass(x, w, scale, levels.lowest, levels.highest)
    return _iq4_pass(x, w, scale)


@compiled
def _fit_scaled(x: Any, w: Any, plan: Any) -> Any:
    # Scale of a group for itself, not yet an integer.
    largest = ZERO
    for value in x:
        largest = value if abs(value) > abs(largest) else largest
    best, least = ZERO, WORST
    for start in plan.starts:
        scale = largest * start
        for _ in range(plan.refits + 1):
            error, squares, products = _scaled_pass(x, w, scale, plan.levels)
            if error < least:
                least, best = error, scale
            if squares > ZERO:
                scale = products / squares
    return best


@compiled
def _scaled_round(x: Any, w: Any, fits: Any, d: Any, plan: Any, found: Any) -> Any:
    # Integers of all groups for this d into `found`; their error, and the next d.
    total = total_squares = total_products = ZERO
    for group in range(len(x)):
        centre = np.rint(fits[group] / d) if d != ZERO else ZERO
        best = (WORST, ZERO, ZERO)
        for step in plan.nearby:
            scale = min(max(centre + step, plan.lowest_scale), plan.highest_scale)
            trial = _scaled_pass(x[group], w[group], d * scale, plan.levels)
            if trial[0] < best[0]:
                best, found[group] = trial, scale
        total += best[0]
        total_squares += found[group] * found[group] * best[1]
        total_products += found[group] * best[2]
    following = _round_fp16(total_products / total_squares) if total_squares > ZERO else d
    return total, following


@compiled
def _energy(x: Any, w: Any) -> Any:
    # The error of a block that is all zero.
    total = ZERO
    for group in range(len(x)):
        for i in range(x.shape[1]):
            total += w[group, i] * x[group, i] * x[group, i]
    return total


@compiled
def _scaled_block(x: Any, w: Any, plan: Any, scratch: Any, best: Any) -> Any:
    # One block: the best integers into `best` (G,); returns their d.
    fits, found = scratch
    largest = ZERO
    for group in range(len(x)):
        fits[group] = _fit_scaled(x[group], w[group], plan)
        largest = fits[group] if abs(fits[group]) > abs(largest) else largest
    least, best_d = _energy(x, w), ZERO
    best[:] = ZERO
    for divisor in plan.divisors:
        d = _round_fp16(largest / divisor)
        for _ in range(plan.rounds):
            error, following = _scaled_round(x, w, fits, d, plan, found)
            if error < least:
                least, best_d = error, d
                best[:] = found
            d = following
    return best_d


@compiled
def _scaled_blocks(x: Any, w: Any, plan: Any, d: Any, integers: Any) -> None:
    groups = x.shape[1]
    scratch = (np.empty(groups, np.float32), np.empty(groups, np.float32))
    for block in range(len(x)):
        d[block] = _scaled_block(x[block], w[block % len(w)], plan, scratch, integers[block])
