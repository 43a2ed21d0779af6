"""The account of VRAM at full size: every phase of a job, from headers, without a card.

Peak of all phases from text to mp4 with the smallest plan: no block resident, two slots, or three.
The real code runs on the meta device under the allocation meter; prompts are 1024 tokens long, the
most there can be. Beside it the same account of diffusers' transformer with group offload and of a
naive run. What cuBLAS and cuDNN are assumed to need is inside the peaks and a column of its own;
the CUDA context is not.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.harness import Case, Result, Row
from benchmarks.vram_models import WEIGHTS, components
from benchmarks.vram_rivals import diffusers_bytes, diffusers_missing, one_pass_decode
from ltxlite.account import Job, Levers, Phase, StageJob
from ltxlite.account.media import (
    image_phase,
    picture_phase,
    sound_encoder_phase,
    sound_phases,
    upscale_phase,
)
from ltxlite.account.stage import stage_phases
from ltxlite.account.text import text_phases
from ltxlite.errors import BudgetError
from ltxlite.geometry import AudioGrid, ClipShape, LatentGrid
from ltxlite.memory.budget import Budget
from ltxlite.memory.plan import Need, fit
from ltxlite.models.layers import TOKEN_CHUNK
from ltxlite.planning import LADDER, beside_transformer
from ltxlite.presets import Model, stages_for

DESCRIPTION = "account of VRAM of full-size jobs, beside diffusers and a naive run"
FPS = 24.0
GIB = 2.0**30
SIZES = tuple((w, h, f) for w, h in ((768, 512), (1280, 704), (1920, 1088)) for f in (121, 241))
SIZES += ((2560, 1408, 121),)
VARIED = "Q4_K_M"  # the weights that variations are counted with
CARD = Budget(vram=8 << 30, ram=16 << 30)
CAPABILITY = 86  # of the card: an RTX 3060, where "auto" is int8
# The smallest plan takes chunks of 2048 tokens; smaller win little where the decode is the peak.
SMALLEST = next(rung for rung, (chunk, _) in enumerate(LADDER) if chunk == TOKEN_CHUNK)
RANK = 384  # of the distilled LoRA
GIVEN_SIZE = (1280, 768, 121)  # both stages divide by 64, as half-size references need
GIVEN = ("image", "keyframes", "IC-LoRA 1/2", "IC-LoRA 1/1", "retake", "a2v")


@dataclass(frozen=True, slots=True)
class Setup:
    """One row of the table."""

    size: tuple[int, int, int]
    weights: str
    stages: int
    guided: bool = False
    rank: int = 0
    images: int = 0
    given: str = ""

    @property
    def name(self) -> str:
        """Name the row as targets do."""
        extras = ("dev 4 passes", self.guided), (f"LoRA {self.rank}", self.rank)
        words = [word for word, given in (*extras, ("image", self.images)) if given]
        size = "x".join(map(str, self.size))
        words += [self.given] * bool(self.given)
        return " ".join([size, self.weights, f"{self.stages}-stage", *words])

    def job(self) -> Job:
        """Return the job in latent sizes."""
        variant = "dev" if self.guided else "distilled"
        stages = stages_for(Model(variant), count=self.stages)
        width, height, frames = self.size
        found = []
        for stage in stages:
            rows, columns = (int(side * stage.fraction) // 32 for side in (height, width))
            sound = AudioGrid().latent_frames(frames, FPS)
            shape = ClipShape(LatentGrid().latent_frames(frames), rows, columns, sound, FPS)
            plain = StageJob(
                shape,
                stage.video,
                stage.audio,
                steps=30 if self.guided else 8,
                upscaler=stage.upscaler,
                images=self.images,
            )
            found.append(_with_given(plain, self.given, first=not found))
        prompts = (1024,) * (2 if self.guided else 1)
        return Job(width, height, tuple(found), prompts)


def _with_given(stage: StageJob, given: str, first: bool) -> StageJob:
    """Add what steers a job, one of GIVEN; references are seen by the first stage only."""
    shape = stage.shape
    still, whole = (1, shape.rows, shape.columns), (shape.frames, shape.rows, shape.columns)
    match given:
        case "image":
            return replace(stage, images=1)
        case "keyframes":
            return replace(stage, appended=(still,) * 3, encoded=(still,))
        case "IC-LoRA 1/1" | "IC-LoRA 1/2" if first:
            divisor = int(given[-1])
            extent = (shape.frames, shape.rows // divisor, shape.columns // divisor)
            return replace(stage, appended=(extent,), encoded=(extent,))
        case "retake":
            return replace(stage, held=True, encoded=(whole,), sound=shape.audio_frames)
        case "a2v":
            return replace(stage, sound=shape.audio_frames)
    return stage


def setups() -> Iterator[Setup]:
    """Yield all rows: every size with every kind of weights, then what else a job may have."""
    for size in SIZES:
        counts = (1, 2, 3) if all(side % 128 == 0 for side in size[:2]) else (1, 2)
        for weights in WEIGHTS:
            yield from (Setup(size, weights, count) for count in counts)
        for count in (1, 2):
            plain = Setup(size, VARIED, count)
            yield replace(plain, guided=True)
            yield replace(plain, rank=RANK)
            yield replace(plain, guided=True, rank=RANK)
            yield replace(plain, images=1)
    for count in (1, 2):
        plain = Setup(GIVEN_SIZE, VARIED, count)
        yield plain
        yield from (replace(plain, given=given) for given in GIVEN)


def _needs(setup: Setup, rung: int) -> list[Need]:
    chunk, group_bytes = LADDER[rung]
    levers = Levers(chunk=chunk, group_bytes=group_bytes, math="auto", capability=CAPABILITY)
    return beside_transformer([phase.need() for phase in accounted(setup, levers)])


def measured(setup: Setup, rivals: bool, rung: int = SMALLEST) -> Result:
    """Return the account of a row and of its rivals; rung: of the planner's ladder of chunks."""
    needs = _needs(setup, rung)
    worst = max(needs, key=Need.least)
    third = max(needs, key=lambda need: need.least(3))
    rows = [Row("ltxlite", peak_bytes=worst.least())]
    facts: dict[str, Any] = {
        "phase": worst.phase,
        "phase with 3 slots": third.phase,
        "phases": [_phase(need) for need in needs],
        "on 8 GiB": _on_a_card(setup),
    }
    figures = {
        "peak_gib": worst.least() / GIB,
        "peak_3_slots_gib": third.least(3) / GIB,
        "stated_gib": worst.workspace / GIB,
    }
    result = Result(Case(setup.name, facts, 0.0, tuple, figures=figures), rows)
    return Result(result.case, rows + _rival_rows(setup)) if rivals else result


