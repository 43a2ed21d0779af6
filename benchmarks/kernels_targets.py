"""What `python -m benchmarks kernels --check` demands, and of which cards. Source: issue 5."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.kernels_run import Outcome


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that must be at least this, in all trials whose whole name fits, on some cards."""

    trials: str
    figure: str
    at_least: float
    cards: str = "NVIDIA H200"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target of one trial: what came out."""

    trial: str
    target: Target
    value: float | None

    @property
    def met(self) -> bool:
        """Tell whether the figure exists and is large enough."""
        return self.value is not None and self.value >= self.target.at_least

    @property
    def line(self) -> str:
        """Say it in a few words."""
        value = "not measured" if self.value is None else f"{self.value:.2f}"
        return f"{self.trial}: {self.target.figure} {value} (at least {self.target.at_least:g})"


TARGETS: Sequence[Target] = (
    Target(r"dequant (Q4_K|Q5_K|Q6_K|Q8_0) bf16", "of ceiling", 0.8),
    Target(r"dequant Q8_0 bf16", "times torch ops", 1.8),
    Target(r"dequant Q4_K bf16", "times torch ops", 4.5),
    Target(r"dequant (Q5_K|Q6_K) bf16", "times torch ops", 6.0),
    Target(r"linear (8192|32768)x.*", "times cuBLAS bf16", 1.5),
    Target(r"block 14080 tokens", "times bf16 cuBLAS + SDPA", 1.3),
)


def judge(outcomes: Sequence[Outcome], machine: str) -> list[Verdict]:
    """Compare; a target of this card whose trial was not run, or is red, is missed."""
    verdicts: list[Verdict] = []
    for target in TARGETS:
        if not re.fullmatch(target.cards, machine):
            continue
        fitting = [one for one in outcomes if re.fullmatch(target.trials, one.trial.name)]
        if not fitting:
            verdicts.append(Verdict(target.trials, target, None))
        for one in fitting:
            verdicts.append(Verdict(one.trial.name, target, one.figures.get(target.figure)))
    return verdicts
