"""Seconds of a step with every block streamed beside the same step with every block resident.

Streamed steps and resident ones take turns on two transformers with the same weights. What a
streamed step loses is measured twice more: the time its compute queue waits for blocks, and the
share of the step in which the host was busy sending it (near 1 the host is the bottleneck).
The allocator is capped at 8 GiB beside the resident blocks.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.engine_memory import capped
from benchmarks.engine_models import FPS, Rig, drawn, put
from benchmarks.harness import Case, Result, Row
from ltxlite.account import Component, StageJob
from ltxlite.account.stage import make_denoiser, move_denoiser
from ltxlite.geometry import AudioGrid, ClipShape, LatentGrid
from ltxlite.memory import place
from ltxlite.memory.budget import GIB
from ltxlite.memory.machine import CpuMachine, CudaMachine, Machine, Mark
from ltxlite.memory.place import Memory, StreamedList
from ltxlite.memory.stream import Placement
from ltxlite.models.transformer import Transformer
from ltxlite.sampling.contract import State

SIGMA = 0.725
CARD_BYTES = 8 * GIB
WARM_UPS = 2  # the first step compiles kernels, the second fills slots as all later ones find them


class Timed(Machine, Protocol):
    """A machine that knows how long computing has waited for copies."""

    def waited(self) -> float:
        """Return the seconds since the last question; all work is done."""


class TimedCudaMachine(CudaMachine):
    """Marks the compute stream on both sides of each wait."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def hold(self, mark: Mark) -> None:
        """Let the current stream wait, between two events."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        super().hold(mark)
        after.record()
        self._pairs.append((before, after))

    def waited(self) -> float:
        """Add up what lies between the events."""
        milliseconds = sum(before.elapsed_time(after) for before, after in self._pairs)
        self._pairs.clear()
        return milliseconds / 1e3


class TimedCpuMachine(CpuMachine):
    """Times the waits of the calling thread, which computes."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 0.0

    def hold(self, mark: Mark) -> None:
        """Wait, by the clock."""
        since = time.perf_counter()
        super().hold(mark)
        self._seconds += time.perf_counter() - since

    def waited(self) -> float:
        """Return the clock's seconds."""
        found, self._seconds = self._seconds, 0.0
        return found


@dataclass(frozen=True, slots=True)
class Sample:
    """One step: its seconds, those of them in which computing waited, those the host was busy."""

    seconds: float
    waited: float
    host: float


class Pair:
    """The same transformer twice: no block resident, and all of them."""

    def __init__(self, component: Component, rig: Rig) -> None:
        self.rig = rig
        self.machine: Timed = (
            TimedCudaMachine(rig.device) if rig.device.type == "cuda" else TimedCpuMachine()
        )
        memory = Memory(self.machine)
        everything = frozenset(range(component.config.layers))
        self.networks = {
            name: put("transformer", self._drawn(component), rig, memory, placement)
            for name, placement in (
                ("streamed", Placement()),
                ("resident", Placement(resident=everything, slots=0, prefetch=0)),
            )
        }

        blocks = self.networks["resident"].blocks
        assert isinstance(blocks, StreamedList)
        self._resident = blocks.streamer.report.resident

    def close(self) -> None:
        """Let go of weights and queue."""
        for network in self.networks.values():
            place.close(network)
        self.networks.clear()
        self.machine.close()

    def measured(self, name: str, shape: ClipShape, runs: int) -> Result:
        """Time steps of a clip, in turns."""
        steps = {key: self._step(network, shape) for key, network in self.networks.items()}
        with capped(self.rig, CARD_BYTES + self._resident):
            samples = self._in_turns(steps, runs)
        streamed = samples["streamed"]
        figures = {
            "gap_share": statistics.median(item.waited / item.seconds for item in streamed),
            "host_share": statistics.median(item.host / item.seconds for item in streamed),
        }
        facts = {"video_tokens": shape.video_tokens, "math": self.rig.math}
        case = Case(name, facts, 0.0, tuple, self.rig.device.type, figures=figures)
        return Result(case, [_row(key, samples[key]) for key in ("streamed", "resident")])

    def _in_turns(
        self, steps: Mapping[str, Callable[[], object]], runs: int
    ) -> dict[str, list[Sample]]:
        for _ in range(WARM_UPS):
            for step in steps.values():
                self._timed(step)
        samples: dict[str, list[Sample]] = {key: [] for key in steps}
        for turn in range(runs):
            for key in sorted(steps, reverse=bool(turn % 2)):
                samples[key].append(self._timed(steps[key]))
        return samples

    def _drawn(self, component: Component) -> Transformer:
        network = drawn("transformer", component, self.rig)
        assert isinstance(network, Transformer)
        return network

    def _step(self, network: Transformer, shape: ClipShape) -> Callable[[], object]:
        """Return what evaluates the transformer once, as a distilled stage does."""
        stage = StageJob(shape)
        denoiser = make_denoiser(network, stage, self.rig.dtype)
        move_denoiser(denoiser, self.rig.device)
        network.tabulate(torch.tensor([0.0, SIGMA], device=self.rig.device))
        given: State = tuple(
            torch.randn(item.stream.state.initial.shape, device=self.rig.device)
            for item in denoiser._streams
        )
        return lambda: denoiser(given, SIGMA)

    def _timed(self, step: Callable[[], object]) -> Sample:
        self._finish()
        since = time.perf_counter()
        step()
        sent = time.perf_counter() - since
        self._finish()
        return Sample(time.perf_counter() - since, self.machine.waited(), sent)

    def _finish(self) -> None:
        if self.rig.device.type == "cuda":
            torch.cuda.synchronize(self.rig.device)


def shape_of(frames: int, rows: int, columns: int) -> ClipShape:
    """Return the shape of a clip in latents, at 24 frames a second."""
    pixels = LatentGrid().pixel_frames(frames)
    return ClipShape(frames, rows, columns, AudioGrid().latent_frames(pixels, FPS), FPS)


def _row(name: str, samples: Sequence[Sample]) -> Row:
    return Row(name, samples_ms=[item.seconds * 1e3 for item in samples])
