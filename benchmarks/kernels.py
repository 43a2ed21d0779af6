"""Every kernel on a CUDA card: ceilings, then correctness, then speed beside its rivals.

One process of less than ten minutes that needs nothing but torch, triton and numpy; other packages
take part if they are there. Without a card it says so; with --small all trials run on the CPU in
tiny sizes, through the twins: that tries the program and measures nothing.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks import kernels_checks, kernels_checks_rows, kernels_targets, report
from benchmarks.harness import Row
from benchmarks.kernels_block import blocks
from benchmarks.kernels_checks import Check, Finding, findings, run
from benchmarks.kernels_mixing import attentions, fusions
from benchmarks.kernels_run import UNABLE, Bench, Outcome, Trial, measure
from benchmarks.kernels_trials import ceilings, decodings, linears

DESCRIPTION = "kernels on a CUDA card beside their rivals"
# In this order; the families that targets speak of before the long tail.
TABLES = (blocks, decodings, fusions, attentions, linears)
CHECKS = (*kernels_checks.CHECKS, *kernels_checks_rows.CHECKS)
BUDGET_SECONDS = 540  # what is left then is skipped
COMPILING_SECONDS = 180  # at most; what is left then is compiled when its turn comes
COMPILING_BYTES = 6 << 30  # of card memory for each thread that compiles
HEADLINE_ROWS = 6000  # rates of smaller products say little about a step


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 is fine, 1 a wrong kernel or a missed target, 2 nothing to measure with."""
    options = _parse(arguments)
    if not torch.cuda.is_available() and not options.small:
        print("no CUDA device: nothing to measure; --small tries the program", file=sys.stderr)
        print(json.dumps({"benchmark": "kernels", "skipped": "no CUDA device"}))
        return 2
    deadline = time.monotonic() + options.seconds
    bench = Bench("cpu" if options.small else "cuda", options.small, options.turns, deadline)
    document: dict[str, Any] = {"benchmark": "kernels", "conditions": conditions(bench)}
    say("  ".join(f"{key} {value}" for key, value in document["conditions"].items()))
    trials = [one for one in _trials(bench.small) if options.case in one.name]
    if bench.cuda and not options.no_compile:
        document["compiling_seconds"] = compile_all(trials, bench)
    first = [measure(one, bench) for one in ceilings(bench.small)]
    ceiling = _ceilings(first)
    _report(first, ceiling)
    checks = [(check, run(check, bench)) for check in CHECKS]
    wrong = _check_lines(checks)
    outcomes = first + [_measured(one, bench, wrong, ceiling) for one in trials]
    document |= {"ceilings": ceiling, "checks": _checks_json(checks), "achieved": {}}
    document["cases"] = [_case(one) for one in outcomes]
    document["achieved"] = achieved(outcomes) if bench.cuda else {}
    return _conclude(document, outcomes, bool(wrong), options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, no figures")
    parser.add_argument("--check", action="store_true", help="judge targets stated for this card")
    parser.add_argument("--case", default="", help="only trials whose names hold this text")
    parser.add_argument("--turns", type=int, default=7, help="samples of each contender [7]")
    help = f"skip what has not begun after so many [{BUDGET_SECONDS}]"
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help=help)
    parser.add_argument("--no-compile", action="store_true", help="compile one after the other")
    parser.add_argument("--out", action="store_true", help="also keep the JSON under results/")
    return parser.parse_args(arguments)


def say(line: str) -> None:
    """Tell people something."""
    print(line, file=sys.stderr, flush=True)


def conditions(bench: Bench) -> dict[str, Any]:
    """Describe the machine: what a number means nothing without."""
    found = report.conditions(bench.device, bench.turns)
    try:
        found["triton"] = importlib.import_module("triton").__version__
    except ImportError:
        found["triton"] = None
    if bench.cuda:
        card = torch.cuda.get_device_properties(0)
        found |= {"capability": 10 * card.major + card.minor, "cuda": torch.version.cuda}
        found["multiprocessors"] = card.multi_processor_count
        found["clocks"] = "not locked"
    return found


def _trials(small: bool) -> Iterator[Trial]:
    for table in TABLES:
        yield from table(small)


