"""Flags that keep the picture's colours from drifting: statistics of its latent channels."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ltxlite.errors import RequestError

if TYPE_CHECKING:
    from ltxlite.conditions import Conditions
    from ltxlite.request import Stage


def add_statistics(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = parser.add_argument_group("colour drift (statistics of the picture's latent channels)")
    group.add_argument(
        "--adain",
        metavar="X[,Y]",
        help="after each stage, bring them so far to those that it began from (stage before, "
        "source, first image); 0.2 is usual; the last value serves further stages (default 0)",
    )
    group.add_argument(
        "--adain-steps",
        action="append",
        metavar="X,Y,...",
        help="the same at each step of a stage, e.g. 0.3,0.2,0.1,0; repeat it for the next stage",
    )
    group.add_argument("--adain-per-frame", action="store_true", help="each latent frame by itself")
    group.add_argument(
        "--statnorm",
        metavar="X[,Y]",
        help="after each stage, bring them so far to mean 0 and deviation 1 (default 0)",
    )
    group.add_argument(
        "--statnorm-steps", action="append", metavar="X,Y,...", help="the same at each step"
    )
    group.add_argument(
        "--statnorm-percentile",
        type=float,
        metavar="P",
        help="share of values that is measured, 50 to 100 (default 95)",
    )
    group.add_argument("--statnorm-clip", action="store_true", help="cut values beyond that share")


def with_statistics(
    stages: Sequence["Stage"], options: argparse.Namespace, conditions: "Conditions"
) -> tuple["Stage", ...]:
    """Return the stages with what the flags say about the picture's channels.

    A single --adain leaves out a first stage that begins from noise alone.  Raises RequestError
    for what cannot be read, or is said of more stages than there are.
    """
    from ltxlite.sampling.settings import Statistics

    adain, statnorm = (_numbers(options, name) for name in ("adain", "statnorm"))
    steps, normed = (_lists(options, name, stages) for name in ("adain-steps", "statnorm-steps"))
    if options.adain_per_frame and not adain and not steps:
        raise RequestError("--adain-per-frame without --adain or --adain-steps")
    said = options.statnorm_percentile is not None or options.statnorm_clip
    if said and not statnorm and not normed:
        raise RequestError("--statnorm-percentile, --statnorm-clip: say how far with --statnorm")
    if len(adain) == 1 and len(stages) > 1 and not (conditions.images or conditions.source):
        adain = (0.0, *adain)
    return tuple(
        replace(
            stage,
            statistics=Statistics(
                adain=_at(adain, number),
                adain_steps=steps[number] if number < len(steps) else (),
                per_frame=options.adain_per_frame,
                statnorm=_at(statnorm, number),
                statnorm_steps=normed[number] if number < len(normed) else (),
                percentile=options.statnorm_percentile or 95.0,
                clip=options.statnorm_clip,
            ),
        )
        for number, stage in enumerate(stages)
    )


def _at(factors: tuple[float, ...], number: int) -> float:
    return factors[min(number, len(factors) - 1)] if factors else 0.0


def _numbers(options: argparse.Namespace, name: str) -> tuple[float, ...]:
    text = getattr(options, name)
    return () if text is None else _parsed(name, text)


def _lists(
    options: argparse.Namespace, name: str, stages: Sequence["Stage"]
) -> tuple[tuple[float, ...], ...]:
    texts = getattr(options, name.replace("-", "_")) or []
    if len(texts) > len(stages):
        raise RequestError(f"--{name} given {len(texts)} times for {len(stages)} stages")
    return tuple(_parsed(name, text) for text in texts)


def _parsed(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--{name} {text!r}: wanted numbers such as 0.2 or 0.3,0.1") from None
