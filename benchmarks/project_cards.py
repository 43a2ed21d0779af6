"""Cards, and what part of their peaks is reached: measured where a result exists, or assumed."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.project_issue import Bound

ROOT = Path(__file__).resolve().parent

# Of a peak, by kind of work. Source: kernels.md 5; convolution: peers.md 5.2; memory: ours.
ASSUMED: Mapping[str, float] = {
    "matmul bf16": 0.85,
    "matmul fp16": 0.70,
    "matmul int8": 0.60,
    "matmul fp8": 0.70,
    "attention bf16": 0.75,
    "attention int8": 0.62,
    "convolution bf16": 0.50,
    "memory": 0.85,
    "dequant": 0.85,
}
# Which peak a kind of work is a part of; "memory" is bytes, all else operations.
RATES: Mapping[str, str] = {
    "matmul bf16": "bf16",
    "matmul fp16": "fp16",
    "matmul int8": "int8",
    "matmul fp8": "fp8",
    "attention bf16": "bf16",
    "attention int8": "int8 fp16",
    "convolution bf16": "bf16",
    "memory": "memory",
    "dequant": "memory",
}


@dataclass(frozen=True, slots=True)
class Card:
    """A card's peaks.

    tflops: dense, by type, 0 where it has none.  memory_gbs, bus_gbs: GB/s.  source: of each.
    efficiency: parts of peaks that were measured on such a card outside of this program.
    """

    key: str
    name: str
    architecture: int
    multiprocessors: int
    boost_ghz: float
    vram_gb: float
    tflops: Mapping[str, float]
    memory_gbs: float
    bus_gbs: float
    source: Mapping[str, str]
    efficiency: Mapping[str, float] = field(default_factory=dict)
    efficiency_source: str = ""

    def peak(self, rate: str) -> float:
        """Return a peak in operations or bytes a second; 0 where the card cannot do it.

        "int8 fp16" is half of the operations at either rate, as attention with int8 scores and fp16
        values has them: the harmonic mean.
        """
        if rate == "memory":
            return self.memory_gbs * 1e9
        parts = [self.tflops[name] * 1e12 for name in rate.split()]
        return len(parts) / sum(1 / part for part in parts) if all(parts) else 0.0

    @property
    def fp32(self) -> float:
        """Operations a second without tensor cores: 128 lanes a multiprocessor, two each."""
        return self.multiprocessors * 256 * self.boost_ghz * 1e9


def read_cards(path: Path = ROOT / "gpus.toml") -> dict[str, Card]:
    """Return all cards by their keys."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {key: Card(key=key, **values) for key, values in table.items()}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The part of a peak that a kind of work reaches, and where that number comes from."""

    value: float
    origin: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a result of `benchmarks kernels` says: TFLOP/s or GB/s by kind of work, on a card."""

    card: Card
    achieved: Mapping[str, float]
    file: str

    def efficiency(self, work: str) -> float | None:
        """Return the part of the measured card's own peak, if this work was measured."""
        if work not in self.achieved:
            return None
        unit = 1e9 if RATES[work] == "memory" else 1e12
        peak = self.card.peak(RATES[work])
        return self.achieved[work] * unit / peak if peak else None

    @classmethod
    def read(cls, path: Path, cards: Mapping[str, Card]) -> Self | None:
        """Read a result; None where its card is not in the table."""
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        machine = document["conditions"]["machine"]
        card = next((one for one in cards.values() if one.name == machine), None)
        return None if card is None else cls(card, document.get("achieved", {}), path.name)


def read_measurements(
    cards: Mapping[str, Card], root: Path = ROOT / "results"
) -> list[Measurement]:
    """Return all results of `benchmarks kernels`, the latest first."""
    found = sorted(root.glob("*/*-kernels.json"), key=lambda path: path.name, reverse=True)
    read = (Measurement.read(path, cards) for path in found)
    return [one for one in read if one is not None]


def efficiency(
    card: Card, work: str, measurements: Sequence[Measurement], bound: Bound | None = None
) -> Efficiency:
    """Return how much of its peak a kind of work reaches on a card.

    In this order: measured on this card by us; measured on it by others (`gpus.toml`); measured on
    the nearest architecture; assumed, and then no more than compiled code can (`bound`).
    Hopper multiplies with other instructions (wgmma) than all the others (mma): nothing that tensor
    cores do is carried over between the two, only parts of memory bandwidth.
    """
    own = [one for one in measurements if one.card.key == card.key]
    near = sorted(
        (one for one in measurements if one.card.key != card.key and _alike(one.card, card, work)),
        key=lambda one: abs(one.card.architecture - card.architecture),
    )
    for one in own:
        if (value := one.efficiency(work)) is not None:
            return Efficiency(value, f"measured, {one.file}")
    if work in card.efficiency:
        return Efficiency(card.efficiency[work], card.efficiency_source)
    for one in near:
        if (value := one.efficiency(work)) is not None:
            return Efficiency(value, f"measured on {one.card.name}, {one.file}")
    value = ASSUMED[work]
    if bound is not None and bound.efficiency < value:
        return Efficiency(bound.efficiency, f"compiled code: {bound.line}")
    return Efficiency(value, "assumed" + (f"; {bound.line}" if bound else ""))


def _alike(measured: Card, card: Card, work: str) -> bool:
    return RATES[work] == "memory" or (measured.architecture == 90) == (card.architecture == 90)
