"""Multistep solvers, which reuse earlier predictions: dpmpp_2m and er_sde."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ltxlite.sampling.contract import Sigmas, State, Tools, add, float32_values, intervals, mix

# ComfyUI moves a first sigma of 1 to schedule position 1 - 1e-4 of its flow model with shift 2.37.
FIRST_SIGMA = 1 / (1 + math.exp(-2.37) * (1 / (1 - 1e-4) - 1))
_QUADRATURE_POINTS = 200


def dpmpp_2m(x: State, sigmas: Sigmas, tools: Tools) -> State:
    """Integrate in log sigma with a prediction extrapolated from the step before.

    First and last step are of first order.  One evaluation a step.
    Source: k-diffusion sample_dpmpp_2m (arXiv 2211.01095), which ComfyUI uses unchanged for flows.
    """
    before: State | None = None
    last_length = 0.0
    for step, sigma, following in intervals(sigmas):
        x0 = tools.denoise(x, sigma).x0
        if following == 0:
            x = x0
        else:
            length = math.log(sigma / following)
            target = x0
            if before is not None:
                lean = length / (2 * last_length)
                target = mix(1 + lean, x0, -lean, before)
            x = mix(following / sigma, x, -math.expm1(-length), target)
            before, last_length = x0, length
        tools.report(step, x)
    return x


def er_sde(
    x: State, sigmas: Sigmas, tools: Tools, s_noise: float = 1.0, max_stage: int = 3
) -> State:
    """Integrate the extended reverse-time SDE with up to third-order Taylor terms of x0.

    Works in lambda = sigma / (1 - sigma); a first sigma of 1 is moved to `FIRST_SIGMA`.
    s_noise: 0 gives the deterministic part.  max_stage: 1..3, the highest order used.
    Source: arXiv 2309.06169 and ComfyUI sample_er_sde (noise scaler l (e^(l^0.3) + 10)).
    """
    values = float32_values(sigmas)
    if values[:1] == [1.0]:
        values[0] = FIRST_SIGMA
    past = _Past()
    for step, (sigma, following) in enumerate(pairwise(values)):
        x0 = tools.denoise(x, sigma).x0
        if following == 0:
            x = x0
        else:
            leg = _Leg(_noise_to_signal(sigma), _noise_to_signal(following))
            x = _taylor_step(x, past.add(leg.start, x0, int(max_stage)), leg)
            x = tools.add_noise(x, s_noise * leg.signal * leg.noise)
        tools.report(step, x)
    return x


@dataclass(frozen=True, slots=True)
class _Leg:
    """One step of er_sde from lambda `start` down to `end`, and its scalar coefficients."""

    start: float
    end: float

    @property
    def signal(self) -> float:
        return 1 / (1 + self.end)  # 1 - sigma

    @property
    def keep(self) -> float:
        return _scaler(self.end) / _scaler(self.start)

    @property
    def noise(self) -> float:
        return math.sqrt(max(0.0, self.end**2 - (self.start * self.keep) ** 2))

    def derivative_weights(self) -> tuple[float, float]:
        """Return the weights of the first and second derivative of x0 by lambda."""
        change = self.end - self.start
        width = -change / _QUADRATURE_POINTS
        points = [self.end + index * width for index in range(_QUADRATURE_POINTS)]
        first = width * math.fsum(1 / _scaler(point) for point in points)
        second = width * math.fsum((point - self.start) / _scaler(point) for point in points)
        return (
            change + first * _scaler(self.end),
            change**2 / 2 + second * _scaler(self.end),
        )


class _Past:
    """Divided differences of the predictions so far: x0, then its first and second derivative."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._terms: list[State] = []

    def add(self, point: float, x0: State, orders: int) -> Sequence[State]:
        terms = [x0]
        self._points = [point, *self._points[:2]]
        for order, earlier in enumerate(self._terms[: orders - 1], start=1):
            # The second derivative spans two steps, and divides by half of them.
            scale = order / (point - self._points[order])
            terms.append(mix(scale, terms[-1], -scale, earlier))
        self._terms = terms[:2]
        return terms


def _taylor_step(x: State, terms: Sequence[State], leg: _Leg) -> State:
    # Signals are 1 - sigma = 1 / (1 + lambda).
    gain = leg.keep * leg.signal * (1 + leg.start)
    x = mix(gain, x, leg.signal * (1 - leg.keep), terms[0])
    for term, weight in zip(terms[1:], leg.derivative_weights(), strict=False):
        x = add(x, leg.signal * weight, term)
    return x


def _noise_to_signal(sigma: float) -> float:
    return sigma / (1 - sigma)


def _scaler(point: float) -> float:
    return point * (math.exp(point**0.3) + 10)
