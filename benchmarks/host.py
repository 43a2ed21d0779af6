"""Host memory of the engine, measured: every network of a full-size job loaded and walked through.

Files have the sizes of the 22B release in Q4_K_M, and holes instead of weights. The real planner
places the blocks of 1920x1088x121 in two stages; the real loader, arenas, ring and reader threads
bring them. The card is the CPU machine: what would be page-locked is ordinary memory and counts;
what would be on the card is one shared mapping, which does not. So a peak is that of private pages
(RssAnon of /proc/self/status, sampled), which on a PC with a card are anonymous or page-locked.
Not in it: the CUDA context's host side, and pages of files, which the system takes back at will.
"""

import argparse
import mmap
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.harness import Case, Result, Row
from benchmarks.host_files import write_release
from ltxlite.memory import place
from ltxlite.memory.budget import GIB, Budget, available_ram
from ltxlite.memory.machine import CpuMachine
from ltxlite.memory.place import Memory, StreamedList
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.planning import JobPlan, plan_job
from ltxlite.presets import Model, stages_for
from ltxlite.request import Files, Output, Request

DESCRIPTION = "anonymous and page-locked memory of a full-size job, measured on sparse files"
STATUS = Path("/proc/self/status")
WALKS = 2  # of the transformer; the second one finds every buffer in use
_SAMPLED = 0.004  # seconds; a block takes 50 to 100 ms to arrive
_MARGIN = 3 * GIB // 2  # what a run takes besides what the plan names


@dataclass(frozen=True, slots=True)
class Setup:
    """One case: the card and the RAM that the planner is told, in GiB."""

    name: str
    vram: float
    ram: float

    @property
    def budget(self) -> Budget:
        """Return what a user would say with --vram and --ram."""
        return Budget(int(self.vram * GIB), int(self.ram * GIB))


SETUPS = (
    Setup("RAM, 8 GiB card", 8, 16),
    Setup("disk, 8 GiB card", 8, 4),
    Setup("RAM and disk, 4 GiB card", 4, 10),
    Setup("disk alone, 4 GiB card", 4, 2),
)


