"""Reads a converted file back: its header, and the values of some or all of its rows.

What is read back also gives the report of errors, so that it speaks of the file and not of memory.
Source: formats.md 4.2, step 7; limits from the table of formats.md 2.0.
"""

import math
import random
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltxlite.convert.layout import Key, Layout
from ltxlite.convert.plan import Plan
from ltxlite.convert.rows import Encoder, Planned, Rows, decoded
from ltxlite.errors import CheckpointError
from ltxlite.progress import Clock
from ltxlite_quant.containers import open_container
from ltxlite_quant.formats import byte_shape
from ltxlite_quant.gguf import GgufFile

SHARES = {"full": 1.0, "sample": 0.01, "none": 0.0}
_RUNS = 8  # of neighbouring rows, spread over a tensor
# Relative error of heavy-tailed weights (t(4) or so), and how much more is still no reason to look.
_EXPECTED = {
    "Q8_0": 0.0090,
    "Q6_K": 0.0275,
    "Q5_1": 0.0527,
    "Q5_K": 0.0512,
    "Q5_0": 0.0711,
    "Q4_1": 0.1088,
    "Q4_K": 0.1014,
    "Q4_0": 0.1386,
    "IQ4_NL": 0.1082,
    "IQ4_XS": 0.1091,
    "Q3_K": 0.1979,
    "Q2_K": 0.3785,
    "MXFP4": 0.1495,
    "NVFP4": 0.1032,
}
_TOLERANCE = 1.3


@dataclass(frozen=True, slots=True)
class Check:
    """How much is read back, and how it is computed again if in doubt."""

    share: float
    encode: Encoder


@dataclass(frozen=True, slots=True)
class GroupError:
    """How far tensors of one kind are from their source: ||w' - w|| / ||w|| over all of them.

    group: their common name, N for numbers.  weights: how many were compared.
    weighted_error: the same with each input's importance as a weight of its squares, if there is.
    """

    group: str
    format: str
    tensors: int
    weights: int
    relative_error: float
    weighted_error: float | None = None


@dataclass(slots=True)
class _Sums:
    error: float = 0.0
    size: float = 0.0
    weights: int = 0
    tensors: int = 0
    weighted: tuple[float, float] | None = None  # error and size, weighted

    def add(self, other: "_Sums") -> None:
        self.error += other.error
        self.size += other.size
        if other.weighted is not None:
            error, size = self.weighted or (0.0, 0.0)
            self.weighted = error + other.weighted[0], size + other.weighted[1]
        self.weights += other.weights
        self.tensors += other.tensors

    @property
    def relative(self) -> float:
        return _relative(self.error, self.size)

    @property
    def weighted_relative(self) -> float | None:
        return None if self.weighted is None else _relative(*self.weighted)

    @property
    def judged(self) -> float:
        # What was made small: with importances, inputs that hardly count may be far off.
        return self.relative if self.weighted is None else _relative(*self.weighted)


def check_header(path: Path, plan: Plan, layout: Layout) -> None:
    """Raise CheckpointError unless our reader finds exactly what was planned in the header."""
    with open_container(path) as file:
        assert isinstance(file, GgufFile)
        got = {n: (e.shape, e.format.name, e.offset) for n, e in file.tensors.items()}
        wanted = {t.name: (t.shape, t.format.name, t.offset) for t in layout.tensors}
        keys = {name: _read_back(key) for name, key in plan.keys.items()}
        if got != wanted or dict(file.metadata) != keys:
            raise _damaged(path, "its header")


