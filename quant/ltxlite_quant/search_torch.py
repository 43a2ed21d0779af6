"""The search for scales in plain torch: on any device, many blocks at a time.

Values lie as (S, n, G): S elements of a group, n blocks, G groups of a block.  Sums over a group
are then sums of long rows, several times faster than over 16 or 32 neighbours.
"""

from functools import cache
from itertools import product

import torch
from torch import Tensor

from ltxlite_quant.search_plan import AffinePlan, AffineScales, ScaledPlan, Scales
from ltxlite_quant.special import find_special as find_special

FP16_MAX = 65504.0
FP16_TINY = 2.0**-24  # smallest subnormal fp16
# Below this share of what it is a difference of, a determinant is rounding noise.
SINGULAR = 1e-6
# torch adds up this many columns in one order, and those that remain in another; a block's bytes
# would hang on which others it is searched with.
COLUMNS = 64

Pass = tuple[Tensor, Tensor, Tensor, Tensor]


def search_affine(values: Tensor, weights: Tensor, plan: AffinePlan) -> AffineScales:
    """Find scales and minimums of least weighted squared error.

    values, weights: (n, 256) fp32.  Follows `plan`; the twin of `search_numba.search_affine`.
    """
    x, w = _prepared(values, weights, plan.group)
    sums = w.sum(0), (w * x).sum(0)  # (n, G) each
    scale, minimum = _fit_affine(x, w, sums, plan)
    largest = scale.amax(1), (-minimum).amax(1)  # (n,)
    best: tuple[Tensor, ...] | None = None
    for scale_divisor, minimum_divisor in product(plan.scale_divisors, plan.minimum_divisors):
        d, dmin = round_fp16(largest[0] / scale_divisor), round_fp16(largest[1] / minimum_divisor)
        for _ in range(plan.rounds):
            codes, trial = _affine_integers(x, w, (scale, minimum), (d, dmin), plan)
            found = (trial[0].sum(1), d, dmin, *codes)
            best = found if best is None else _better(found, best)
            d, dmin = _fit_affine_block(codes, trial, sums, (d, dmin))
    assert best is not None
    return AffineScales(*(found[: len(values)] for found in best[1:]))


def search_scaled(values: Tensor, weights: Tensor, plan: ScaledPlan) -> Scales:
    """Find signed scales of least weighted squared error.

    values, weights: (n, 256 or 32) fp32.  Follows `plan`; the twin of `search_numba.search_scaled`.
    """
    x, w = _prepared(values, weights, plan.group)
    scale = _fit_scaled(x, w, plan)
    largest = _signed_largest(scale, 1)  # (n,)
    nothing = torch.zeros_like(largest)
    best: tuple[Tensor, ...] = ((x * x * w).sum((0, 2)), nothing, torch.zeros_like(scale))
    for divisor in plan.divisors:
        d = round_fp16(largest / divisor)
        for _ in range(plan.rounds):
            codes, trial = _scaled_integers(x, w, (scale, d), plan)
            found = (trial[0].sum(1), d, codes)
            best = _better(found, best)
            squares, products = (codes * codes * trial[1]).sum(1), (codes * trial[2]).sum(1)
            d = torch.where(squares > 0, round_fp16(_divided(products, squares)), d)
    return Scales(*(found[: len(values)] for found in best[1:]))


def _prepared(values: Tensor, weights: Tensor, group: int) -> tuple[Tensor, Tensor]:
    # Values and weights by element, with zero blocks to `COLUMNS`.
    blocks = COLUMNS * group // values.shape[1] or 1
    x = _by_element(_padded(values, blocks), group)
    # Of one row, too: a product with weights that are not repeated takes three times as long.
    w = _by_element(weights if len(weights) == 1 else _padded(weights, blocks), group)
    return x, w.expand_as(x).contiguous()


def _padded(values: Tensor, blocks: int) -> Tensor:
    missing = -len(values) % blocks
    if not missing:
        return values
    return torch.cat([values, values.new_zeros(missing, values.shape[1])])


def are_integers(levels: tuple[float, ...]) -> bool:
    """Tell whether levels are neighbouring integers, so that rounding finds the nearest."""
    return len(levels) == levels[-1] - levels[0] + 1


