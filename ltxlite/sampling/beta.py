"""The quantiles of the beta distribution, for the beta schedule; scipy is no dependency."""

import math

_MOST_TERMS = 1000
_TINY = 1e-300


def beta_quantile(a: float, b: float, share: float) -> float:
    """Return the x in [0, 1] below which the beta distribution (a, b > 0) has `share` of its mass.

    Bisection to the last bit; exactly 1/2 where symmetry says so.
    """
    if share <= 0 or share >= 1:
        return 0.0 if share <= 0 else 1.0
    if a == b and share == 0.5:
        return 0.5
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if regularised_beta(a, b, middle) < share:
            low = middle
        else:
            high = middle
    return middle


def regularised_beta(a: float, b: float, x: float) -> float:
    """Return I_x(a, b), the mass of the beta distribution below x in [0, 1].

    Source: continued fraction DLMF 8.17.22, on the side of the mean where it converges fast.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - regularised_beta(b, a, 1 - x)
    log_mass = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_mass + a * math.log(x) + b * math.log1p(-x)) / a
    return front / _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    # Modified Lentz: the value as a running product, its numerator and denominator as ratios.
    value = ratio_above = 1.0
    ratio_below = 0.0
    for term in range(1, _MOST_TERMS):
        coefficient = _coefficient(a, b, x, term)
        ratio_below = 1 / _not_zero(1 + coefficient * ratio_below)
        ratio_above = _not_zero(1 + coefficient / ratio_above)
        value *= ratio_below * ratio_above
        if abs(ratio_below * ratio_above - 1) < 1e-15:
            break
    return value


def _coefficient(a: float, b: float, x: float, term: int) -> float:
    m = term // 2
    if term % 2:
        return -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
    return m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))


def _not_zero(value: float) -> float:
    return value if value != 0 else _TINY
