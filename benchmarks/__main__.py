"""`python -m benchmarks NAME`: run one benchmark, from the repository's root."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from benchmarks import report, vram
from benchmarks.harness import Case, GateError, Result, measure

BENCHMARKS = ("decode", "formats", "fuzz", "kill", "quantize", "step", "stream")
CHECKED_RUNS = 10  # fewer say too little on a machine that does other things besides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; 0 is fine, 1 a red gate or a missed target, 2 wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["vram"]:
        return vram.main(given[1:])  # these two count instead of timing, with options of their own
    if given[:1] == ["compile"]:
        return importlib.import_module("benchmarks.compile").main(given[1:])  # needs triton
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


def _measure(cases: Sequence[Case], runs: int, console: Console) -> list[Result]:
    results = []
    for case in cases:
        console.print(f"{case.name}: checking, then {runs} runs each", style="dim")
        results.append(measure(case, runs))
    return results


def _finish(
    options: argparse.Namespace,
    header: dict[str, Any],
    results: Sequence[Result],
    console: Console,
) -> int:
    options.show(header, results, console)
    document = report.as_json(options.benchmark, header, results)
    verdicts = []
    if options.check:
        verdicts = report.judge(results, report.read_targets(options.benchmark))
        document["targets"] = [{"met": item.met, "line": item.line} for item in verdicts]
    if options.out:
        path = report.results_path(header, options.benchmark)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(f"kept as {path}", style="dim", soft_wrap=True)
    print(json.dumps(document), flush=True)
    if options.check:
        console.print(report.summary(verdicts), soft_wrap=True, markup=False)
    return 0 if all(item.met for item in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