def compile_all(trials: Sequence[Trial], bench: Bench) -> float:
    """Run what is ours once, in threads, so that all kernels are compiled; returns seconds.

    Compiling is mostly LLVM and ptxas, which leave Python's lock. What fails here fails again, and
    is told, when its turn comes.
    """
    start = time.monotonic()
    memory = torch.cuda.get_device_properties(0).total_memory
    threads = max(1, min(os.cpu_count() or 1, memory // COMPILING_BYTES))

    def once(job: Trial | Check) -> None:
        if time.monotonic() - start > COMPILING_SECONDS:
            return
        try:
            if isinstance(job, Check):
                findings(job, bench)
                return
            with torch.inference_mode():
                for contender in job.build(bench).contenders:
                    if contender.ours and contender.run is not None:
                        contender.run(0)
        except UNABLE:
            return

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(once, (*CHECKS, *trials)))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    seconds = time.monotonic() - start
    say(f"compiled in {seconds:.0f} s, {threads} threads")
    return round(seconds, 1)


def _measured(
    trial: Trial, bench: Bench, wrong: Iterable[str], ceiling: dict[str, float]
) -> Outcome:
    if trial.family in wrong:
        outcome = Outcome(trial, red=f"{trial.name}: {trial.family} fails its checks")
    else:
        outcome = measure(trial, bench)
    _report([outcome], ceiling)
    return outcome


def _ceilings(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return GB/s of a copy and TFLOP/s of products by type."""
    found: dict[str, float] = {}
    for one in outcomes:
        if one.rows and (rate := one.rate(one.rows[0])):
            found[one.rows[0].name] = round(rate, 2)
    return found


def _report(outcomes: Sequence[Outcome], ceiling: dict[str, float]) -> None:
    for one in outcomes:
        top = ceiling.get(one.trial.ceiling)
        if one.rows and top and (rate := one.rate(one.rows[0])):
            one.figures["of ceiling"] = rate / top
        say(f"{one.trial.name}: {one.red or one.skipped or ''}")
        for row in one.rows:
            say(f"  {row.name:28} {_told(one, row)}")


def _told(outcome: Outcome, row: Row) -> str:
    if row.missing is not None:
        return row.missing
    error = "-" if row.error is None else f"error {row.error:.1e}"
    if row.median_ms is None:
        return error
    rate, unit = outcome.rate(row), "TFLOP/s" if outcome.trial.flops else "GB/s"
    speed = f"{rate:9.1f} {unit}" if rate else ""
    peak = f"{(row.peak_bytes or 0) / 2**20:8.0f} MiB"
    return f"{row.median_ms:9.4f} ms {speed} {peak}  {error}"


def _check_lines(checks: Sequence[tuple[Check, list[Finding]]]) -> set[str]:
    """Tell what is wrong; return the families of it."""
    wrong: set[str] = set()
    for check, found in checks:
        bad = [one for one in found if not one.good]
        say(f"check {check.family}: {len(found) - len(bad)} of {len(found)} right")
        for one in bad:
            say(f"  {one.case}: error {one.error:.2g}, allowed {one.allowed:.2g}")
            wrong.add(check.family)
    return wrong


def _checks_json(checks: Sequence[tuple[Check, list[Finding]]]) -> list[dict[str, Any]]:
    return [
        {"family": check.family, "case": one.case, "error": one.error, "allowed": one.allowed}
        for check, found in checks
        for one in found
    ]


def achieved(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the median rate of each kind of work, TFLOP/s or GB/s, in products of a step's size.

    What `benchmarks project` reads.
    """
    rates: dict[str, list[float]] = {}
    for one in outcomes:
        rows = one.trial.facts.get("M", one.trial.facts.get("queries", HEADLINE_ROWS))
        for row in one.rows:
            kind, rate = one.work.get(row.name), one.rate(row)
            if kind and rate and rows >= HEADLINE_ROWS:
                rates.setdefault(kind, []).append(rate)
    return {kind: round(statistics.median(found), 2) for kind, found in rates.items()}


def _case(outcome: Outcome) -> dict[str, Any]:
    trial = outcome.trial
    found: dict[str, Any] = {"case": trial.name, **trial.facts, "family": trial.family}
    found["ceiling"] = trial.ceiling
    for name in ("red", "skipped"):
        if getattr(outcome, name) is not None:
            found[name] = getattr(outcome, name)
    found["rows"] = [_row(outcome, row) for row in outcome.rows]
    found["figures"] = {key: round(value, 4) for key, value in outcome.figures.items()}
    return found


def _row(outcome: Outcome, row: Row) -> dict[str, Any]:
    if row.missing is not None:
        return {"name": row.name, "missing": row.missing}
    found: dict[str, Any] = {"name": row.name, "error": row.error, "peak_bytes": row.peak_bytes}
    if row.samples_ms:
        unit = "tflops" if outcome.trial.flops else "gb_s"
        times = (row.median_ms, row.percentile_ms(10), row.percentile_ms(90))
        keys = ("median_ms", "p10_ms", "p90_ms")
        found |= {key: round(value or 0.0, 5) for key, value in zip(keys, times, strict=True)}
        found[unit] = round(outcome.rate(row) or 0.0, 2)
        found["samples_ms"] = [round(sample, 5) for sample in row.samples_ms]
    return found


def _conclude(
    document: dict[str, Any],
    outcomes: Sequence[Outcome],
    wrong: bool,
    options: argparse.Namespace,
) -> int:
    verdicts = []
    if options.check:
        verdicts = kernels_targets.judge(outcomes, document["conditions"]["machine"])
        document["targets"] = [{"met": one.met, "line": one.line} for one in verdicts]
        missed = [one for one in verdicts if not one.met]
        say(f"{len(verdicts) - len(missed)} of {len(verdicts)} targets of this card met")
        for one in missed:
            say(f"  MISS {one.line}")
    if options.out:
        path = report.results_path(document["conditions"], "kernels")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        say(f"kept as {path}")
    print(json.dumps(document), flush=True)
    red = wrong or any(one.red for one in outcomes)
    return 0 if not red and all(one.met for one in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