def _on_a_card(setup: Setup) -> dict[str, Any]:
    """Return what the planner makes of the row on a card of 8 GiB, 1 of it in reserve."""
    refused, plan, rung = "", None, 0
    for rung in range(len(LADDER)):
        try:
            plan = fit(_needs(setup, rung), CARD)
            break
        except BudgetError as error:
            refused = str(error)
    if plan is None:
        return {"refused": refused}
    residence = next(p.residence for p in plan.phases if p.need.component == "transformer")
    assert residence is not None
    return {
        "chunk": LADDER[rung][0],
        "peak_gib": plan.peak / GIB,
        "usable_gib": CARD.usable / GIB,
        "resident": sorted(residence.placement.resident),
        "pinned_gib": residence.pinned / GIB,
        "moved_gib": residence.moved / GIB,
    }


def accounted(setup: Setup, levers: Levers) -> list[Phase]:
    """Return a row's phases; what rows share is counted once."""
    job = setup.job()
    last = job.stages[-1].shape
    found = [*_text(setup.weights, job.prompts, levers)]
    for number, stage in enumerate(job.stages, start=1):
        if stage.encodes:
            found.append(replace(_image(stage, levers), name=f"encode pictures for stage {number}"))
    if job.stages[0].sound:
        found.append(sound_encoder_phase(components("bf16"), job.stages[0], levers))
    for number, stage in enumerate(job.stages, start=1):
        parts: list[Phase] = []
        if stage.upscaler is not None:
            parts.append(_upscaled(job.stages[number - 2].shape, levers))
        parts += _stage(setup.weights, setup.rank, stage, levers)
        found += (
            replace(part, name=part.name.replace("stage 0", f"stage {number}")) for part in parts
        )
    return [*found, *_sound(last, levers), _picture(last, levers)]