class SharedCard(CpuMachine):
    """A CPU machine whose device is one shared mapping: no private memory, no room for values.

    Every buffer begins where all others do, so the blocks must be equal; those of holes are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory: Tensor | None = None

    def device_buffer(self, nbytes: int) -> Tensor:
        """Show the common memory, a larger one where it is too small."""
        if self._memory is None or self._memory.nbytes < nbytes:
            self._memory = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        return self._memory[:nbytes]


class Peak:
    """The largest RssAnon while a thread looks."""

    def __init__(self) -> None:
        self.nbytes = private_bytes()
        self._over = threading.Event()

    def restart(self) -> int:
        """Return the peak so far and begin anew."""
        found, self.nbytes = max(self.nbytes, private_bytes()), private_bytes()
        return found

    @contextmanager
    def watching(self) -> Iterator["Peak"]:
        """Look until the block ends."""
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _look(self) -> None:
        while not self._over.wait(_SAMPLED):
            self.nbytes = max(self.nbytes, private_bytes())


def private_bytes(status: str | None = None) -> int:
    """Return the bytes of pages that are this process's own; locked ones are among them."""
    text = STATUS.read_text("ascii") if status is None else status
    (line,) = (line for line in text.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def measured(setup: Setup, files: Files, room: int) -> dict[str, Any]:
    """Plan and load a job's networks one after the other; return peaks in bytes by network.

    room: of RAM there is; where the plan wants more, less is pinned, which "limited_to" tells.
    """
    torch.set_num_threads(1)
    networks = open_networks(files, "cpu", "bfloat16")
    budget = setup.budget
    plan = _planned(networks, files, budget)
    found: dict[str, Any] = {"planned": plan.plan.pinned, "lines": plan.lines()}
    if plan.plan.pinned + _MARGIN > room:
        found["limited_to"] = room
        plan = _planned(networks, files, Budget(budget.vram, room))
    networks.memory = Memory(SharedCard(), plan.plan.placements, plan.levers.chunk)
    found["idle"] = private_bytes()
    found["peaks"], found["seconds"] = peaks, seconds = {}, {}
    with Peak().watching() as peak:
        for name, load, walks in _loads(networks):
            peak.restart()
            since = time.perf_counter()
            network = load()
            _walk(network, walks)
            seconds[name] = round(time.perf_counter() - since, 2)
            found.setdefault("held", {})[name] = _held(network)
            place.close(network)
            del network
            peaks[name] = peak.restart()
    networks.close()
    return found


def _planned(networks: Networks, files: Files, budget: Budget) -> JobPlan:
    stages = stages_for(Model("distilled"))
    request = Request("", files, Output("clip.mp4"), stages, width=1920, height=1088)
    return plan_job(networks, request, budget)


def _loads(networks: Networks) -> list[tuple[str, Callable[[], nn.Module], int]]:
    """Return all networks in the order of a run, and how often each is walked through."""
    (upscaler,) = networks.files.all("upscaler")
    return [
        ("text encoder", networks.gemma, 1),
        ("text projection", networks.text_projection, 1),
        ("video connector", networks.video_connector, 1),
        ("audio connector", networks.audio_connector, 1),
        ("transformer", networks.transformer, WALKS),
        ("upscaler", lambda: networks.upscaler_from(upscaler), 0),
        ("audio decoder", networks.audio_decoder, 0),
        ("vocoder", networks.vocoder, 0),
        ("video decoder", networks.video_decoder, 0),
    ]


def _walk(network: nn.Module, count: int) -> None:
    for blocks in [item for item in network.modules() if isinstance(item, StreamedList)]:
        for _ in range(count):
            for _ in blocks:
                pass


def _held(network: nn.Module) -> dict[str, int]:
    """Return what the streamers of a network say they hold, in bytes."""
    found = [m.streamer.report for m in network.modules() if isinstance(m, StreamedList)]
    names = ("resident", "slots", "pinned", "ring", "moved", "read")
    return {name: sum(getattr(item, name) for item in found) for name in names}


def result_of(setup: Setup, found: dict[str, Any]) -> Result:
    """Return a case's figures; the peak of a run that was limited goes by another name."""
    peak = max(found["peaks"].values())
    name = "limited_peak_gib" if "limited_to" in found else "peak_gib"
    figures = {name: peak / GIB, "planned_gib": found["planned"] / GIB, "idle_gib": 0.0}
    figures["idle_gib"] = found["idle"] / GIB
    facts = {"card and RAM": asdict(setup), **found}
    return Result(
        Case(setup.name, facts, 0.0, tuple, figures=figures), [Row("ltxlite", peak_bytes=peak)]
    )


def _in_a_process(setup: Setup, files: Files, room: int) -> dict[str, Any]:
    """Measure in a process of its own: what one run leaves in its heap is not the next one's."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measured, (setup, files, room))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a case and, as the last line, JSON; 1 if a target is missed."""
    options = _parse(arguments)
    if not STATUS.exists():
        print("host: memory is read from /proc, which this system does not have", file=sys.stderr)
        return 2
    header = report.conditions("cpu", 1)
    header["threads"] = 1
    chosen = [setup for setup in SETUPS if options.case in (None, setup.name)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_release(Path(folder))
        for setup in chosen:
            results.append(result_of(setup, _in_a_process(setup, files, available_ram())))
            print(line(results[-1]), file=sys.stderr, flush=True)
    document = report.as_json("host", header, results)
    return report.conclude(document, results, options.check, options.out)


def line(result: Result) -> str:
    """Say a case in a line."""
    facts = result.case.facts
    worst = max(facts["peaks"], key=facts["peaks"].get)
    figures = ", ".join(f"{name} {value:.2f}" for name, value in result.case.figures.items())
    limited = ""
    if "limited_to" in facts:
        limited = f"; this machine has room for {facts['limited_to'] / GIB:.1f} GiB only"
    return f"{result.case.name}: {figures}, peak in {worst}{limited}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks host", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with targets.toml")
    parser.add_argument("--case", choices=[setup.name for setup in SETUPS], help="only this one")
    parser.add_argument("--out", action="store_true", help="also keep the JSON under results/")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
