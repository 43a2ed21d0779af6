"""Blocks read from disk while others compute, beside loading each one first.

The page cache is out of play: the file is small and cached, and the time that its bytes would take
on a disk is slept, in turns, as one disk would. Compute is a tiny network and a sleep, so that two
cores measure the order of things and not each other. What is timed is cold: a run makes its
file and streamer, reads its first block while nothing computes, and walks several times.

The bound is the longer of all reading and all computing, each alone.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Contestant, Outputs
from ltxlite.memory.arena import FilePortion, FileRange, MovableModule, divide
from ltxlite.memory.machine import CpuMachine
from ltxlite.memory.source import Reader
from ltxlite.memory.stream import Placement, Streamer

DESCRIPTION = "blocks streamed from a disk of given speed beside loading each first"
BLOCKS = 16
WALKS = 3
WIDTH = 128
COMPUTE_SECONDS = 0.008
READ_SHARES = (0.5, 1.0, 2.0)  # of the compute of a block


class SlowDisk(Reader):
    """Reads at a given speed, one portion after the other, however many threads ask."""

    def __init__(self, bytes_per_second: float) -> None:
        super().__init__(threads=2)
        self._speed = bytes_per_second
        self._lock = threading.Lock()
        self._idle_at = 0.0

    def read(self, portion: FilePortion, target: Tensor) -> None:
        """Read when the disk has got that far."""
        nbytes = sum(span.nbytes for span in portion.spans)
        with self._lock:
            self._idle_at = max(self._idle_at, time.perf_counter()) + nbytes / self._speed
            done = self._idle_at
        super().read(portion, target)
        time.sleep(max(0.0, done - time.perf_counter()))


class Stack:
    """A network of equal blocks, and how long a disk takes to read one."""

    def __init__(self, read_share: float) -> None:
        random = torch.Generator().manual_seed(0)
        self.weights = torch.randn(BLOCKS, WIDTH, WIDTH, generator=random) / WIDTH**0.5
        self.given = torch.randn(7, WIDTH, generator=random)
        self.read_seconds = read_share * COMPUTE_SECONDS

    def streamed(self) -> Outputs:
        """Walk with all blocks on disk, ours."""
        with self._on_disk() as (disk, origins):
            machine = CpuMachine()
            try:
                placement = Placement(pinned_bytes=0)
                with Streamer(self._blocks(), machine, placement, origins, disk) as streamer:
                    return self._walked(streamer.walk, COMPUTE_SECONDS)
            finally:
                machine.close()

    def loaded_first(self) -> Outputs:
        """Walk with each block read when it is its turn."""
        with self._on_disk() as (disk, origins):
            movable = [MovableModule(block) for block in self._blocks()]
            portions = [divide(*pair) for pair in zip(movable, origins, strict=True)]
            buffer = torch.empty(movable[0].layout.nbytes, dtype=torch.uint8)
            for block, parts in zip(movable, portions, strict=True):
                disk.watch(parts)
                block.release()

            def walk() -> Iterator[nn.Module]:
                for block, parts in zip(movable, portions, strict=True):
                    disk.fill(buffer, parts).wait()
                    block.bind(block.views(buffer))
                    yield block.module

            return self._walked(walk, COMPUTE_SECONDS)

    def bound(self) -> Outputs:
        """Do the longer of all reading and all computing, alone."""
        if self.read_seconds <= COMPUTE_SECONDS:
            return self._walked(lambda: iter(self._blocks()), COMPUTE_SECONDS)
        with self._on_disk() as (disk, origins):
            portions = [
                divide(MovableModule(block), origin)
                for block, origin in zip(self._blocks(), origins, strict=True)
            ]
            buffer = torch.empty(self.weights[0].nbytes, dtype=torch.uint8)
            for parts in portions:
                disk.watch(parts)
            for read in [disk.fill(buffer, parts) for parts in portions * WALKS]:
                read.wait()
        return self._walked(lambda: iter(self._blocks()), 0.0)

    def _blocks(self) -> list[nn.Module]:
        made: list[nn.Module] = []
        for weight in self.weights:
            block = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
            block.weight = nn.Parameter(weight, requires_grad=False)
            made.append(block)
        return made

    @contextmanager
    def _on_disk(self) -> Iterator[tuple[SlowDisk, list[dict[str, FileRange]]]]:
        size = self.weights[0].nbytes
        disk = SlowDisk(size / self.read_seconds)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "blocks"
            path.write_bytes(self.weights.numpy().tobytes())
            try:
                yield disk, [{"weight": FileRange(path, n * size, size)} for n in range(BLOCKS)]
            finally:
                disk.close()

    def _walked(self, walk: Callable[[], Iterator[nn.Module]], seconds: float) -> Outputs:
        x = self.given
        for _ in range(WALKS):
            for block in walk():
                since = time.perf_counter()
                x = block(x).tanh()
                time.sleep(max(0.0, since + seconds - time.perf_counter()))
        return {"x": x}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this benchmark can be told: nothing."""


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield a disk that is faster than compute, as fast, and slower."""
    for share in READ_SHARES:
        facts = {
            "read_over_compute": share,
            "compute_ms": COMPUTE_SECONDS * 1e3,
            "blocks": BLOCKS,
            "walks": WALKS,
            "compute": f"{WIDTH} x {WIDTH} matmul, the rest slept",
            "disk": "injected: cached read, the rest slept",
        }
        yield Case(f"read {share:g}x", facts, 0.0, partial(_contestants, share))


def _contestants(share: float) -> Iterator[Contestant]:
    stack = Stack(share)
    yield Contestant("ltxlite", stack.streamed)
    yield Contestant("bound", stack.bound)
    yield Contestant("load, then compute", stack.loaded_first)
