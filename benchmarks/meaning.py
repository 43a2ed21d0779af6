"""Does a clip show what its prompt says? Held-out captions, attribute by attribute.

The shipped world model makes a clip of each caption in two stages, in every format and with parts
of the network broken on purpose. Colour, background, direction, shape and rhythm are measured in
the decoded frames, tone and rhythm in the waveform. `speed` tells whether shapes are as fast as in
training, `seen` is the rhythm of the picture, `as one` the share of pulsing clips whose picture and
sound pulse together.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import report
from ltxlite import pipeline
from ltxlite.convert.run import Conversion, convert
from ltxlite.demo import world_files
from ltxlite.models.block import Block
from ltxlite.models.transformer import Transformer
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.presets import Model, stages_for
from ltxlite.progress import Clock, Report
from ltxlite.request import Files, Output, Request
from ltxlite.stages import Latents, beginning
from ltxlite.training.measure import facts_of, listen_to, look, together
from ltxlite.training.scene import SPEEDS
from ltxlite.training.sheet import save_rows
from ltxlite.training.world import Facts, held_out
from ltxlite_quant.policy import recipe_named

DESCRIPTION = "do clips of the world model show what their prompts say, per format and mutation"
SIZE, FRAMES, FPS = 128, 17, "16"
# At load, and as files. K-quants need rows of 256 values, which one layer of eight has here.
FORMATS = (
    "bf16", "fp8", "mxfp8", "int8", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "nf4", "nvfp4",
)  # fmt: skip
FILES = ("IQ4_NL", "MXFP4")
SHEET, SHEET_STEP = 8, 4  # clips, and every which of their frames
MATHS = ("int8", "fp16", "fp8")
AS_ONE = 0.5  # correlation of size and loudness
SPEED_SLACK = 0.06  # of what is measured, beyond the speeds that training draws
LEAST: Mapping[str, float] = MappingProxyType(
    {
        **dict.fromkeys(("background", "colour", "direction", "tone", "rhythm"), 0.95),
        "shape": 0.85,
    }
)
MOST_WITHOUT_TEXT = MappingProxyType({"colour": 0.6, "direction": 0.6})
CAUGHT = 0.1  # a mutation costs at least one attribute this much
Scores = dict[str, float]
Mutation = Callable[[Transformer], None]


@dataclass(frozen=True, slots=True)
class Run:
    """A row of the table: how weights are stored, what computes, what is broken.

    quantize: the format taken at load.  recipe: that of the file instead.
    """

    name: str
    quantize: str | None = None
    recipe: str = "BF16"
    dtype: str = "float32"
    math: str = "auto"
    mutation: Mutation | None = None


def _blocks(transformer: Transformer) -> list[Block]:
    return [block for block in transformer.blocks if isinstance(block, Block)]


def _close(*modules: nn.Module) -> None:
    for module in modules:
        for value in module.parameters():
            _set(value, 0.0)


def _set(value: Tensor, number: float) -> None:
    """Replace a weight: what lies in a mapped file cannot be written over."""
    value.data = torch.full_like(value, number)


def text_off(transformer: Transformer) -> None:
    """Cut what the prompt says."""
    for block in _blocks(transformer):
        _close(block.video.text_attention.to_out, block.audio.text_attention.to_out)


def cross_off(transformer: Transformer) -> None:
    """Cut picture and sound from each other."""
    for block in _blocks(transformer):
        _close(block.audio_to_video.to_out, block.video_to_audio.to_out)


def gates_off(transformer: Transformer) -> None:
    """Open every head's gate alike."""
    for name, module in transformer.named_modules():
        if name.endswith("to_gate_logits"):
            _close(module)


def norms_off(transformer: Transformer) -> None:
    """Leave the weights of query and key norms out."""
    for name, value in transformer.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            _set(value, 1.0)


def prompt_modulation_off(transformer: Transformer) -> None:
    """Leave the prompt as it comes from the connector."""
    for name, value in transformer.named_parameters():
        if "prompt_" in name:
            _set(value, 0.0)


def last_block_off(transformer: Transformer) -> None:
    """Leave the last block out."""
    transformer.blocks = transformer.blocks[:-1]


def _with_positions(change: Callable[[Tensor, bool], Tensor]) -> Mutation:
    def mutate(transformer: Transformer) -> None:
        rope = transformer.rope
        changed = lambda positions, sound: rope(change(positions.clone(), sound), sound)  # noqa: E731
        transformer.rope = changed  # type: ignore[method-assign]

    return mutate


