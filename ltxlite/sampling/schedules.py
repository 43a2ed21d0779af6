"""Noise schedules: falling sigmas from at most 1 down to 0, as plain numbers (no torch).

Sources: LTX-2 400fd31 ltx_core components/schedulers.py and ltx_pipelines constants;
ComfyUI samplers.py for `simple`, `linear_quadratic` and `beta`.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TypeAlias

from ltxlite.errors import RequestError
from ltxlite.sampling.beta import beta_quantile

Schedule: TypeAlias = tuple[float, ...]

DEFAULT_TOKENS = 4096  # what official pipelines assume, except HQ, which counts the stage's tokens
MOST_STEPS = 1000
FLOW_SHIFT = 2.37  # ComfyUI's fixed shift for LTX, under `simple`, `beta` and every `denoise`
_TABLE_SIZE = 10_000
_SMALLEST_DROP = 1e-7  # samplers round to fp32, which below 1 is spaced by 6e-8

TABLES: Mapping[str, Schedule] = MappingProxyType(
    {
        "distilled": (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0),
        "stage2": (0.909375, 0.725, 0.421875, 0.0),
        "stage2-comfy": (0.85, 0.725, 0.4219, 0.0),
        "stage2-inpaint": (0.725, 0.4219, 0.0),
        "stage2-hdr": (0.909375, 0.725, 0.0),
        "stage2-tdp": (0.625, 0.4, 0.0),
        "community-4": (1.0, 0.85, 0.725, 0.4219, 0.0),
        "david-show-1": (1.0, 0.995, 0.99, 0.9875, 0.975, 0.65, 0.28, 0.07, 0.0),
        "two-step": (0.85, 0.4219, 0.0),
        "one-step": (0.85, 0.0),
    }
)


def ltx(
    steps: int,
    tokens: int = DEFAULT_TOKENS,
    max_shift: float = 2.05,
    base_shift: float = 0.95,
    stretch: bool = True,
    terminal: float = 0.1,
) -> Schedule:
    """Return the schedule of undistilled models: shifted by token count, stretched to `terminal`.

    tokens: video tokens of the stage; the shift grows linearly from base_shift at 1024 through
    max_shift at 4096, without bounds.  terminal: the last sigma above 0, if stretch.
    Computed in fp32 in the reference's order, whose rounding counts at high shifts (24,576 tokens:
    9e-5); where that would collapse (from about 40,000 tokens) in closed form instead.
    One step is (1, 0): the reference's stretch then divides rounding noise by itself.
    Raises RequestError for values outside their range.
    """
    _check_steps(steps)
    _check_range("tokens", tokens, 1, 1_000_000)
    _check_range("terminal", terminal, 0.001, 0.999)
    slope = (max_shift - base_shift) / (4096 - 1024)
    shift = tokens * slope + (base_shift - 1024 * slope)
    _check_range(f"shift at {tokens} tokens", shift, -50, 50)
    if steps == 1:
        return (1.0, 0.0)
    last = terminal if stretch else None
    rounded = _ltx_float32(steps, shift, last)
    return rounded if _falls(rounded) else _ltx_closed(steps, shift, last)


def linear_quadratic(
    steps: int, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> Schedule:
    """Return a schedule that falls evenly by `threshold_noise`, then quadratically to 0.

    linear_steps: how many steps the even part takes, half of them if None.  With 8 steps it is
    the distilled table.  Raises RequestError for values outside their range.
    """
    _check_steps(steps)
    if steps == 1:
        return (1.0, 0.0)
    linear = steps // 2 if linear_steps is None else linear_steps
    _check_range("linear_steps", linear, 1, steps - 1)
    _check_range("threshold_noise", threshold_noise, 1e-6, 0.999)
    # The quadratic a i² + b i + c continues the line with its slope and reaches 1 at i = steps.
    rest = steps - linear
    excess = linear - threshold_noise * steps
    a = excess / (linear * rest**2)
    b = threshold_noise / linear - 2 * excess / rest**2
    c = a * linear**2
    even = (1 - i * threshold_noise / linear for i in range(linear))
    curved = (1 - (a * i**2 + b * i + c) for i in range(linear, steps))
    return check_sigmas((*even, *curved, 0.0), "linear-quadratic schedule")


def simple(steps: int) -> Schedule:
    """Return evenly spaced entries of the flow table; simple(8): 1, .9868, .9698, .9469, ..."""
    _check_steps(steps)
    return (*(_table(_TABLE_SIZE - k * _TABLE_SIZE // steps) for k in range(steps)), 0.0)


def beta(steps: int, alpha: float = 0.6, beta: float = 0.6) -> Schedule:
    """Return entries of the flow table at quantiles of a beta distribution.

    Entries that coincide are kept once, so there may be fewer than `steps` steps.
    Raises RequestError for values outside their range.
    """
    _check_steps(steps)
    _check_range("alpha", alpha, 0.05, 20)
    _check_range("beta", beta, 0.05, 20)
    shares = (1 - i / steps for i in range(steps))
    # round() takes halves to the even neighbour, as the reference's rint does.
    picks = (round(beta_quantile(alpha, beta, share) * (_TABLE_SIZE - 1)) for share in shares)
    return (*(_table(index + 1) for index in dict.fromkeys(picks)), 0.0)


def sub_schedule(denoise: float, steps: int) -> Schedule:
    """Return the last `steps` steps of the `simple` schedule of int(steps / denoise) steps.

    This is ComfyUI's `denoise`: a position in the schedule, not a sigma; 0.47 starts near 0.91.
    Raises RequestError unless 0.0001 <= denoise <= 1, or if the steps outnumber the table.
    """
    _check_steps(steps)
    _check_range("denoise", denoise, 1e-4, 1)
    total = int(steps / denoise)
    if total > _TABLE_SIZE:
        raise RequestError(f"denoise {denoise:g} with {steps} steps is too fine; raise denoise")
    entries = (_table(_TABLE_SIZE - k * _TABLE_SIZE // total) for k in range(total - steps, total))
    return (*entries, 0.0)


def sigma_of_denoise(denoise: float) -> float:
    """Return the sigma at a schedule position, 0.0001 to 1: 0.35 -> 0.852, 0.5 -> 0.915."""
    _check_range("denoise", denoise, 1e-4, 1)
    return _flow(denoise)


def denoise_of_sigma(sigma: float) -> float:
    """Return the schedule position of a sigma, 0 < sigma <= 1: 0.85 -> 0.346."""
    _check_range("sigma", sigma, 1e-9, 1)
    return 1 / (1 + math.exp(FLOW_SHIFT) * (1 / sigma - 1))


def check_sigmas(sigmas: Sequence[float], where: str = "sigmas") -> Schedule:
    """Return a schedule as a tuple if it falls strictly from at most 1 to exactly 0.

    Raises RequestError that names the first entry at fault.
    """
    if len(sigmas) < 2:
        raise RequestError(f"{where} needs at least two values, got {list(sigmas)}")
    for index, sigma in enumerate(sigmas):
        if not 0 <= sigma <= 1:
            raise RequestError(f"{where}[{index}] is {sigma:g}, wanted 0 to 1")
        if index and sigma > sigmas[index - 1] - _SMALLEST_DROP:
            raise RequestError(
                f"{where}[{index}] is {sigma:g} after {sigmas[index - 1]:g}; sigmas must fall"
            )
    if sigmas[-1] != 0:
        raise RequestError(f"{where} ends in {sigmas[-1]:g}; append 0")
    return tuple(float(sigma) for sigma in sigmas)


def _ltx_float32(steps: int, shift: float, last: float | None) -> Schedule:
    import numpy as np

    # A ramp filled from both ends with fused multiply-adds, as torch.linspace does it.
    width = float(np.float32(1 / steps))
    half = (steps + 1) // 2
    falling = [1 - width * i for i in range(half)]
    rising = [width * (steps - i) for i in range(half, steps)]
    ramp = np.array(falling + rising, dtype=np.float32)
    one = np.float32(1)
    weight = np.float32(math.exp(shift))
    sigmas = one / (weight + (one / ramp - one)) * weight
    if last is not None:
        rest = one - sigmas
        with np.errstate(invalid="ignore", divide="ignore"):
            sigmas = one - rest / (rest[-1] / np.float32(1 - last))
    return (*map(float, sigmas), 0.0)


def _ltx_closed(steps: int, shift: float, last: float | None) -> Schedule:
    # 1 - sigma = odds / (e^shift + odds), which is free of cancellation at any shift.
    odds = [i / (steps - i) for i in range(steps)]
    rest = [odd / (math.exp(shift) + odd) for odd in odds]
    scale = 1.0 if last is None else (1 - last) / rest[-1]
    return (*(1 - value * scale for value in rest), 0.0)


def _table(entry: int) -> float:
    return _flow(entry / _TABLE_SIZE)


def _flow(position: float) -> float:
    return 1 / (1 + math.exp(-FLOW_SHIFT) * (1 / position - 1))


def _falls(sigmas: Sequence[float]) -> bool:
    return all(a > b for a, b in pairwise(sigmas))


def _check_steps(steps: int) -> None:
    _check_range("steps", steps, 1, MOST_STEPS)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestError(f"schedule {name} is {value!r}, wanted {low:g} to {high:g}")
