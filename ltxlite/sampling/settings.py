"""What a job file may say about guidance and samplers; plain data, and no torch on import."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from ltxlite.errors import RequestError

Pass = Literal["cond", "uncond", "perturbed", "isolated"]
GuidanceMode = Literal["cfg", "cfg_star", "apg"]
Options = Mapping[str, float | bool]


@dataclass(frozen=True, slots=True)
class Guidance:
    """How the predictions of one stream (video or audio) are combined; the default is none.

    cfg: weight of the prompt against the negative prompt, 1 = off; a list gives one value a step,
      its last value serves all further steps.
    stg: weight against the prediction with self-attention bypassed in `stg_blocks`, 0 = off.
    modality: weight against the prediction without audio-video cross-attention, 1 = off.
    rescale: share (0..1) by which the result is brought back to the spread of the prompt's own.
    skip_step: k > 0 evaluates this stream on every (k+1)-th step only and reuses the result.
    mode: plain difference, CFG-star (negative scaled onto the positive) or APG (difference split
      along and across the positive; `apg_eta` weighs the first, `apg_norm_threshold` caps it all).
    Raises RequestError for values outside their range.
    Source: LTX-2 400fd31, ltx_core components/guiders.
    """

    cfg: float | tuple[float, ...] = 1.0
    stg: float = 0.0
    rescale: float = 0.0
    modality: float = 1.0
    stg_blocks: tuple[int, ...] = ()
    skip_step: int = 0
    mode: GuidanceMode = "cfg"
    apg_eta: float = 1.0
    apg_norm_threshold: float = 0.0

    def __post_init__(self) -> None:
        self._listify("cfg")
        self._listify("stg_blocks")
        for value in self._cfg_values():
            _check("guidance cfg", value, 0, 100)
        _check("guidance stg", self.stg, 0, 100)
        _check("guidance rescale", self.rescale, 0, 1)
        _check("guidance modality", self.modality, 0, 100)
        _check("guidance apg_eta", self.apg_eta, -100, 100)
        _check("guidance apg_norm_threshold", self.apg_norm_threshold, 0, 1e9)
        self._check_structure()

    def cfg_at(self, step: int) -> float:
        """Return the guidance scale of a step, counted from 0."""
        values = self._cfg_values()
        return values[min(step, len(values) - 1)]

    def skips(self, step: int) -> bool:
        """Tell whether this stream reuses its last guided prediction at a step."""
        return self.skip_step > 0 and step % (self.skip_step + 1) != 0

    def passes(self, step: int) -> frozenset[Pass]:
        """Return the model evaluations that this stream needs at a step; none if it skips."""
        if self.skips(step):
            return frozenset()
        optional: dict[Pass, bool] = {
            "uncond": self.cfg_at(step) != 1,
            "perturbed": self.stg != 0,
            "isolated": self.modality != 1,
        }
        return frozenset({"cond", *(name for name, needed in optional.items() if needed)})

    def _cfg_values(self) -> tuple[float, ...]:
        return self.cfg if isinstance(self.cfg, tuple) else (self.cfg,)

    def _listify(self, field: str) -> None:
        # A job file is JSON: its lists become tuples here, once.
        value = getattr(self, field)
        if isinstance(value, list):
            object.__setattr__(self, field, tuple(value))

    def _check_structure(self) -> None:
        if not self._cfg_values():
            raise RequestError("guidance cfg is an empty list; give one value, or one value a step")
        if not _is_count(self.skip_step):
            raise RequestError(f"guidance skip_step is {self.skip_step!r}, wanted 0, 1, 2, ...")
        if not isinstance(self.stg_blocks, tuple) or not all(map(_is_count, self.stg_blocks)):
            raise RequestError(
                f"guidance stg_blocks is {self.stg_blocks!r}, wanted a list of block numbers"
            )
        if self.stg != 0 and not self.stg_blocks:
            raise RequestError(
                f"guidance stg is {self.stg:g} but stg_blocks is empty; "
                "name the blocks to perturb (28 for LTX-2.3, 29 for 2.0) or set stg to 0"
            )
        if self.mode not in get_args(GuidanceMode):
            modes = ", ".join(get_args(GuidanceMode))
            raise RequestError(f"guidance mode is {self.mode!r}, choose one of {modes}")


@dataclass(frozen=True, slots=True)
class Statistics:
    """How a stage keeps the picture's latent channels from drifting away over a clip.

    adain: how far mean and deviation of the result's channels are brought to those of what the
      stage begins from: the stage before, a source's kept frames, or the first image.
    adain_steps: the same for the prediction of each step; the last one serves all further steps.
    per_frame: each latent frame by itself instead of the whole clip.
    statnorm, statnorm_steps: how far they are brought to mean 0 and deviation 1, as measured on
      the values within the central `percentile`; clip: what lies beyond is cut there.
    Factors below 0 and above 1 go further than that.  Raises RequestError beyond -10 to 10.
    Source: ComfyUI-LTXVideo, latent_norm (features.md K1 to K3).
    """

    adain: float = 0.0
    adain_steps: tuple[float, ...] = ()
    per_frame: bool = False
    statnorm: float = 0.0
    statnorm_steps: tuple[float, ...] = ()
    percentile: float = 95.0
    clip: bool = False

    def __post_init__(self) -> None:
        for factor in (self.adain, *self.adain_steps):
            _check("adain", factor, -10, 10)
        for factor in (self.statnorm, *self.statnorm_steps):
            _check("statnorm", factor, -10, 10)
        _check("statnorm percentile", self.percentile, 50, 100)

    @property
    def follows(self) -> bool:
        """Tell whether it needs something to follow."""
        return any((self.adain, *self.adain_steps))

    @property
    def is_active(self) -> bool:
        """Tell whether it changes anything at all."""
        return self.follows or any((self.statnorm, *self.statnorm_steps))


def passes(step: int, *streams: Guidance) -> frozenset[Pass]:
    """Return the model evaluations of a step: those that at least one of the streams needs.

    Empty when every stream skips the step, which then costs no evaluation.
    """
    return frozenset[Pass]().union(*(guidance.passes(step) for guidance in streams))


# Every sampler by name, with the options it takes and their defaults: eta and s_noise scale the
# fresh noise of a step, gamma the velocity extrapolation, bong refines the anchor of a substep,
# max_stage bounds the order of the solver.
SAMPLER_OPTIONS: Mapping[str, Options] = MappingProxyType(
    {
        "euler": {},
        "euler_gradient": {"gamma": 2.0},
        "euler_ancestral": {"eta": 1.0, "s_noise": 1.0},
        "euler_cfg_pp": {},
        "euler_ancestral_cfg_pp": {"eta": 1.0, "s_noise": 1.0},
        "dpmpp_2m": {},
        "er_sde": {"s_noise": 1.0, "max_stage": 3},
        "res_2s": {"eta": 0.5, "bong": True},
    }
)
_OPTION_RANGES = MappingProxyType(
    {"eta": (0, 1), "s_noise": (0, 10), "gamma": (0, 10), "max_stage": (1, 3), "bong": (0, 1)}
)


def check_sampler(name: str, options: Options = MappingProxyType({})) -> None:
    """Refuse an unknown sampler, and options that it does not take, with a RequestError."""
    if name not in SAMPLER_OPTIONS:
        raise RequestError(f"sampler {name!r} is unknown, choose one of {_names(SAMPLER_OPTIONS)}")
    accepted = SAMPLER_OPTIONS[name]
    for option, value in options.items():
        if option not in accepted:
            raise RequestError(f"{name} has no option {option!r}, it takes {_names(accepted)}")
        _check(f"{name} {option}", value, *_OPTION_RANGES[option])
        if not isinstance(accepted[option], float) and value != int(value):
            raise RequestError(f"{name} {option} is {value!r}, wanted a whole number")


def _names(table: Mapping[str, object]) -> str:
    return ", ".join(table) or "none"


def _check(where: str, value: object, low: float, high: float) -> None:
    # Written so that NaN and infinities fail the comparison.
    if not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{where} is {value!r}, wanted a number from {low:g} to {high:g}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
