"""`python -m benchmarks NAME`: run one benchmark, from the repository's root."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import report
from benchmarks.harness import Case, GateError, Result, measure

if TYPE_CHECKING:
    from rich.console import Console  # `engine` runs where there is none

BENCHMARKS = ("decode", "formats", "fuzz", "kill", "quantize", "step", "stream")
# These count instead of taking turns with rivals, each with options of its own.
OWN_WAYS = (
    "compile",
    "engine",
    "host",
    "kernels",
    "meaning",
    "project",
    "quality",
    "traffic",
    "vram",
)
CHECKED_RUNS = 10  # fewer say too little on a machine that does other things besides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; 0 is fine, 1 a red gate or a missed target, 2 wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] and given[0] in OWN_WAYS:
        own: int = importlib.import_module(f"benchmarks.{given[0]}").main(given[1:])
        return own
    from rich.console import Console

    parser, options = _parse(given)
    if options.check and options.runs < CHECKED_RUNS:
        parser.error(f"--check needs --runs {CHECKED_RUNS} or more, got {options.runs}")
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [case for case in options.cases(options) if options.case in (None, case.name)]
    if not cases:
        parser.error(f"--case {options.case}: {options.benchmark} has no such case")
    console = Console(stderr=True)
    header = report.conditions(cases[0].device, options.runs)
    try:
        results = _measure(cases, options.runs, console)
    except GateError as error:
        console.print(f"red: {error}", style="bold red", soft_wrap=True, markup=False)
        print(json.dumps({"benchmark": options.benchmark, "red": str(error)}))
        return 1
    return _finish(options, header, results, console)


def _parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name in BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        one = names.add_parser(name, help=module.DESCRIPTION, description=module.__doc__)
        one.add_argument("--check", action="store_true", help="compare with targets.toml")
        one.add_argument("--runs", type=int, default=CHECKED_RUNS, help="timed runs of each [10]")
        one.add_argument("--threads", type=int, help="threads torch may use [its own choice]")
        one.add_argument("--case", help="only this case")
        one.add_argument("--out", action="store_true", help="also keep the JSON under results/")
        module.add_options(one)
        one.set_defaults(cases=module.cases, show=getattr(module, "show", report.show))
    return parser, parser.parse_args(arguments)


def _measure(cases: Sequence[Case], runs: int, console: "Console") -> list[Result]:
    results = []
    for case in cases:
        console.print(f"{case.name}: checking, then {runs} runs each", style="dim")
        results.append(measure(case, runs))
    return results


def _finish(
    options: argparse.Namespace,
    header: dict[str, Any],
    results: Sequence[Result],
    console: "Console",
) -> int:
    options.show(header, results, console)
    document = report.as_json(options.benchmark, header, results)
    return report.conclude(document, results, options.check, options.out)


if __name__ == "__main__":
    sys.exit(main())