def nearest_levels(numbers: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return the nearest level of every number, of equally near ones the upper; `numbers` go."""
    if are_integers(levels):
        return numbers.round_().clamp_(levels[0], levels[-1])
    return _looked_up(numbers, _halves(levels, numbers.device)[0])


def round_fp16(numbers: Tensor) -> Tensor:
    """Round to fp16, but neither to infinity nor, from something, to nothing.  Stays fp32."""
    tiny = numbers.abs().clamp(FP16_TINY, FP16_MAX).copysign(numbers)
    return torch.where(numbers == 0, numbers, tiny).half().float()


def affine_codes(values: Tensor, found: AffineScales, plan: AffinePlan) -> Tensor:
    """Return the codes that scales and minimums give to `values`: (n, 256) uint8."""
    x = values.view(*found.scales.shape, plan.group)
    minimum = found.dmin[:, None] * found.minimums
    numbers = (x + minimum[:, :, None]).div_(_divisor(found.d, found.scales))
    return numbers.round_().clamp_(0, plan.highest_code).to(torch.uint8).view(values.shape)


def scaled_codes(values: Tensor, found: Scales, plan: ScaledPlan) -> Tensor:
    """Return the indices of the levels that scales give to `values`: (n, 256 or 32) uint8."""
    x = values.view(*found.scales.shape, plan.group)
    numbers = x / _divisor(found.d, found.scales)
    return _level_index(numbers, plan.levels).to(torch.uint8).view(values.shape)


def _divisor(d: Tensor, scales: Tensor) -> Tensor:
    # (n, G, 1).  By a division, unlike a product with an inverse, a number halfway between two
    # codes takes the one that the reference gives it; 0 is the code of all where the scale is 0.
    scale = d[:, None] * scales
    return scale.masked_fill_(scale == 0, torch.inf)[:, :, None]


def _affine_levels(x: Tensor, scale: Tensor, minimum: Tensor, highest: float) -> Tensor:
    # The nearest codes; 0 where the scale is 0.
    return (x - minimum).mul_(_inverse(scale)).round_().clamp_(0, highest)


def _level_index(numbers: Tensor, levels: tuple[float, ...]) -> Tensor:
    low, high = levels[0], levels[-1]
    if are_integers(levels):
        return numbers.round_().clamp_(low, high).sub_(low)
    return _looked_up(numbers, _halves(levels, numbers.device)[1])


def _looked_up(numbers: Tensor, table: Tensor) -> Tensor:
    # A table from doubled numbers, rounded down; 18 times as fast as torch.bucketize.
    half = len(table) // 2
    rows = numbers.mul_(2).floor_().clamp_(-half, half).add_(half).int()
    rows.clamp_(0, 2 * half)  # a NaN becomes any integer
    return table.index_select(0, rows.flatten()).view(numbers.shape)


@cache
def _halves(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # The level next to every half of an integer, and its index.  Levels are integers, so that
    # halves are all there is between two of them.
    table = torch.tensor(levels, device=device)
    half = round(2 * max(abs(level) for level in levels))
    numbers = torch.arange(-half, half + 1, device=device) / 2
    index = torch.bucketize(numbers, (table[1:] + table[:-1]) / 2, right=True)
    return table[index], index.float()


def _fit_affine(
    x: Tensor, w: Tensor, sums: tuple[Tensor, Tensor], plan: AffinePlan
) -> tuple[Tensor, Tensor]:
    # Scale and minimum (n, G) of every group for itself, not yet integers.
    high, low = x.amax(0), x.amin(0).clamp_(max=0)
    middle, extent = (high + low) / 2, high - low
    flat = torch.zeros_like(low)
    best: tuple[Tensor, ...] = (_affine_error(x, w, (flat, low), plan), flat, low)
    for width, shift in product(plan.widths, plan.shifts):
        scale = extent * (width / plan.highest_code)
        minimum = (middle + extent * (shift - width / 2)).clamp_(max=0)
        for _ in range(plan.refits):
            trial = _affine_pass(x, w, (scale, minimum), plan)
            best = _better((trial[0], scale, minimum), best)
            scale, minimum = _fit_affine_group(trial, sums, scale, minimum)
        best = _better((_affine_error(x, w, (scale, minimum), plan), scale, minimum), best)
    return best[1], best[2]


def _affine_error(x: Tensor, w: Tensor, fit: tuple[Tensor, Tensor], plan: AffinePlan) -> Tensor:
    # Its sum over the group, (n, G).
    codes = _affine_levels(x, *fit, plan.highest_code)
    return codes.mul_(fit[0]).add_(fit[1]).sub_(x).square_().mul_(w).sum(0)


def _affine_pass(x: Tensor, w: Tensor, fit: tuple[Tensor, Tensor], plan: AffinePlan) -> Pass:
    # Sums over the group, (n, G): error; weighted code, its square, its product with the value.
    codes = _affine_levels(x, *fit, plan.highest_code)
    error = (codes * fit[0]).add_(fit[1]).sub_(x).square_().mul_(w).sum(0)
    weighted = codes * w
    products = (weighted * x).sum(0)
    return error, weighted.sum(0), weighted.mul_(codes).sum(0), products


def _fit_affine_group(
    trial: Pass, sums: tuple[Tensor, Tensor], scale: Tensor, minimum: Tensor
) -> tuple[Tensor, Tensor]:
    # Least squares for given codes; the minimum of a group cannot be above 0.
    _, linear, squares, products = trial
    weight, total = sums
    both = weight * squares
    determinant = both - linear * linear
    slope = _divided(weight * products - linear * total, determinant)
    offset = _divided(squares * total - linear * products, determinant)
    slope = torch.where(offset > 0, _divided(products, squares), slope)
    fine = (determinant > both * SINGULAR) & (slope > 0)
    return torch.where(fine, slope, scale), torch.where(fine, offset.clamp_(max=0), minimum)


def _affine_integers(
    x: Tensor,
    w: Tensor,
    wanted: tuple[Tensor, Tensor],
    units: tuple[Tensor, Tensor],
    plan: AffinePlan,
) -> tuple[tuple[Tensor, Tensor], Pass]:
    # The integers (n, G) of least error among those around `wanted`, and the sums they give: of
    # the best alone, which takes less time than of all.
    d, dmin = units[0][:, None], units[1][:, None]
    centre = (wanted[0] * _inverse(d)).round_(), (wanted[1] * -_inverse(dmin)).round_()
    best: tuple[Tensor, ...] | None = None
    for scale_step, minimum_step in product((0, -1, 1), repeat=2):
        scale = (centre[0] + scale_step).clamp_(0, plan.highest_scale)
        minimum = (centre[1] + minimum_step).clamp_(0, plan.highest_scale)
        error = _affine_error(x, w, (d * scale, dmin * -minimum), plan)
        found = (error, scale, minimum)
        best = found if best is None else _better(found, best)
    assert best is not None
    return (best[1], best[2]), _affine_pass(x, w, (d * best[1], dmin * -best[2]), plan)


def _fit_affine_block(
    codes: tuple[Tensor, Tensor],
    trial: Pass,
    sums: tuple[Tensor, Tensor],
    units: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    # Least squares for d and dmin (n,), with the integers and codes of all groups as they are.
    scale, minimum = codes
    _, linear, squares, products = trial
    scale_squares = (scale * scale * squares).sum(1)
    minimum_squares = (minimum * minimum * sums[0]).sum(1)
    mixed = -(scale * minimum * linear).sum(1)
    scale_product, minimum_product = (scale * products).sum(1), -(minimum * sums[1]).sum(1)
    both = scale_squares * minimum_squares
    determinant = both - mixed * mixed
    d = _divided(minimum_squares * scale_product - mixed * minimum_product, determinant)
    dmin = _divided(scale_squares * minimum_product - mixed * scale_product, determinant)
    fine = (determinant > both * SINGULAR) & (d > 0) & (dmin >= 0)
    alone = (minimum_squares == 0) & (scale_squares > 0) & (scale_product > 0)
    d = torch.where(alone, _divided(scale_product, scale_squares), d)
    return (
        torch.where(fine | alone, round_fp16(d), units[0]),
        torch.where(fine, round_fp16(dmin), units[1]),
    )


def _fit_scaled(x: Tensor, w: Tensor, plan: ScaledPlan) -> Tensor:
    # Scale (n, G) of every group for itself, not yet an integer.
    largest = _signed_largest(x, 0)
    best: tuple[Tensor, ...] | None = None
    for start in plan.starts:
        scale = largest * start
        for _ in range(plan.refits + 1):
            error, squares, products = _scaled_pass(x, w, scale, plan)
            best = (error, scale) if best is None else _better((error, scale), best)
            scale = torch.where(squares > 0, _divided(products, squares), scale)
    assert best is not None
    return best[1]


def _scaled_pass(
    x: Tensor, w: Tensor, scale: Tensor, plan: ScaledPlan
) -> tuple[Tensor, Tensor, Tensor]:
    # Sums over the group, (n, G): error; weighted square of the level, its product with the value.
    levels = nearest_levels(x * _inverse(scale), plan.levels)
    error = (levels * scale).sub_(x).square_().mul_(w).sum(0)
    weighted = levels * w
    products = (weighted * x).sum(0)
    return error, weighted.mul_(levels).sum(0), products


def _scaled_integers(
    x: Tensor,
    w: Tensor,
    wanted: tuple[Tensor, Tensor],
    plan: ScaledPlan,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    # The integers (n, G) of least error among those around `wanted`, and the sums they give.
    d = wanted[1][:, None]
    centre = (wanted[0] * _inverse(d)).round_()
    best: tuple[Tensor, ...] | None = None
    for step in plan.nearby:
        scale = (centre + step).clamp_(plan.lowest_scale, plan.highest_scale)
        found = (*_scaled_pass(x, w, d * scale, plan), scale)
        best = found if best is None else _better(found, best)
    assert best is not None
    return best[3], (best[0], best[1], best[2])


def _better(found: tuple[Tensor, ...], best: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Entry by entry, or row by row, the candidate of the smaller first member.
    less = found[0] < best[0]

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(less if less.dim() == new.dim() else less[:, None], new, old)

    return tuple(choose(new, old) for new, old in zip(found, best, strict=True))


def _by_element(values: Tensor, group: int) -> Tensor:
    # (n, G * S) -> (S, n, G)
    return values.view(len(values), -1, group).permute(2, 0, 1).contiguous()


def _signed_largest(values: Tensor, dim: int) -> Tensor:
    high, low = values.amax(dim), values.amin(dim)
    return torch.where(high > -low, high, low)


def _inverse(numbers: Tensor) -> Tensor:
    # 0 of 0, and of what is too small to be inverted
    inverse = numbers.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0)


def _divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator * _inverse(denominator)
