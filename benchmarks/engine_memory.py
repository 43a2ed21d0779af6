"""The account beside what a card's allocator saw: text, both stages of a clip, decoding.

Each phase runs through the real networks where the planner put their blocks, at full size, the
allocator capped at the size of the card. Without a card the meter stands in for the allocator.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.engine_models import Rig, drawn, put
from benchmarks.harness import Case, Result, Row
from ltxlite.account import Components, Levers, StageJob
from ltxlite.account.media import decode_beginning, picture_phase
from ltxlite.account.phase import CARD
from ltxlite.account.stage import make_denoiser, move_denoiser, sample_steps, stage_phases
from ltxlite.account.text import text_phases
from ltxlite.memory import place
from ltxlite.memory.budget import GIB, Budget
from ltxlite.memory.machine import CpuMachine, CudaMachine
from ltxlite.memory.meter import ActivationMeter
from ltxlite.memory.place import Memory, StreamedList
from ltxlite.memory.plan import PhasePlan, Plan, fit
from ltxlite.models.text_projection import gather
from ltxlite.networks import ANATOMY
from ltxlite.planning import beside_transformer

T = TypeVar("T")
_UNIQUE = torch.ops.aten._unique2.default
ALLOWANCE = 64 << 20  # of text and transformer, beside 5 %
PROMPT_TOKENS = 1024
KINDS = {"text_encoder": "text", "text_projection": "text", "video_connector": "text"}
KINDS |= {"audio_connector": "text", "transformer": "transformer", "video_decoder": "vae"}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is run: networks and a clip, on a card of so many GiB."""

    components: Components
    stages: tuple[StageJob, ...]
    levers: Levers
    prompt_tokens: int = PROMPT_TOKENS


