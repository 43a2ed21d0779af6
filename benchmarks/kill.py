"""Runs killed with SIGKILL at random moments: the next run must end in the same clip, to the byte.

A tiny job runs once undisturbed. Then it is started again and again, each time in a process of its
own, killed at a random moment, and run once more. Green means: after every kill there was no clip
or a whole one, the second run gave the bytes of the undisturbed one, and nothing else was left in
the folder. A red line names the job and the seed to replay.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Case, Contestant, GateError

DESCRIPTION = "kill runs at random moments and resume them"
MODELS = Path(__file__).parent.parent / "tests" / "golden" / "models"
# Two stages and their samplers by name of the job; between them all that a sampler can carry.
JOBS: dict[str, tuple[str, ...]] = {
    "euler": (),
    "res_2s": ("--sampler", "res_2s", "--sampler", "res_2s", "--sound", "freeze"),
    "er_sde": ("--sampler", "er_sde", "--sampler", "dpmpp_2m", "--sound", "keep"),
    "guided": ("--sampler", "euler_gradient", "--cfg", "3:2", "--skip-step", "2:1", "--steps", "5"),
}
# torch._dynamo comes in when a network is first made on the meta device.
_PRELOAD = ["torch._dynamo", "ltxlite.cli.jobs", "ltxlite.cli.show", "ltxlite.pipeline"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare what only this benchmark takes."""
    parser.add_argument("--kills", type=int, default=50, help="in all [50]")
    parser.add_argument("--seed", type=int, default=0, help="of the first kill [0]")


def cases(options: argparse.Namespace) -> list[Case]:
    """Return one case a job; the gate and every run kill a batch of their own."""
    chosen = [name for name in JOBS if options.case in (None, name)]
    each = -(-options.kills // (max(1, len(chosen)) * (options.runs + 1)))
    facts = {"struck": each * (options.runs + 1)}
    return [_case(name, facts, options.seed, each) for name in chosen]


def _case(name: str, facts: dict[str, int], seed: int, each: int) -> Case:
    figures: dict[str, float] = {"kills": 0.0, "continued": 0.0}
    build = partial(_contestants, name, figures, range(seed, seed + each))
    return Case(name, facts, 0.0, build, figures=figures)


def _contestants(name: str, figures: dict[str, float], seeds: range) -> Iterator[Contestant]:
    batches = iter(range(seeds.start, 1 << 62, len(seeds)))

    def run() -> dict[str, Tensor]:
        first = next(batches)
        toll = storm(name, range(first, first + len(seeds)))
        figures["kills"] += toll.kills
        figures["continued"] += toll.continued
        return {"kills": torch.tensor([float(toll.kills)])}

    yield Contestant("ltxlite", run)


@dataclass(slots=True)
class Toll:
    """What happened in a storm: runs that were killed, and runs that continued one of them."""

    kills: int = 0
    continued: int = 0


def storm(name: str, seeds: range) -> Toll:
    """Kill one run of a job a seed, and resume it.

    Raises GateError, naming the seed, if a clip differs or anything is left behind.
    """
    toll = Toll()
    with tempfile.TemporaryDirectory() as folder:
        job = _Job(name, Path(folder))
        for seed in seeds:
            job.kill_and_resume(seed, toll)
    return toll


class _Job:
    """A job that can be run, undisturbed or not, and knows what must come out of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.log = name, folder / "log.txt"
        self.target = folder / "out" / "clip.mp4"
        self._flags = _flags(name, self.target)
        self._context = _context()
        self.run(None)  # reads files that later runs find in the page cache
        self.target.unlink()
        since = time.perf_counter()
        self.run(None)
        self.seconds = time.perf_counter() - since
        self.expected = self.target.read_bytes()
        self.target.unlink()

    def run(self, seconds: float | None) -> bool:
        """Run in a process of its own, killed after so many seconds; tell whether it ended."""
        process = self._context.Process(target=_child, args=(self._flags, str(self.log)))
        process.start()
        process.join(seconds)
        is_killed = process.is_alive()
        process.kill()
        process.join()
        if not is_killed and process.exitcode:
            raise GateError(f"{self.name}: a run failed: {self.told()[-500:]}")
        return not is_killed

    def told(self) -> str:
        """Return what the last run printed."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def kill_and_resume(self, seed: int, toll: Toll) -> None:
        """Kill a run, at times its continuation too, and let the next one come to its end."""
        chooser = random.Random(f"{self.name} {seed}")
        while not self.run(self.seconds * chooser.random()):
            toll.kills += 1
            toll.continued += "continuing at" in self.told()
            if self.target.exists():
                self._check(seed)  # killed between the clip's last byte and its own end
            if chooser.random() < 0.7:
                self.run(None)
                toll.continued += "continuing at" in self.told()
                break
        self._check(seed)
        if left := {path.name for path in self.target.parent.iterdir()} - {self.target.name}:
            raise GateError(f"{self.name} kill {seed}: {', '.join(sorted(left))} left behind")
        self.target.unlink()

    def _check(self, seed: int) -> None:
        if self.target.read_bytes() != self.expected:
            raise GateError(f"{self.name} kill {seed}: the resumed clip is another one")


def _flags(name: str, target: Path) -> list[str]:
    files = ("tiny-2.3-distilled.safetensors", "tiny-2.3-spatial-upscaler-x2.safetensors")
    model, upscaler = (str(MODELS / file) for file in files)
    return [
        *("generate", "--model", model, "--upscaler", upscaler),
        *("--text-encoder", str(MODELS / "gemma3_tiny"), "--prompt", "rain on a lake"),
        *("--size", "128x64", "--frames", "9", "-o", str(target), *JOBS[name]),
    ]


def _context() -> multiprocessing.context.BaseContext:
    """Return how to start processes: forked off one that has imported torch, where that works."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver  # not there on Windows

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # The server imports before it is told our sys.path (python 3.11).
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _child(arguments: list[str], log: str) -> None:
    from ltxlite.cli import main

    torch.set_num_threads(1)
    with (
        Path(log).open("w", encoding="utf-8") as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        code = main(arguments)
    sys.exit(code)
