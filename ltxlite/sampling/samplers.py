"""The table of samplers: by name, what to call and what it will ask for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ltxlite.sampling.cfg_pp import euler_ancestral_cfg_pp, euler_cfg_pp
from ltxlite.sampling.contract import NoiseKind, Prediction, Sigmas, State, Tools
from ltxlite.sampling.euler import euler, euler_ancestral, euler_gradient
from ltxlite.sampling.multistep import dpmpp_2m, er_sde
from ltxlite.sampling.res2s import res_2s
from ltxlite.sampling.settings import Options, check_sampler

__all__ = ["SAMPLERS", "Prediction", "Sampler", "Sigmas", "State", "Tools", "sample"]


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler's function and its needs.

    run: (state, sigmas, tools, options by keyword) -> state.
    needs_uncond: predictions must carry the negative prompt's, at every step and any cfg.
    noise: the kinds of noise it draws, each wanting its own generator; standardised: see `noise`.
    per_step, extra: evaluations of a step, and after the last step.
    """

    run: Callable[..., State]
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
        "euler_gradient": Sampler(euler_gradient),
        "euler_ancestral": Sampler(euler_ancestral, noise=("step",)),
        "euler_cfg_pp": Sampler(euler_cfg_pp, needs_uncond=True),
        "euler_ancestral_cfg_pp": Sampler(
            euler_ancestral_cfg_pp, needs_uncond=True, noise=("step",)
        ),
        "dpmpp_2m": Sampler(dpmpp_2m),
        "er_sde": Sampler(er_sde, noise=("step",)),
        "res_2s": Sampler(res_2s, noise=("step", "sub"), standardised=True, per_step=2, extra=1),
    }
)


def sample(
    name: str, x: State, sigmas: Sigmas, tools: Tools, options: Options = MappingProxyType({})
) -> State:
    """Run the sampler of that name with its options; see `settings.SAMPLER_OPTIONS` for both.

    x: (B, T, C) fp32 a stream.  Returns the same shapes, fp32.
    Raises RequestError for an unknown name or option.
    """
    check_sampler(name, options)
    return SAMPLERS[name].run(x, sigmas, tools, **options)