def _swapped(positions: Tensor, sound: bool) -> Tensor:
    return positions if sound else positions[:, [0, 2, 1]]


def _stretched(positions: Tensor, sound: bool) -> Tensor:
    if not sound:
        positions[:, 0] *= 1.5
    return positions


MUTATIONS: Mapping[str, Mutation] = MappingProxyType(
    {
        "text attention off": text_off,
        "audio-video attention off": cross_off,
        "attention gates ignored": gates_off,
        "q/k norms ignored": norms_off,
        "prompt modulation ignored": prompt_modulation_off,
        "last block skipped": last_block_off,
        "positions constant": _with_positions(lambda x, _: torch.zeros_like(x)),
        "rows and columns swapped": _with_positions(_swapped),
        "wrong fps": _with_positions(_stretched),
    }
)


def runs() -> list[Run]:
    """Return all rows of the table."""
    stored = [Run(name, None if name == "bf16" else name) for name in FORMATS]
    stored += [Run(name, recipe=name) for name in FILES]
    computed = [Run("bf16 arithmetic", dtype="bfloat16")]
    computed += [Run(f"{math} math", math=math) for math in MATHS]
    return [*stored, *computed, *(Run(name, mutation=m) for name, m in MUTATIONS.items())]


class Trial:
    """Makes clips of captions and says how many attributes are right, stage by stage."""

    def __init__(self, model: Path, captions: int) -> None:
        files = world_files()
        self.files = Files(
            str(model),
            text_encoder=str(files.text_encoder),
            vae=str(files.companions),
            audio_vae=str(files.companions),
            text_projection=str(files.companions),
            upscalers=(str(files.upscaler),),
        )
        every = held_out()
        self.facts = every[:: max(1, len(every) // captions)][:captions]
        self.clock = Clock(Report())
        self.clips: list[Tensor] = []  # frames (F, 3, H, W) of the last run's second stage

    @torch.inference_mode()
    def scores(self, run: Run) -> list[Scores]:
        """Return the shares of each stage."""
        networks = open_networks(self.files, "cpu", run.dtype, run.quantize, run.math)
        requests = [self._request(facts.caption(), seed) for seed, facts in enumerate(self.facts)]
        prompts = [pipeline.encode(request, networks, self.clock) for request in requests]
        found: list[list[Scores]] = [[], []]
        self.clips = []
        if run.mutation is not None:
            networks = _Mutated(networks, run.mutation)
        for facts, request, contexts in zip(self.facts, requests, prompts, strict=True):
            start = beginning(request, networks)
            stages = pipeline.run_stages(request, networks, contexts, start, self.clock)
            for stage, progress in zip(found, stages, strict=True):
                frames = torch.cat(list(pipeline.decode_picture(networks, progress.latents.video)))
                stage.append(self._right(facts, networks, progress.latents, frames))
            self.clips.append(frames)
        return [_means(stage) for stage in found]

    def _request(self, caption: str, seed: int) -> Request:
        return Request(
            caption, self.files, Output("unused.mp4"), stages_for(Model("distilled")), SIZE, SIZE,
            FRAMES, FPS, seed,
        )  # fmt: skip

    def _right(self, facts: Facts, networks: Networks, latents: Latents, frames: Tensor) -> Scores:
        waveform, rate = pipeline.decode_sound(networks, latents.audio)
        sight, hearing = look(frames, float(FPS)), listen_to(waveform, rate)
        right = {k: float(v) for k, v in facts.agreement(facts_of(sight, hearing)).items()}
        slow, fast = SPEEDS
        speed = float(sight.velocity.norm())
        right["speed"] = float(slow - SPEED_SLACK <= speed <= fast + SPEED_SLACK)
        right["seen"] = float(sight.rhythm == facts.rhythm)
        if facts.rhythm == "pulsing":
            right["as one"] = float(together(sight, hearing, float(FPS)) > AS_ONE)
        return right


class _Mutated(Networks):
    """Networks whose transformer is broken on purpose."""

    def __init__(self, whole: Networks, mutation: Mutation) -> None:
        self.__dict__.update(vars(whole))
        self.mutation = mutation

    def transformer(self, prepare: Callable[[Transformer], None] | None = None) -> Transformer:
        network = super().transformer(prepare)
        self.mutation(network)
        return network


def _means(rows: Sequence[Scores]) -> Scores:
    names = dict.fromkeys(name for row in rows for name in row)
    listed = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in listed.items()}


def verdicts(found: Mapping[str, list[Scores]]) -> list[str]:
    """Return what falls short of the issue's targets."""
    missed = []
    base = found.get("bf16")
    for name, stages in found.items():
        for number, scores in enumerate(stages, start=1):
            if name not in MUTATIONS:
                missed += [
                    f"{name}, stage {number}: {attribute} {scores[attribute]:.2f} < {least}"
                    for attribute, least in LEAST.items()
                    if scores[attribute] < least
                ]
            if name == "text attention off":
                missed += [
                    f"{name}, stage {number}: {attribute} {scores[attribute]:.2f} > {most}"
                    for attribute, most in MOST_WITHOUT_TEXT.items()
                    if scores[attribute] > most
                ]
        if name in MUTATIONS and base and not _caught(base, stages):
            missed.append(f"{name}: no attribute falls by {CAUGHT}")
    return missed


def _caught(base: Sequence[Scores], broken: Sequence[Scores]) -> bool:
    return any(
        whole[name] - part.get(name, 0.0) >= CAUGHT
        for whole, part in zip(base, broken, strict=True)
        for name in whole
    )


def show(found: Mapping[str, list[Scores]], console: Console) -> None:
    """Print the table, one row a run and stage."""
    columns = list(next(iter(found.values()))[0])
    table = Table("run", "stage", *columns)
    for name, stages in found.items():
        for number, scores in enumerate(stages, start=1):
            table.add_row(name, str(number), *(f"{scores.get(key, 0):.2f}" for key in columns))
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    """Run the rows asked for; 0 is fine, 1 a missed target."""
    parser = argparse.ArgumentParser("python -m benchmarks meaning", description=__doc__)
    parser.add_argument("--captions", type=int, default=64, help="held-out captions a row [64]")
    parser.add_argument("--case", action="append", help="only this row; may be repeated")
    parser.add_argument("--sheet", type=Path, help="also write frames of the first row's clips")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time, a thread each [1]")
    parser.add_argument("--check", action="store_true", help="compare with the issue's targets")
    parser.add_argument("--out", action="store_true", help="also keep the JSON under results/")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    found: dict[str, list[Scores]] = {}
    names = [run.name for run in runs() if options.case is None or run.name in options.case]
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.workers, get_context("spawn")) as pool,
    ):
        sheets = [options.sheet, *[None] * len(names)]
        rows = pool.map(_row, names, repeat(Path(folder)), repeat(options.captions), sheets)
        for name, scores in zip(names, rows, strict=True):
            found[name] = scores
            console.print(name, json.dumps(scores), soft_wrap=True, markup=False)
    return _finish(options, found, console)


