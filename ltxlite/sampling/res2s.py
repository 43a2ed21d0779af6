"""res_2s: an exponential Runge-Kutta method of second order with SDE noise, in fp64.

Source: LTX-2 400fd31 ltx_pipelines res2s_audio_video_denoising_loop (its legacy mode).
"""

import math
from dataclasses import dataclass

import torch

from ltxlite.errors import RequestError
from ltxlite.sampling.contract import (
    Carry,
    NoiseKind,
    Sigmas,
    State,
    Step,
    Tools,
    add,
    float32_values,
    mix,
)

LAST_SIGMA = 0.0011  # the schedule's final 0 becomes this; the evaluation there is the result
SUBSTEP_ETA = 0.5  # fixed in the reference, whatever the eta of the step
_MOST_FRESH = 0.9999  # a step never replaces all of its noise
_BONG_LONGEST = 0.5  # the anchor is refined where log(sigma / sigma') is below this
_BONG_LOWEST = 0.03  # and sigma above this


def res_2s(carry: Carry, step: Step, tools: Tools, eta: float = 0.5, *, bong: bool = True) -> Carry:
    """Take a step with two evaluations, on sigmas from `res_2s_sigmas`; `res_2s_end` comes last.

    Carries x, (B, T, C) fp64 a stream; it may begin in fp32, and the denoiser is given fp32.
    eta: share of fresh noise in a step (0: none is drawn); substeps always use 0.5.
    bong: refine the anchor after a substep's noise.
    Tools.noise must give standardised noise (see `ltxlite.sampling.noise`).
    """
    span = _Span(step.sigma, step.following)
    x = _cast(carry["x"], torch.float64)
    first = _denoise(tools, x, span.sigma)
    anchor, middle = _substep(x, first, span, tools, bong)
    second = _denoise(tools, middle, span.middle)
    ahead = add(anchor, span.length * span.b1, add(first, -1, anchor))
    ahead = add(ahead, span.length * span.b2, add(second, -1, anchor))
    return {"x": _inject((anchor, ahead), (span.sigma, span.following), eta, "step", tools)}


def res_2s_sigmas(sigmas: Sigmas) -> list[float]:
    """Return a schedule in fp32 values, its final 0 replaced by `LAST_SIGMA`.

    Raises RequestError if it does not end in 0 from above that.
    """
    values = float32_values(sigmas)
    if len(values) < 2 or values[-1] != 0 or values[-2] <= LAST_SIGMA:
        raise RequestError(
            f"res_2s got a schedule ending in {values[-2:]}, wanted one that ends in 0 "
            f"from a sigma above {LAST_SIGMA}"
        )
    return [*values[:-1], *float32_values([LAST_SIGMA])]


def res_2s_end(x: State, sigma: float, tools: Tools) -> State:
    """Return the prediction at the last sigma; fp32."""
    return tools.denoise(_cast(x, torch.float32), sigma).x0


@dataclass(frozen=True, slots=True)
class _Span:
    """The coefficients of one step from sigma to the following one, with its middle at 1/2."""

    sigma: float
    following: float

    @property
    def length(self) -> float:
        return math.log(self.sigma / self.following)

    @property
    def middle(self) -> float:
        return math.sqrt(self.sigma * self.following)

    @property
    def a21(self) -> float:
        return 0.5 * _phi1(-self.length / 2)

    @property
    def b2(self) -> float:
        return 2 * _phi2(-self.length)

    @property
    def b1(self) -> float:
        return _phi1(-self.length) - self.b2

    @property
    def refines(self) -> bool:
        return self.length < _BONG_LONGEST and self.sigma > _BONG_LOWEST


def _substep(x: State, x0: State, span: _Span, tools: Tools, bong: bool) -> tuple[State, State]:
    """Return the anchor of the step and the noisy state at its middle."""
    reach = span.length * span.a21
    middle = mix(1 - reach, x, reach, x0)
    middle = _inject((x, middle), (span.sigma, span.middle), SUBSTEP_ETA, "sub", tools)
    if not (bong and span.refines):
        return x, middle
    # The reference iterates anchor = middle - reach (x0 - anchor) 100 times. That is linear with
    # factor reach < 0.25 here, so it ends, to the last bit of fp64, in its fixed point.
    return mix(1 / (1 - reach), middle, -reach / (1 - reach), x0), middle


def _inject(
    ends: tuple[State, State],
    levels: tuple[float, float],
    eta: float,
    kind: NoiseKind,
    tools: Tools,
) -> State:
    """Trade part of the noise that a step arrives with for fresh noise, and blend."""
    (start, end), (sigma, following) = ends, levels
    up = min(eta * following, _MOST_FRESH * following)
    if up == 0:
        return tools.blend(end)
    rest = math.sqrt(following**2 - up**2)
    signal = (1 - following) + rest
    slope = tuple((a - b) / (sigma - following) for a, b in zip(start, end, strict=True))
    clean = add(start, -sigma, slope)
    fresh = _cast(tools.noise(kind), torch.float64)
    return tools.blend(add(mix(signal, clean, rest, slope), up, fresh))


def _denoise(tools: Tools, x: State, sigma: float) -> State:
    return _cast(tools.denoise(_cast(x, torch.float32), sigma).x0, torch.float64)


def _cast(x: State, dtype: torch.dtype) -> State:
    return tuple(stream.to(dtype) for stream in x)


def _phi1(z: float) -> float:
    return math.expm1(z) / z


def _phi2(z: float) -> float:
    return (math.expm1(z) - z) / z**2
