"""Schedules as a user writes them: `ltx:30`, `simple:steps=3,denoise=.47`, `distilled`, `.85,0`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ltxlite.errors import RequestError
from ltxlite.sampling import schedules
from ltxlite.sampling.schedules import TABLES, Schedule, check_sigmas


def parse(text: str, tokens: int | None = None) -> Schedule:
    """Return the sigmas that a text describes.

    A table by its name; a formula with its options, the first of which may be the bare number of
    steps; or the sigmas themselves, separated by commas.
    tokens: video tokens for `ltx` where the text names none; None means the official 4096.
    Raises RequestError that says what can be written.
    """
    name, _, rest = text.strip().lower().partition(":")
    if name in TABLES and not rest:
        return TABLES[name]
    if name in _FORMULAS:
        return check_sigmas(_build(name, _options(name, rest), tokens), f"sigmas {text!r}")
    if name[:1].isdigit() or name[:1] in (".", "-"):
        return check_sigmas(_numbers(text), f"sigmas {text!r}")
    raise RequestError(
        f"sigmas {text!r} is no schedule; write a formula ({_usage()}), a table "
        f"({', '.join(TABLES)}) or falling numbers such as 0.85,0.725,0.4219,0"
    )


def _simple(steps: int, denoise: float = 1.0) -> Schedule:
    return schedules.simple(steps) if denoise == 1 else schedules.sub_schedule(denoise, steps)


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text]


@dataclass(frozen=True, slots=True)
class _Formula:
    build: Callable[..., Schedule]
    options: Mapping[str, Callable[[str], Any]]


_FORMULAS: Mapping[str, _Formula] = MappingProxyType(
    {
        "ltx": _Formula(
            schedules.ltx,
            {
                "steps": int,
                "tokens": int,
                "max_shift": float,
                "base_shift": float,
                "stretch": _flag,
                "terminal": float,
            },
        ),
        "linq": _Formula(
            schedules.linear_quadratic,
            {"steps": int, "threshold_noise": float, "linear_steps": int},
        ),
        "simple": _Formula(_simple, {"steps": int, "denoise": float}),
        "beta": _Formula(schedules.beta, {"steps": int, "alpha": float, "beta": float}),
    }
)


def _build(name: str, options: Mapping[str, Any], tokens: int | None) -> Schedule:
    if name == "ltx" and tokens is not None:
        options = {"tokens": tokens, **options}
    return _FORMULAS[name].build(**options)


def _options(name: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for index, item in enumerate(text.split(",") if text.strip() else ()):
        key, equals, value = item.partition("=")
        if index == 0 and not equals:
            key, value = "steps", item
        options[key.strip()] = _option(name, key.strip(), value.strip())
    if "steps" not in options:
        raise RequestError(f"sigmas {name}:{text} lacks the number of steps; write {name}:8")
    return options


def _option(name: str, key: str, text: str) -> Any:
    readers = _FORMULAS[name].options
    if key not in readers:
        raise RequestError(f"sigmas {name} has no option {key!r}, it takes {', '.join(readers)}")
    try:
        return readers[key](text)
    except (ValueError, KeyError):
        raise RequestError(f"sigmas {name}: {key}={text!r} cannot be read; try {name}:8") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise RequestError(
            f"sigmas {text!r} is no list of numbers; write them as 0.85,0.725,0.4219,0"
        ) from None


def _usage() -> str:
    return "; ".join(f"{name}:{','.join(form.options)}" for name, form in _FORMULAS.items())
