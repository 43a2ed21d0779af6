"""How a kernel's number is made: correct first, then in turns beside its rivals, by CUDA events.

A trial builds contenders, ours first, that work on the same inputs; each contender's output is
compared with float64 before anything is timed, and one that is off leaves its trial red, without
numbers. Inputs rotate past the second-level cache. The host is kept out of the figure: the card is
put to sleep while a sample's launches are queued.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row

SAMPLE_MS = 3.0  # of work in a sample, at least one run
MOST_RUNS = 50  # in a sample
ROTATED_BYTES = 160 << 20  # inputs that take turns: two to three times the largest cache (H200)
CLOCK_HZ = 2.0e9  # what `torch.cuda._sleep` counts by, roughly
# What a library may raise that cannot do what is asked on this card or in this version.
UNABLE: tuple[type[Exception], ...] = (RuntimeError, TypeError, AttributeError, ValueError)
try:
    from triton.errors import TritonError

    UNABLE += (TritonError,)  # a compilation that fails, too much shared memory
except ImportError:
    pass


@dataclass(frozen=True, slots=True)
class Bench:
    """Where trials run, how large they are, and until when.

    small: tiny sizes on a CPU, through the twins: tries the program, measures nothing.
    """

    device: str
    small: bool = False
    turns: int = 7
    deadline: float = math.inf

    @property
    def cuda(self) -> bool:
        """Whether there is something to measure."""
        return self.device == "cuda"

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return fresh N(0, 1) values."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

    def copies(self, nbytes: int) -> int:
        """Return how many inputs of that size take turns."""
        return 1 if self.small else max(1, min(16, -(-ROTATED_BYTES // max(1, nbytes))))


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute: what runs it, given the number of a turn.

    tolerance: of its error against float64; None where there is no result to compare.  work: what
    its rate measures, of `project_cards.RATES`.  ours: whether a failure is ours, and not that of a
    library that cannot.
    """

    name: str
    run: Callable[[int], Any] | None
    tolerance: float | None = None
    work: str | None = None
    ours: bool = False
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A trial's contenders, ours first, and the error of an output against float64."""

    contenders: Sequence[Contender]
    error: Callable[[Any], float]


@dataclass(frozen=True, slots=True)
class Trial:
    """A row of the table of what is measured.

    family: the kernel, as checks name it.  flops, nbytes: the work of one run.  ceiling: of
    CEILINGS, what the rate is compared with.  build: makes inputs and contenders.
    """

    name: str
    family: str
    facts: Mapping[str, Any]
    build: Callable[[Bench], Prepared]
    flops: float = 0.0
    nbytes: float = 0.0
    ceiling: str = "copy"


@dataclass(slots=True)
class Outcome:
    """What came of a trial: rows, or why it is red or was left out."""

    trial: Trial
    rows: list[Row] = field(default_factory=list)
    work: dict[str, str] = field(default_factory=dict)
    red: str | None = None
    skipped: str | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def rate(self, row: Row) -> float | None:
        """Return TFLOP/s where the trial has operations, else GB/s."""
        if not row.median_ms:
            return None
        if self.trial.flops:
            return self.trial.flops / row.median_ms / 1e9
        return self.trial.nbytes / row.median_ms / 1e6


class RedError(Exception):
    """A kernel's output is wrong, or a kernel of ours does not run."""


def measure(trial: Trial, bench: Bench) -> Outcome:
    """Compare with float64, then time; a red trial has no numbers."""
    outcome = Outcome(trial)
    if bench.late:
        outcome.skipped = "out of time"
        return outcome
    try:
        with torch.inference_mode():
            prepared = trial.build(bench)
            able = list(_gated(trial, prepared, outcome, bench))
            if bench.cuda:
                _take_turns(able, bench)
                outcome.figures |= _ratios(outcome.rows)
    except RedError as error:
        outcome.red, outcome.rows = str(error), []
    except torch.OutOfMemoryError:
        outcome.skipped, outcome.rows = "it does not fit this card", []
    except UNABLE as error:  # in a build, or while timed: an access that the card refused, say
        outcome.red, outcome.rows = f"{trial.name}: {said(error)}", []
    return outcome


def said(error: Exception) -> str:
    """Return the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _gated(
    trial: Trial, prepared: Prepared, outcome: Outcome, bench: Bench
) -> Iterator[tuple[Row, Callable[[int], Any]]]:
    for contender in prepared.contenders:
        row = Row(contender.name, contender.missing)
        outcome.rows.append(row)
        if contender.run is None:
            continue
        base = _restart_peak(bench)
        try:
            with poisoned():
                found = contender.run(0)
                row.error = None if contender.tolerance is None else prepared.error(found)
        except UNABLE as error:
            row.missing = said(error)
            if contender.ours and not isinstance(error, torch.OutOfMemoryError):
                raise RedError(f"{trial.name}: {contender.name}: {row.missing}") from error
            continue
        row.peak_bytes = _peak(bench) - base if bench.cuda else None
        allowed = contender.tolerance
        if row.error is not None and allowed is not None and not row.error <= allowed:
            raise RedError(
                f"{trial.name}: {contender.name} is off by {row.error:.2g}, allowed "
                f"{allowed:g}; nothing was timed"
            )
        if contender.work is not None:
            outcome.work[contender.name] = contender.work
        yield row, contender.run


def _restart_peak(bench: Bench) -> int:
    if not bench.cuda:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(bench: Bench) -> int:
    return torch.cuda.max_memory_allocated() if bench.cuda else 0


@contextmanager
def poisoned() -> Iterator[None]:
    """Let every `torch.empty` hold NaN, or the largest integer: what is not written shows."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its one setting has no annotation
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled


def _take_turns(able: Sequence[tuple[Row, Callable[[int], Any]]], bench: Bench) -> None:
    counts = [_runs(run) for _, run in able]
    for turn in range(bench.turns):
        first = turn % max(1, len(able))
        order = [*range(first, len(able)), *range(first)]
        for at in order:
            row, run = able[at]
            row.samples_ms.append(_sample_ms(run, counts[at]))


def _runs(run: Callable[[int], Any]) -> tuple[int, float]:
    """Return the runs of a sample, and the host's seconds for queueing one; warms up besides."""
    for number in range(2):
        run(number)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(2)
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    whole = (time.perf_counter() - start) * 1e3
    return max(1, min(MOST_RUNS, math.ceil(SAMPLE_MS / max(whole, 1e-3)))), queued


def _sample_ms(run: Callable[[int], Any], count: tuple[int, float]) -> float:
    runs, queued = count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(0.03, 1.5 * runs * queued) * CLOCK_HZ))
    start.record()
    for number in range(runs):
        run(number)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / runs


def _ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Return each other contender's median over that of the first, which is ours."""
    first = rows[0].median_ms if rows else None
    if not first:
        return {}
    others = itertools.islice(rows, 1, None)
    return {f"times {row.name}": row.median_ms / first for row in others if row.median_ms}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of what is expected, in float64."""
    wanted = expected.double()
    if actual.shape != wanted.shape:
        return math.nan
    difference = (actual.double() - wanted).norm() / wanted.norm()
    return float(difference)
