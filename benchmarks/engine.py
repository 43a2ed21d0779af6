"""The engine on a card: the account beside its allocator, streamed steps beside resident ones.

One process, under ten minutes, and nothing to download: the networks of LTX-2.3 22B in Q4_K_M at
full size, their weights random but valid. It needs torch, triton, numpy and safetensors.
Without a CUDA device, or with --small, the same program runs tiny networks on the CPU: that tries
the program and measures nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import engine_memory, report
from benchmarks.engine_memory import Subject
from benchmarks.engine_models import Rig, clip, full_components, small_components
from benchmarks.engine_speed import Pair, shape_of
from benchmarks.harness import Case, Result, Row
from ltxlite.account import Components, Levers, StageJob
from ltxlite.errors import BudgetError
from ltxlite.memory.budget import GIB, Budget
from ltxlite_kernels.dispatch import Math

DESCRIPTION = "account against a card's allocator, streamed steps against resident ones"
MINUTES = 9.0  # cases that would begin later are not run
HOST = 64 * GIB  # what may be pinned; `host` measures RAM
Run = Callable[[], Result]


@dataclass(frozen=True, slots=True)
class Scale:
    """What is run: networks, a clip and cards for memory, latent sizes for steps."""

    components: Components
    stages: tuple[StageJob, ...]
    cards: dict[str, Budget]
    steps: dict[str, tuple[int, int, int]]
    prompt_tokens: int = engine_memory.PROMPT_TOKENS


def full_scale() -> Scale:
    """Return the 22B release, 1920x1088x121 in two stages, and clips of 2k to 32k tokens."""
    steps = {
        "step 2k": (16, 8, 16),
        "step 4k": (16, 16, 16),
        "step 8k": (16, 17, 30),  # the first stage of 1920x1088x121
        "step 14k": (16, 22, 40),  # 1280x704x121
        "step 32k": (16, 34, 60),  # 1920x1088x121
    }
    cards = {f"memory, {size} GiB": Budget(size * GIB, HOST) for size in (8, 12)}
    return Scale(full_components(), clip(121, 1920, 1088), cards, steps)


def small_scale() -> Scale:
    """Return what a CPU runs in seconds."""
    cards = {"small memory": Budget(150 << 20, HOST, reserve=0)}
    steps = {"small step": (2, 5, 7)}
    return Scale(small_components(), clip(9, 128, 64), cards, steps, prompt_tokens=29)


def runs_of(scale: Scale, rig: Rig, count: int) -> Iterator[tuple[str, Run]]:
    """Yield every case's name and what measures it; both transformers live for all steps."""
    levers = Levers(rig.dtype, math=rig.math, capability=rig.capability)
    subject = Subject(scale.components, scale.stages, levers, scale.prompt_tokens)
    for name, budget in scale.cards.items():
        yield name, partial(engine_memory.measured, name, subject, rig, budget)
    pairs: list[Pair] = []

    def step(name: str, size: tuple[int, int, int]) -> Result:
        if not pairs:
            pairs.append(Pair(scale.components["transformer"], rig))
        return pairs[0].measured(name, shape_of(*size), count)

    try:
        for name, size in scale.steps.items():
            yield name, partial(step, name, size)
    finally:
        for pair in pairs:
            pair.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a case and, as the last line, JSON; 1 if a target is missed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    has_card = torch.cuda.is_available()
    is_small = options.small or not has_card
    if options.check and is_small:
        parser.error("--check needs a CUDA device and full size: small networks measure nothing")
    rig = Rig(
        torch.device("cpu") if is_small else torch.device("cuda", torch.cuda.current_device()),
        torch.float32 if is_small else torch.bfloat16,
        options.math,
    )
    if is_small:
        _say("small networks on the CPU: this tries the program, no figure below is a card's")
    scale = small_scale() if is_small else full_scale()
    header = report.conditions(rig.device.type, options.runs) | {"small": is_small}
    cases = runs_of(scale, rig, options.runs)
    results = list(_measured(cases, options.case, time.monotonic() + 60 * options.minutes))
    document = report.as_json("engine", header, results)
    return report.conclude(document, results, options.check, options.out)


def _measured(
    cases: Iterator[tuple[str, Run]], wanted: str | None, until: float
) -> Iterator[Result]:
    for name, run in cases:
        if wanted not in (None, name):
            continue
        since = time.monotonic()
        if since > until:
            result = _missing(name, "no time was left; see --minutes")
        else:
            try:
                with torch.inference_mode():
                    result = run()
            except (torch.OutOfMemoryError, BudgetError) as error:
                result = _missing(name, str(error).splitlines()[0])
        _say(f"{line(result)}  ({time.monotonic() - since:.0f} s)")
        yield result


def _missing(name: str, why: str) -> Result:
    return Result(Case(name, {}, 0.0, tuple), [Row("ltxlite", missing=why)])


def line(result: Result) -> str:
    """Say a case in a line, and each phase of it in one more."""
    first = result.rows[0]
    if first.missing is not None:
        return f"{result.case.name}: not measured, {first.missing}"
    medians = (
        f"{row.name} {row.median_ms:.1f} ms" for row in result.rows if row.median_ms is not None
    )
    figures = (f"{name} {value:.3f}" for name, value in result.figures.items())
    phases = (_phase(row) for row in result.case.facts.get("phases", ()))
    return "\n".join([f"{result.case.name}: {', '.join((*medians, *figures))}", *phases])


def _phase(row: dict[str, Any]) -> str:
    counted, stated, measured = (
        row[key] / 2**20 for key in ("counted", "with_libraries", "measured")
    )
    return (
        f"  {row['phase']:18} counted {counted:9.1f} MiB, with libraries {stated:9.1f}, "
        f"measured {measured:9.1f}, off {row['off']:.1%}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks engine", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with targets.toml")
    parser.add_argument("--small", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--runs", type=int, default=5, help="timed steps of each kind [5]")
    modes = [mode.value for mode in Math]
    parser.add_argument("--math", choices=modes, default="auto", help="of linears [auto]")
    parser.add_argument("--case", help="only this case")
    help = f"begin no case after so many minutes [{MINUTES:g}]"
    parser.add_argument("--minutes", type=float, default=MINUTES, help=help)
    parser.add_argument("--out", action="store_true", help="also keep the JSON under results/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
