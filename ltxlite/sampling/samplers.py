"""The table of samplers, what to call and what it will ask for, and the loop over steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ltxlite.sampling.cfg_pp import euler_ancestral_cfg_pp, euler_cfg_pp
from ltxlite.sampling.contract import (
    Carry,
    NoiseKind,
    Position,
    Prediction,
    Sigmas,
    State,
    Step,
    Tools,
    float32_values,
)
from ltxlite.sampling.euler import euler, euler_ancestral, euler_gradient
from ltxlite.sampling.multistep import ER_SDE_REMEMBERS, dpmpp_2m, er_sde, er_sde_sigmas
from ltxlite.sampling.res2s import res_2s, res_2s_end, res_2s_sigmas
from ltxlite.sampling.settings import Options, check_sampler

__all__ = [
    "SAMPLERS",
    "Position",
    "Prediction",
    "Sampler",
    "Sigmas",
    "State",
    "Tools",
    "continue_sampling",
    "sample",
]


def _final_state(x: State, sigma: float, tools: Tools) -> State:
    return x


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler's functions and its needs.

    step: (carry, step, tools, options by keyword) -> carry.
    sigmas: what it makes of a schedule.  end: from x after the last step to the result.
    remembers: what it carries besides x; the k-th of them only after k steps.
    needs_uncond: predictions must carry the negative prompt's, at every step and any cfg.
    noise: the kinds of noise it draws, each wanting its own generator; standardised: see `noise`.
    per_step, extra: evaluations of a step, and after the last step.
    """

    step: Callable[..., Carry]
    sigmas: Callable[[Sigmas], list[float]] = float32_values
    end: Callable[[State, float, Tools], State] = _final_state
    remembers: tuple[str, ...] = ()
    needs_uncond: bool = False
    noise: tuple[NoiseKind, ...] = ()
    standardised: bool = False
    per_step: int = 1
    extra: int = 0

    @property
    def stochastic(self) -> bool:
        """Tell whether it draws noise of its own."""
        return bool(self.noise)

    def evaluations(self, steps: int) -> int:
        """Return how often it calls the denoiser along `steps` steps."""
        return self.per_step * steps + self.extra


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "euler": Sampler(euler),
        "euler_gradient": Sampler(euler_gradient, remembers=("velocity",)),
        "euler_ancestral": Sampler(euler_ancestral, noise=("step",)),
        "euler_cfg_pp": Sampler(euler_cfg_pp, needs_uncond=True),
        "euler_ancestral_cfg_pp": Sampler(
            euler_ancestral_cfg_pp, needs_uncond=True, noise=("step",)
        ),
        "dpmpp_2m": Sampler(dpmpp_2m, remembers=("x0",)),
        "er_sde": Sampler(er_sde, er_sde_sigmas, remembers=ER_SDE_REMEMBERS, noise=("step",)),
        "res_2s": Sampler(
            res_2s,
            res_2s_sigmas,
            res_2s_end,
            noise=("step", "sub"),
            standardised=True,
            per_step=2,
            extra=1,
        ),
    }
)


def evaluation_sigmas(
    name: str, sigmas: Sigmas, options: Options = MappingProxyType({})
) -> list[float]:
    """Return every noise level that a sampler asks the denoiser about, by running it on zeros."""
    asked: list[float] = []
    nothing: State = (torch.zeros(1, 2, 2),)

    def denoise(_: State, sigma: float) -> Prediction:
        asked.append(sigma)
        return Prediction(nothing, nothing)

    sample(name, nothing, sigmas, Tools(denoise, lambda _: nothing, lambda state: state), options)
    return asked


def sample(
    name: str, x: State, sigmas: Sigmas, tools: Tools, options: Options = MappingProxyType({})
) -> State:
    """Run the sampler of that name with its options; see `settings.SAMPLER_OPTIONS` for both.

    x: (B, T, C) fp32 a stream.  Returns the same shapes, fp32.
    Raises RequestError for an unknown name or option.
    """
    return continue_sampling(name, Position(0, {"x": x}), sigmas, tools, options)


def continue_sampling(
    name: str,
    position: Position,
    sigmas: Sigmas,
    tools: Tools,
    options: Options = MappingProxyType({}),
) -> State:
    """Run a sampler from where an earlier run stood after one of its steps, to the same end.

    The tools must stand where that run's stood too: noise drawn, predictions kept for reuse.
    """
    check_sampler(name, options)
    sampler = SAMPLERS[name]
    values = sampler.sigmas(sigmas)
    while position.done < len(values) - 1:
        step = Step(position.done, values)
        carry = sampler.step(position.carry, step, tools, **options)
        if tools.after_step is not None:
            carry = tools.after_step(carry, step)
        position = position.after(carry)
        tools.report(position)
    return sampler.end(position.carry["x"], values[-1], tools)