@cache
def _text(weights: str, prompts: tuple[int, ...], levers: Levers) -> list[Phase]:
    return text_phases(components(weights), prompts, levers)


@cache
def _stage(weights: str, rank: int, stage: StageJob, levers: Levers) -> list[Phase]:
    return stage_phases(components(weights, rank), 0, stage, levers)


@cache
def _upscaled(before: ClipShape, levers: Levers) -> Phase:
    return upscale_phase(components("bf16"), 0, before, "x2", levers)


@cache
def _image(stage: StageJob, levers: Levers) -> Phase:
    return image_phase(components("bf16"), 0, stage, levers)


@cache
def _sound(shape: ClipShape, levers: Levers) -> list[Phase]:
    return sound_phases(components("bf16"), shape, levers)


@cache
def _picture(shape: ClipShape, levers: Levers) -> Phase:
    if levers.chunk > shape.video_tokens:
        return one_pass_decode(components("bf16"), shape, levers)
    return picture_phase(components("bf16"), shape, levers)


def _rival_rows(setup: Setup) -> list[Row]:
    missing = diffusers_missing()
    theirs, naive = Row("diffusers", missing=missing), Row("naive")
    given = components(setup.weights, setup.rank)
    if missing is None:
        stages = setup.job().stages
        theirs.peak_bytes = max(diffusers_bytes(given, stage, Levers()) for stage in stages)
    careless = Levers(chunk=1 << 30)
    naive.peak_bytes = max(
        phase.peak_bytes(slots=0) + sum(phase.units) for phase in accounted(setup, careless)
    )
    return [theirs, naive]


def _phase(need: Need) -> dict[str, Any]:
    return {
        "name": need.phase,
        "peak_bytes": need.least(),
        "fixed_bytes": need.fixed,
        "block_bytes": max(need.units, default=0),
        "activation_bytes": need.activations,
        "stated_bytes": need.workspace,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and, as the last line, JSON; 1 if a target is missed."""
    options = _parse(arguments)
    console = Console(stderr=True)
    torch.set_num_threads(1)
    chosen = [setup for setup in setups() if options.case in (None, setup.name)]
    results = []
    for setup in chosen:
        console.print(setup.name, style="dim")
        results.append(measured(setup, not options.no_rivals, options.rung))
    header = report.conditions("cpu", 1)
    show(results, console)
    document = report.as_json("vram", header, results)
    return report.conclude(document, results, options.check, options.out)


def show(results: Sequence[Result], console: Console) -> None:
    """Print one line a row, in GiB."""
    table = Table()
    columns = ("", "2 slots", "3 slots", "stated", "peak in", "8 GiB", "resident")
    for column in (*columns, "diffusers", "naive"):
        table.add_column(column, justify="left" if column in ("", "peak in") else "right")
    for result in results:
        figures = result.case.figures
        ours = [f"{figures[key]:.2f}" for key in ("peak_gib", "peak_3_slots_gib", "stated_gib")]
        others = {row.name: row.peak_bytes for row in result.rows[1:]}
        cells = (_gib(others.get("diffusers")), _gib(others.get("naive")))
        card = result.case.facts["on 8 GiB"]
        planned = ("refused", "-")
        if "refused" not in card:
            planned = (f"{card['peak_gib']:.2f}", str(len(card["resident"])))
        table.add_row(result.case.name, *ours, result.case.facts["phase"], *planned, *cells)
    console.print(table)


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.vram", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with targets.toml")
    parser.add_argument("--case", help="only this row")
    parser.add_argument("--no-rivals", action="store_true", help="only ltxlite")
    help = f"step of the planner's ladder of chunks, 0 for the largest [{SMALLEST}]"
    parser.add_argument("--rung", type=int, choices=range(len(LADDER)), default=SMALLEST, help=help)
    parser.add_argument("--out", action="store_true", help="also keep the JSON under results/")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