def _row(name: str, folder: Path, captions: int, sheet: Path | None) -> list[Scores]:
    """Make one row of the table, in a process of its own."""
    torch.set_num_threads(1)
    run = next(run for run in runs() if run.name == name)
    trial = Trial(_stored(folder / name.replace("/", "-"), run.recipe), captions)
    scores = trial.scores(run)
    if sheet is not None:
        save_rows([clip[::SHEET_STEP] for clip in trial.clips[:SHEET]], sheet)
    return scores


def _stored(folder: Path, recipe: str) -> Path:
    """Write the shipped model by a recipe: BF16, for others to quantize while they load it."""
    target = folder / f"ltxlite-world-2.3-distilled-{recipe}.gguf"
    folder.mkdir()
    sources = (world_files().model,)
    convert(Conversion(sources, target, recipe_named(recipe), device="cpu"), Report())
    return target


def _finish(
    options: argparse.Namespace, found: Mapping[str, list[Scores]], console: Console
) -> int:
    show(found, console)
    missed = verdicts(found) if options.check else []
    header = report.conditions("cpu", 1)
    document: dict[str, Any] = {
        "benchmark": "meaning", **header, "captions": options.captions, "scores": found,
        "missed": missed,
    }  # fmt: skip
    if options.out:
        path = report.results_path(header, "meaning")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    for line in missed:
        console.print(f"missed: {line}", soft_wrap=True, markup=False)
    return 1 if missed else 0
