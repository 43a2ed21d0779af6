"""What compiled code allows at most: issue slots beside tensor-core clocks, warps on a processor.

`compiled.json` tells a kernel's registers, shared memory and its hot loop: instructions, and those
of them that are matrix products. A quarter of a multiprocessor issues one warp instruction a clock
and works on one matrix product at a time. Without any overlap of the two, products get
1 / (1 + issue / tensor) of the time: a bound that assumed efficiencies may not exceed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("compiled.json")
QUARTERS = 4  # of a multiprocessor, each with a scheduler and a tensor core
REGISTERS = 1 << 16  # of a multiprocessor (CUDA C++ programming guide, compute capabilities)
# Shared memory of a multiprocessor; a block takes 1 KiB more than it asks for. Same source.
SHARED = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 120: 100 << 10}
MOST_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 120: 48}
# Two warps a scheduler hide one another's latency in a pipelined loop; an assumption.
ENOUGH_WARPS = 8
_LETTERS = {".s8": "I", "e4m3": "Q"}  # IMMA and IGMMA, QMMA and QGMMA; all else is HMMA
_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)\.")


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a card multiplies: multiply-adds a second of a type, and its processors' clocks."""

    macs: float
    multiprocessors: int
    hertz: float

    @property
    def macs_per_clock(self) -> float:
        """Multiply-adds of one tensor core in a clock."""
        return self.macs / (self.multiprocessors * QUARTERS * self.hertz)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a kernel's code allows: issue slots for each tensor-core clock, warps at a time."""

    kernel: str
    issue_ratio: float
    warps: int

    @property
    def efficiency(self) -> float:
        """Return the largest part of the tensor cores' peak."""
        return min(1.0, self.warps / ENOUGH_WARPS) / (1 + self.issue_ratio)

    @property
    def line(self) -> str:
        """Say it in a few words."""
        return (
            f"{self.kernel}: {self.issue_ratio:.2f} issue slots a tensor clock, "
            f"{self.warps} warps, at most {self.efficiency:.2f}"
        )


def read_compiled(path: Path = TABLE) -> Mapping[str, Mapping[str, Any]]:
    """Return the lines of the newest Triton version in the table; none without a table."""
    if not path.exists():
        return {}
    table = json.loads(path.read_text(encoding="utf-8"))
    newest = max(table, key=lambda version: [int(part) for part in version.split(".")])
    lines: Mapping[str, Mapping[str, Any]] = table[newest]
    return lines


def bound_of(
    compiled: Mapping[str, Mapping[str, Any]], kernel: str, warps: int, speed: Speed
) -> Bound | None:
    """Return the bound of a kernel, "matmul_int8 1024+ plain sm_86"; None if it is not there.

    warps: of one of its blocks.  Of a loop that multiplies several types, `speed` is that of the
    whole.
    """
    line = compiled.get(kernel)
    if line is None or not line["loop"][1]:
        return None
    instructions, products = line["loop"]
    clocks = products * _macs(line["ptx"], line["tensor"]) / speed.macs_per_clock
    if "wgmma" in line["ptx"][0]:
        clocks /= QUARTERS  # one instruction keeps the tensor cores of four warps
    held = resident_warps(line, warps, int(kernel.rsplit("_", 1)[1]))
    return Bound(kernel, instructions / clocks, held)


def resident_warps(line: Mapping[str, Any], warps: int, architecture: int) -> int:
    """Return how many warps of a kernel a multiprocessor holds at once."""
    registers = -(-line["registers"] // 8) * 8 * 32 * warps  # given out by the eight
    blocks = min(
        REGISTERS // registers,
        SHARED[architecture] // (line["shared"] + 1024),
        MOST_WARPS[architecture] // warps,
    )
    return int(blocks) * warps


def _macs(ptx: Sequence[str], tensor: Mapping[str, int]) -> float:
    """Return the multiply-adds of an instruction: the mean over a kernel's, by their numbers."""
    total = weight = 0.0
    for text in ptx:
        shape = _SHAPE.search(text)
        if shape is None:
            continue
        letter = next((own for kind, own in _LETTERS.items() if kind in text), "H")
        count = sum(n for stem, n in tensor.items() if stem.removesuffix("GMMA")[:1] == letter)
        total += count * int(shape[1]) * int(shape[2]) * int(shape[3])
        weight += count
    return total / weight