class Peaks:
    """Peaks by phase: the card's own, or without one the meter's and the weights beside it."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.found: dict[str, int] = {}
        # What runs here has values, so that `unique` need not be guessed as the account does.
        fused = {key: value for key, value in CARD.fused.items() if key is not _UNIQUE}
        meter = ActivationMeter("cpu", replace(CARD, fused=fused))
        self._meter = None if rig.device.type == "cuda" else meter

    @contextmanager
    def watching(self) -> Iterator["Peaks"]:
        """Count what is allocated from now on."""
        if self._meter is not None:
            with self._meter:
                yield self
            return
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.rig.device)
        yield self

    def note(self, phase: str, network: nn.Module) -> None:
        """Keep the peak since the last phase, and begin the next one."""
        if self._meter is not None:
            self.found[phase] = self._meter.restart() + _weights(network)
            return
        torch.cuda.synchronize(self.rig.device)
        self.found[phase] = torch.cuda.max_memory_allocated(self.rig.device)
        torch.cuda.reset_peak_memory_stats(self.rig.device)


def measured(name: str, subject: Subject, rig: Rig, budget: Budget) -> Result:
    """Run all phases under a cap; return how far off the account was, as shares of it."""
    plan = planned(subject, budget)
    machine = CudaMachine(rig.device) if rig.device.type == "cuda" else CpuMachine()
    memory = Memory(machine, plan.placements, subject.levers.chunk)
    run = _Run(subject, rig, memory)
    try:
        with capped(rig, budget.vram), torch.inference_mode():
            run.text()
            run.stages()
            run.decode()
    finally:
        machine.close()
    return _result(name, rig, plan, run.peaks.found)


def planned(subject: Subject, budget: Budget) -> Plan:
    """Place the blocks for the phases that are run: upscaler and sound are not."""
    levers, components = subject.levers, subject.components
    found = text_phases(components, (subject.prompt_tokens,), levers)
    for number, stage in enumerate(subject.stages, start=1):
        found += stage_phases(components, number, stage, levers)
    found.append(picture_phase(components, subject.stages[-1].shape, levers))
    return fit(beside_transformer([phase.need() for phase in found]), budget)


class _Run:
    """The phases of a clip, each network there for as long as it is used."""

    def __init__(self, subject: Subject, rig: Rig, memory: Memory) -> None:
        self.subject, self.rig, self.memory = subject, rig, memory
        self.peaks = Peaks(rig)

    def text(self) -> None:
        """Encode a prompt of random embeddings."""
        components = self.subject.components
        config = components["text_projection"].config
        width = components["text_encoder"].config.hidden
        embedded = [torch.randn(1, self.subject.prompt_tokens, width).to(self.rig.dtype)]
        gathered = self._using(
            "text_encoder", "encode prompt", lambda net: gather(config, net.together(embedded, [0]))
        )
        features = self._using(
            "text_projection", "project prompt", lambda net: net.project(gathered)
        )
        contexts = []
        for number, name in enumerate(("video_connector", "audio_connector")):
            given = [pair[number] for pair in features]
            phase = name.replace("_", " ")
            contexts.append(self._using(name, phase, lambda net, given=given: net.together(given)))

    def stages(self) -> None:
        """Run a step of every stage on one transformer."""
        network = self._network("transformer")
        try:
            for number, stage in enumerate(self.subject.stages, start=1):
                denoiser = make_denoiser(network, stage, self.rig.dtype)
                levels = torch.linspace(0, 1, stage.levels).to(self.rig.device)
                with self.peaks.watching():
                    move_denoiser(denoiser, self.rig.device)
                    network.tabulate(levels)
                    self.peaks.note(f"levels of stage {number}", network)
                    sample_steps(denoiser, stage)
                    self.peaks.note(f"stage {number}", network)
                network.forget_tables()
        finally:
            place.close(network)

    def decode(self) -> None:
        """Decode as many frames as it takes to reach the peak."""
        shape, group_bytes = self.subject.stages[-1].shape, self.subject.levers.group_bytes
        self._using(
            "video_decoder",
            "decode picture",
            lambda net: decode_beginning(net, shape, group_bytes, self.rig.device),
        )

    def _using(self, name: str, phase: str, use: Callable[[Any], T]) -> T:
        network = self._network(name)
        try:
            with self.peaks.watching():
                result = use(network)
                self.peaks.note(phase, network)
        finally:
            place.close(network)
        return result

    def _network(self, name: str) -> Any:
        network = drawn(name, self.subject.components[name], self.rig, self.memory.chunk)
        return put(name, network, self.rig, self.memory, self.memory.of(name))


def _result(name: str, rig: Rig, plan: Plan, found: Mapping[str, int]) -> Result:
    rows = [_compared(phase, found[phase.need.phase]) for phase in plan.phases]
    figures = {
        f"{kind}_off": max(row["off"] for row in rows if row["kind"] == kind)
        for kind in ("text", "transformer", "vae")
    }
    figures["peak_over_usable"] = max(found.values()) / plan.budget.usable
    resident = plan.placements["transformer"].resident
    facts = {"card_gib": plan.budget.vram / GIB, "resident": len(resident), "math": rig.math}
    case = Case(name, {**facts, "phases": rows}, 0.0, tuple, rig.device.type, figures=figures)
    return Result(case, [Row("ltxlite", peak_bytes=max(found.values()))])


def _compared(phase: PhasePlan, measured_bytes: int) -> dict[str, Any]:
    """Compare a peak with the account: what is counted, and above it what libraries may take."""
    need = phase.need
    counted, stated = phase.peak - need.workspace, phase.peak
    distance = max(0, counted - measured_bytes, measured_bytes - stated)
    kind = KINDS[need.component]
    if kind != "vae":
        distance = max(0, distance - ALLOWANCE)
    return {
        "phase": need.phase,
        "kind": kind,
        "counted": counted,
        "with_libraries": stated,
        "measured": measured_bytes,
        "off": distance / stated,
    }


@contextmanager
def capped(rig: Rig, nbytes: int) -> Iterator[None]:
    """Let the allocator give no more than so many bytes; without a card there is no bound."""
    if rig.device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(rig.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), rig.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, rig.device)


def _weights(network: nn.Module) -> int:
    """Return the bytes of a network that would lie on a card: what is not streamed, and slots."""
    streams = {
        name: item.streamer.report
        for name, item in network.named_modules()
        if isinstance(item, StreamedList)
    }
    host = ANATOMY["transformer"].host if "blocks" in streams else ("embed_tokens",)
    apart = tuple(f"{name}." for name in (*streams, *host))
    fixed = sum(
        value.nbytes
        for name, value in network.state_dict(keep_vars=True).items()
        if not name.startswith(apart)
    )
    return fixed + sum(item.resident + item.slots for item in streams.values())
