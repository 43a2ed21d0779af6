"""Multistep solvers, which reuse earlier predictions: dpmpp_2m and er_sde."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ltxlite.sampling.contract import Carry, Sigmas, State, Step, Tools, add, float32_values, mix

# ComfyUI moves a first sigma of 1 to schedule position 1 - 1e-4 of its flow model with shift 2.37.
FIRST_SIGMA = 1 / (1 + math.exp(-2.37) * (1 / (1 - 1e-4) - 1))
_QUADRATURE_POINTS = 200
ER_SDE_REMEMBERS = ("x0", "slope")


def dpmpp_2m(carry: Carry, step: Step, tools: Tools) -> Carry:
    """Go on in log sigma with a prediction extrapolated from the step before.

    First and last step are of first order.  One evaluation.  Carries x and the prediction x0.
    Source: k-diffusion sample_dpmpp_2m (arXiv 2211.01095), which ComfyUI uses unchanged for flows.
    """
    x, sigma, following = carry["x"], step.sigma, step.following
    x0 = target = tools.denoise(x, sigma).x0
    if following == 0:
        return {"x": x0}
    length = math.log(sigma / following)
    if step.index:
        last_length = math.log(step.sigmas[step.index - 1] / sigma)
        lean = length / (2 * last_length)
        target = mix(1 + lean, x0, -lean, carry["x0"])
    return {"x": mix(following / sigma, x, -math.expm1(-length), target), "x0": x0}


def er_sde(
    carry: Carry, step: Step, tools: Tools, s_noise: float = 1.0, max_stage: int = 3
) -> Carry:
    """Follow the extended reverse-time SDE with up to third-order Taylor terms of x0.

    Works in lambda = sigma / (1 - sigma), on sigmas from `er_sde_sigmas`.  Carries x, the
    prediction x0 and its slope.
    s_noise: 0 gives the deterministic part.  max_stage: 1..3, the highest order used.
    Source: arXiv 2309.06169 and ComfyUI sample_er_sde (noise scaler l (e^(l^0.3) + 10)).
    """
    x0 = tools.denoise(carry["x"], step.sigma).x0
    if step.following == 0:
        return {"x": x0}
    leg = _Leg(_noise_to_signal(step.sigma), _noise_to_signal(step.following))
    terms = _differences(carry, step, x0)
    x = _taylor_step(carry["x"], terms[: int(max_stage)], leg)
    x = tools.add_noise(x, s_noise * leg.signal * leg.noise)
    return {"x": x, **dict(zip(ER_SDE_REMEMBERS, terms, strict=False))}


def er_sde_sigmas(sigmas: Sigmas) -> list[float]:
    """Return a schedule in fp32 values, its first sigma moved off 1, where lambda is infinite."""
    values = float32_values(sigmas)
    return [FIRST_SIGMA, *values[1:]] if values[:1] == [1.0] else values


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


def _differences(carry: Carry, step: Step, x0: State) -> list[State]:
    """Return x0, then its derivatives by lambda as far as the steps before tell them."""
    terms = [x0]
    for order, name in enumerate(ER_SDE_REMEMBERS[: step.index], start=1):
        earlier = _noise_to_signal(step.sigmas[step.index - order])
        # The second derivative spans two steps, and divides by half of them.
        scale = order / (_noise_to_signal(step.sigma) - earlier)
        terms.append(mix(scale, terms[-1], -scale, carry[name]))
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