def compare(
    path: Path, plan: Plan, check: Check, clock: Clock
) -> tuple[list[GroupError], list[str]]:
    """Compare a share of every tensor's rows with the source; at least one row of each.

    Returns errors by group, and notes on tensors for which their format is a poor choice.
    Raises CheckpointError naming the tensor whose bytes in the file are not what was computed.
    """
    groups: dict[tuple[str, str], _Sums] = {}
    notes: list[str] = []
    clock.begin("verify", len(plan.tensors))
    with open_container(path) as file:
        assert isinstance(file, GgufFile)
        for done, planned in enumerate(plan.tensors, 1):
            sums = _tensor(file, planned, check)
            kind = planned.decision.format.name
            if _TOLERANCE * _EXPECTED.get(kind, 1.0) < sums.judged:
                notes.append(
                    f"{planned.name}: {sums.judged:.3f} of relative error is much for {kind}; "
                    "give it a rule of its own"
                )
            groups.setdefault((_group(planned.name), kind), _Sums()).add(sums)
            clock.advance(done)
    return [
        GroupError(group, kind, sums.tensors, sums.weights, sums.relative, sums.weighted_relative)
        for (group, kind), sums in groups.items()
    ], notes


def _tensor(file: GgufFile, planned: Planned, check: Check) -> _Sums:
    """Compare rows of a tensor; bytes where it is plain, or its error is larger than expected."""
    rows, total = Rows(planned), _Sums(tensors=1)
    kind = planned.decision.format
    stored = _raw(file, planned)
    for first, last in _chosen(rows, check.share, planned.name):
        data = stored[first:last]
        got = decoded(data, kind, rows.columns).double()
        wanted = rows.values(first, last).double()
        part = _summed(got - wanted, wanted, planned.importance)
        doubtful = not part.judged <= _TOLERANCE * _EXPECTED.get(kind.name, 0.0)
        if doubtful and not torch.equal(data, rows.encoded(first, last, check.encode)):
            raise _damaged(file.path, planned.name)
        total.add(part)
    return total


def _summed(miss: torch.Tensor, wanted: torch.Tensor, importance: torch.Tensor | None) -> _Sums:
    """Sum up squares of errors and of values (n, K) fp64, plain and weighted."""
    squares = [values.square() for values in (miss, wanted)]
    sums = _Sums(squares[0].sum().item(), squares[1].sum().item(), wanted.numel())
    if importance is not None:
        error, size = ((total @ importance.double()).sum().item() for total in squares)
        sums.weighted = error, size
    return sums


def _relative(error: float, size: float) -> float:
    return math.sqrt(error / size) if size else float(error > 0)


def _raw(file: GgufFile, planned: Planned) -> torch.Tensor:
    """Return a tensor's bytes as (rows, row_bytes), mapped."""
    loaded = file.load(planned.name)
    if not isinstance(loaded, torch.Tensor):
        return loaded.blocks
    shape, kind = planned.decision.shape, planned.decision.format
    return loaded.view(-1).view(torch.uint8).view(-1, byte_shape(shape, kind)[-1])


def _chosen(rows: Rows, share: float, name: str) -> Iterator[tuple[int, int]]:
    """Yield runs of rows, the same ones for the same name."""
    if share >= 1.0:
        yield from rows.chunks()
        return
    wanted = max(1, math.ceil(rows.count * share))
    runs = min(_RUNS, wanted)
    length = math.ceil(wanted / runs)
    chooser = random.Random(name)
    for run in range(runs):
        low, high = rows.count * run // runs, rows.count * (run + 1) // runs
        first = chooser.randint(low, max(low, high - length))
        yield first, min(first + length, rows.count)


def _group(name: str) -> str:
    return re.sub(r"(?<=blocks\.)\d+|(?<=^blk\.)\d+", "N", name)


def _read_back(key: Key) -> Any:
    if key.kind != 6:
        return key.value
    values: Sequence[float] = key.value if isinstance(key.value, list) else [key.value]
    stored = [struct.unpack("<f", struct.pack("<f", value))[0] for value in values]
    return stored if isinstance(key.value, list) else stored[0]


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what} does not read back as it was written; check disk and memory of this "
        "machine, then run the same command again: whatever is damaged is written anew"
    )
