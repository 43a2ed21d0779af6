"""llama.cpp's own choice of scales, for blocks on which no search of ours may lose to it.

Its procedures follow one path of fp32 operations, on which a sum in another order can end somewhere
else.  So sums run here in its order too, element after element, but for many blocks at a time; and
the results are its scales to the last bit (tests/test_quant_special.py), which a guarantee block by
block needs.  Values lie as (S, n, G), as in `search_torch`.

Source: formats.md 2.6, A to D, ggml d99724f.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltxlite_quant.search_plan import AffinePlan, AffineScales, ScaledPlan, Scales
from ltxlite_quant.search_torch import are_integers, nearest_levels

NOTHING = 1e-15  # a group whose largest value is smaller counts as zero
SWEEPS = 5
ROUNDING = 12582912.0  # 1.5 * 2^23: what is added to it loses its fraction


class AffineFit(NamedTuple):
    """How a group's scale and minimum are found: by code ranges that are wider by some steps.

    Wider by `first` + `step` * i, for i from 0 to `last`.  is_absolute: of two ranges the one of
    less absolute error is better, instead of less squared error.
    """

    first: float
    step: float
    last: int
    is_absolute: bool = False


# Without importance; with it, all formats take the last one.
AFFINE_FITS: Mapping[str, AffineFit] = MappingProxyType(
    {
        "Q2_K": AffineFit(-0.5, 0.1, 15, is_absolute=True),
        "Q4_K": AffineFit(-1.0, 0.1, 20),
        "Q5_K": AffineFit(-0.5, 0.1, 15),
    }
)
WEIGHTED_FIT = AffineFit(-0.9, 0.05, 36)


def reference_affine(
    values: Tensor, importance: Tensor | None, name: str, plan: AffinePlan
) -> AffineScales:
    """Return the scales and minimums that llama.cpp gives to blocks of Q2_K, Q4_K or Q5_K.

    values: (n, 256) fp32.  importance: as many weights of the squared error, or None for the
    procedure without them.  Values whose d is beyond fp16 get an infinite one.
    """
    x = _by_element(values, plan.group)
    if importance is None:
        size = x.abs()
        w = size if name == "Q2_K" else _root(_sum(x * x) / plan.group) + size
        scale, minimum = _fit_affine(x, w, plan.highest_code, AFFINE_FITS[name])
        d, scales = _shared_by_largest(scale, plan.highest_scale)
        dmin, minimums = _shared_by_largest(minimum, plan.highest_scale)
    else:
        spread = _spread(values, 1 if name == "Q2_K" else 2)
        w = _by_element(importance, plan.group) * _root(spread[:, None] + x * x)
        scale, minimum = _fit_affine(x, w, plan.highest_code, WEIGHTED_FIT)
        weight = _sum(w)  # (n, G)
        d, scales = _shared_by_fit(scale, weight, plan.highest_scale)
        dmin, minimums = _shared_by_fit(minimum, weight, plan.highest_scale)
    return AffineScales(_stored(d), _stored(dmin), scales, minimums)


def reference_scaled(
    values: Tensor, importance: Tensor | None, name: str, plan: ScaledPlan
) -> Scales:
    """Return the scales that llama.cpp gives to blocks of Q3_K, Q6_K, IQ4_NL or IQ4_XS.

    values: (n, 256 or 32) fp32.  importance: as in `reference_affine`.
    """
    x = _by_element(values, plan.group)
    w = x * x
    if importance is not None:
        w = _by_element(importance, plan.group)
        if name != "Q6_K":
            w = w * _root(_spread(values, 2)[:, None] + x * x)
    if not are_integers(plan.levels):
        scale = _fit_levels(x, w, plan.levels)
    elif name == "Q3_K" and importance is None:
        scale = _fit_descending(x, w, -plan.levels[0])
    else:
        scale = _fit_signed(x, w, -plan.levels[0])[0]
    if name == "Q3_K" and importance is not None:
        d, scales = _fit_signed(scale.T, _sum(w).T, -plan.lowest_scale)
        return Scales(_stored(d), scales.T.contiguous())
    if plan.lowest_scale == plan.highest_scale:
        return Scales(_stored(scale[:, 0]), torch.ones_like(scale))
    d, scales = _shared_by_signed(scale, name, plan)
    return Scales(_stored(d), scales)


def _fit_affine(x: Tensor, w: Tensor, highest: float, fit: AffineFit) -> tuple[Tensor, Tensor]:
    # Procedure A: scale and minimum (n, G), the minimum as what is subtracted.
    high, low = x.amax(0), x.amin(0).clamp_(max=0)
    is_flat, flat = high <= low, low
    weight, total = _sum(w), _sum(w * x)
    inverse = _over(highest, high - low)
    scale = _over(1, inverse)
    least = _affine_error(x, w, _codes(x, low, inverse, highest), scale, low, fit)
    for step in range(fit.last + 1):
        wider = np.float32(fit.first) + np.float32(fit.step) * np.float32(step)
        # From the minimum of the best range so far, not from the least value.
        inverse = _over(float(wider + np.float32(highest)), high - low)
        codes = _codes(x, low, inverse, highest)
        found = _fit_codes(x, w, codes, (weight, total))
        error = _affine_error(x, w, codes, *found[:2], fit)
        less = found[2] & (error < least)
        least = torch.where(less, error, least)
        scale, low = torch.where(less, found[0], scale), torch.where(less, found[1], low)
    return torch.where(is_flat, 0, scale), torch.where(is_flat, flat, low).abs()


def _codes(x: Tensor, low: Tensor, inverse: Tensor, highest: float) -> Tensor:
    return (x - low).mul_(inverse).round_().clamp_(0, highest)


def _affine_error(
    x: Tensor, w: Tensor, codes: Tensor, scale: Tensor, low: Tensor, fit: AffineFit
) -> Tensor:
    miss = (codes * scale).add_(low).sub_(x)
    return _sum((miss.abs_() if fit.is_absolute else miss.square_()).mul_(w))


def _fit_codes(
    x: Tensor, w: Tensor, codes: Tensor, sums: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    # Least squares for given codes: scale, minimum, and where there are any.
    weight, total = sums
    weighted = codes * w
    linear, squares, products = (
        _sum(weighted),
        _sum(weighted * codes),
        _sum(weighted * x),
    )
    determinant = weight * squares - linear * linear
    scale = (weight * products - total * linear) / determinant
    minimum = (squares * total - linear * products) / determinant
    scale = torch.where(minimum > 0, products / squares, scale)
    return scale, minimum.clamp(max=0), determinant > 0


def _fit_signed(x: Tensor, w: Tensor, top: float) -> tuple[Tensor, Tensor]:
    # Procedure B: scale and codes of signed values, by the largest share of the energy.
    largest = _first_largest(x)
    scale, best, codes = torch.zeros_like(largest), torch.zeros_like(largest), torch.zeros_like(x)
    for step in (0, *range(-9, 0), *range(1, 10)):
        wider = float(np.float32(top) + np.float32(0.1) * np.float32(step))
        tried = (_over(-wider, largest) * x).round_().clamp_(-top, top - 1)
        squares, products = _level_sums(x, w, tried)
        less = (squares > 0) & (products * products > best * squares)
        if step == 0:  # it counts, whatever it is
            less = squares != 0
        scale = torch.where(less, products / squares, scale)
        best, codes = torch.where(less, scale * products, best), torch.where(less, tried, codes)
    some = largest.abs() >= NOTHING
    return torch.where(some, scale, 0), torch.where(some, codes, -top)


def _fit_descending(x: Tensor, w: Tensor, top: float) -> Tensor:
    # Procedure C: scale of signed values, codes changed one after another.
    largest = _first_largest(x)
    codes = (_over(-top, largest) * x).round_().clamp_(-top, top - 1)
    squares, products = _descend(x, w, codes, (-top, top - 1))
    return torch.where((largest.abs() >= NOTHING) & (squares > 0), products / squares, 0)


def _shared_by_fit(scales: Tensor, weight: Tensor, top: float) -> tuple[Tensor, Tensor]:
    # Procedure D: of scales (n, G) that are not negative, what they share (n,), and integers.
    x, w = scales.T.contiguous(), weight.T.contiguous()
    largest = x.amax(0)
    inverse, least = _over(top, largest), torch.full_like(largest, torch.inf)
    for step in (0, *range(-4, 0), *range(1, 5)):
        tried = _over(float(np.float32(0.1) * np.float32(step) + np.float32(top)), largest)
        miss = x - _over(1, tried) * (tried * x).round_().clamp_(max=top)
        error = _sum(w * miss * miss)
        inverse, least = torch.where(error < least, tried, inverse), torch.minimum(error, least)
    codes = (inverse * x).round_().clamp_(max=top)
    squares, products = _descend(x, w, codes, (0, top))
    some = largest > 0
    return torch.where(some, products / squares, 0), torch.where(some, codes, 0).T.contiguous()


def _shared_by_largest(scales: Tensor, top: float) -> tuple[Tensor, Tensor]:
    # Of scales (n, G) that are not negative, what they share (n,), and integers.
    largest = scales.amax(1)
    inverse = torch.where(largest > 0, _over(top, largest), 0)
    codes = (inverse[:, None] * scales).round_().clamp_(max=top)
    return largest / largest.new_full((), top), codes


def _shared_by_signed(scales: Tensor, name: str, plan: ScaledPlan) -> tuple[Tensor, Tensor]:
    # The same of any scales; the one of largest magnitude gets the lowest integer.
    largest, low = _first_largest(scales.T), plan.lowest_scale
    inverse = _over(low, largest)
    d = _over(1, inverse)
    if name == "IQ4_XS":
        d = largest / largest.new_full((), low)
        inverse = _over(1, d)
    codes = (inverse[:, None] * scales).round_().clamp_(low, plan.highest_scale)
    some = largest.abs() >= NOTHING if name == "Q6_K" else largest != 0
    return torch.where(some, d, 0), torch.where(some[:, None], codes, 0)


def _descend(
    x: Tensor, w: Tensor, codes: Tensor, ends: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    # Each code in turn takes what suits the scale of the others, if that leaves less error.  Writes
    # into `codes`; returns the sums of their squares and of their products with x.
    squares, products = _level_sums(x, w, codes)
    for _ in range(SWEEPS):
        for value, weight, code in zip(x, w, codes, strict=True):
            share = products - weight * value * code
            rest = squares - weight * code * code
            is_apart = (share > 0) & (rest > 0) if ends[0] == 0 else share > 0
            other = _nearest_integer(value * rest / share).clamp_(*ends)
            share += weight * value * other
            rest += weight * other * other
            less = (rest > 0) & (share * share * squares > products * products * rest)
            less &= is_apart & (other != code)
            squares, products = torch.where(less, rest, squares), torch.where(less, share, products)
            code.copy_(torch.where(less, other, code))
    return squares, products


def _fit_levels(x: Tensor, w: Tensor, levels: tuple[float, ...]) -> Tensor:
    # Scale of a group in IQ4, by the largest share of the energy.
    largest = _first_largest(x)
    scale, best = torch.zeros_like(largest), torch.zeros_like(largest)
    for step in (None, *range(-7, 8)):
        # The first candidate's sign is the other one.
        inverse = _over((step or 0) + levels[0], largest)
        if step is None:
            inverse = _over(1, largest / largest.new_full((), -levels[0]))
        tried = nearest_levels(inverse * x, levels)
        weighted = w * tried
        squares, products = _sum(weighted * tried), _sum(weighted * x)
        less = (squares > 0) & (products * products > best * squares)
        if step is None:
            less = squares == squares
        scale = torch.where(less, products / squares, scale)
        best = torch.where(less, scale * products, best)
    return torch.where(largest.abs() >= NOTHING, scale, 0)


def _level_sums(x: Tensor, w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    weighted = w * levels
    return _sum(weighted * levels), _sum(w * x * levels)


def _spread(values: Tensor, factor: int) -> Tensor:
    # (n,): the mean square of a block, times a factor.
    return _sum((values * values).T.contiguous()) * factor / values.shape[1]


def _root(numbers: Tensor) -> Tensor:
    # torch's of fp32 is one ULP off for one number of two hundred
    return numbers.double().sqrt_().float()


def _sum(terms: Tensor) -> Tensor:
    # Over the first dimension, in order.  numpy does so in one call, but not within a single row.
    if terms.device.type == "cpu" and terms[0].numel() > 1:
        with np.errstate(all="ignore"):  # the reference overflows silently, too
            return torch.from_numpy(np.add.reduce(terms.contiguous().numpy(), axis=0))
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _nearest_integer(numbers: Tensor) -> Tensor:
    # Of large numbers it is as wrong as the reference's.
    bits = (numbers + ROUNDING).view(torch.int32)
    return ((bits & 0x7FFFFF) - 0x400000).float()


def _first_largest(values: Tensor) -> Tensor:
    # Over the first dimension: of largest magnitude, with its sign, the first of equals.
    rows = values.abs().argmax(0, keepdim=True)
    return values.gather(0, rows)[0]


def _by_element(values: Tensor, group: int) -> Tensor:
    # (n, G * S) -> (S, n, G)
    return values.view(len(values), -1, group).permute(2, 0, 1).contiguous()


def _over(numerator: float, denominator: Tensor) -> Tensor:
    # By a tensor: torch turns the division of a number into a product with an inverse, an ULP off.
    return denominator.new_full((), numerator) / denominator


def _stored(numbers: Tensor) -> Tensor:
    return numbers.half().float()
