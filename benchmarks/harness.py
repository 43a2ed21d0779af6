"""The one way numbers are made here: correct first, then interleaved, then judged.

A benchmark yields cases; a case builds contestants, ours first. All of them must agree with ours
before anything is timed; then they run in turns, so that a slow minute of the machine hits all.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ltxlite.memory.meter import ActivationMeter

Outputs = Mapping[str, Tensor]


class GateError(Exception):
    """A contestant's outputs differ from ours: there are no numbers."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One implementation: what runs it, or why it cannot run."""

    name: str
    run: Callable[[], Outputs] | None
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: facts for the header, the tolerance of the gate, the contestants.

    elements: how many a run handles, for times of one.  figures: more of them, which `build` adds.
    """

    name: str
    facts: Mapping[str, Any]
    tolerance: float
    build: Callable[[], Iterable[Contestant]]
    device: str = "cpu"
    elements: int | None = None
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Row:
    """What was measured of one contestant; all None if it could not run."""

    name: str
    missing: str | None = None
    error: float | None = None
    peak_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float | None:
        """Median time of a run."""
        return statistics.median(self.samples_ms) if self.samples_ms else None

    def percentile_ms(self, percent: int) -> float | None:
        """Return a percentile of the run times, interpolated."""
        if len(self.samples_ms) < 2:
            return self.median_ms
        return statistics.quantiles(self.samples_ms, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True, slots=True)
class Result:
    """A measured case: one row a contestant, ours first, and the figures that targets name."""

    case: Case
    rows: Sequence[Row]

    @property
    def figures(self) -> dict[str, float]:
        """Our cost over the best rival's; absent where no rival ran."""
        ours, rivals = self.rows[0], [row for row in self.rows[1:] if row.missing is None]
        figures = dict(self.case.figures)
        if self.case.elements and ours.median_ms:
            figures["ns_per_element"] = ours.median_ms * 1e6 / self.case.elements
        times = [row.median_ms for row in rivals if row.median_ms]
        if times and ours.median_ms:
            figures["time_ratio"] = ours.median_ms / min(times)
        peaks = [row.peak_bytes for row in rivals if row.peak_bytes]
        if peaks and ours.peak_bytes:
            figures["peak_ratio"] = ours.peak_bytes / min(peaks)
        return figures


def measure(case: Case, runs: int) -> Result:
    """Gate, then time a case.

    Raises GateError if a contestant's output differs from ours by more than the tolerance.
    """
    contestants = list(case.build())
    rows = [Row(contestant.name, contestant.missing) for contestant in contestants]
    able = [
        (row, contestant.run)
        for row, contestant in zip(rows, contestants, strict=True)
        if contestant.run is not None
    ]
    with torch.inference_mode():
        _gate(case, able)
        _interleave(case, able, runs)
    return Result(case, rows)


def _gate(case: Case, able: Sequence[tuple[Row, Callable[[], Outputs]]]) -> None:
    """Run everyone once, which also warms them up, metering memory and comparing outputs."""
    expected: Outputs | None = None
    for row, run in able:
        with ActivationMeter(case.device) as meter:
            outputs = run()
        row.peak_bytes = meter.peak_bytes
        expected = outputs if expected is None else expected
        row.error = relative_error(outputs, expected)
        if not row.error <= case.tolerance:
            raise GateError(
                f"{case.name}: {row.name} and {able[0][0].name} differ by {row.error:.2g} of the "
                f"largest value, allowed {case.tolerance:g}; nothing was timed"
            )


def relative_error(actual: Outputs, expected: Outputs) -> float:
    """Return the largest difference over the largest value, of the worst output; may be NaN."""
    if actual.keys() != expected.keys():
        return float("nan")
    errors = [
        (actual[name].double() - wanted.double()).abs().max() / wanted.double().abs().max()
        for name, wanted in expected.items()
    ]
    return float(torch.stack(errors).max())


def _interleave(case: Case, able: Sequence[tuple[Row, Callable[[], Outputs]]], runs: int) -> None:
    for turn in range(runs):
        first = turn % len(able)  # nobody always runs behind the same neighbour's caches
        for row, run in (*able[first:], *able[:first]):
            row.samples_ms.append(_time_ms(run, case.device))


def _time_ms(run: Callable[[], Outputs], device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return (time.perf_counter() - start) * 1e3


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
