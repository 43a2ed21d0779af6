"""From results to what people and machines read: conditions, table, JSON, verdicts."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness import Result, Row

if TYPE_CHECKING:
    from rich.console import Console  # `engine` runs where there is none

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target of one case: what was wanted, what came out, whether it was met."""

    case: str
    figure: str
    at_most: float
    value: float | None
    why: str = ""

    @property
    def met(self) -> bool:
        """Tell whether the figure exists and is small enough."""
        return self.value is not None and self.value <= self.at_most

    @property
    def line(self) -> str:
        """Say it in a few words."""
        if self.value is None:
            return f"{self.case} {self.figure} not measured ({self.why})"
        return f"{self.case} {self.figure} {self.value:.3f} (at most {self.at_most:g})"


def conditions(device: str, runs: int) -> dict[str, Any]:
    """Describe the machine and the state of the code: what a number means nothing without."""
    # Results of other runs in the same clone change nothing of what is measured.
    changes = _git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    found: dict[str, Any] = {
        "machine": machine_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(changes),
        "date": datetime.date.today().isoformat(),
        "runs": runs,
    }
    if hasattr(os, "getloadavg"):  # not on Windows; above `cores`, others were computing too
        found["load"] = round(os.getloadavg()[0], 1)
    return found


def machine_name(device: str) -> str:
    """Return the name of what computes: the card, or the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(encoding="utf-8"), re.M)
        if named:
            return named[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def as_json(name: str, header: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Return everything measured as plain data."""
    cases = [
        {
            "case": result.case.name,
            **result.case.facts,
            "tolerance": result.case.tolerance,
            "rows": [_row(row) for row in result.rows],
            "figures": {key: round(value, 4) for key, value in result.figures.items()},
        }
        for result in results
    ]
    return {"benchmark": name, "conditions": dict(header), "cases": cases}


def _row(row: Row) -> dict[str, Any]:
    if row.missing is not None:
        return {"name": row.name, "missing": row.missing}
    times = {
        "median_ms": row.median_ms,
        "p10_ms": row.percentile_ms(10),
        "p90_ms": row.percentile_ms(90),
    }
    return {
        "name": row.name,
        "error": row.error,
        "peak_bytes": row.peak_bytes,
        **{key: None if value is None else round(value, 3) for key, value in times.items()},
        "samples_ms": [round(sample, 3) for sample in row.samples_ms],
    }


def show(header: Mapping[str, Any], results: Sequence[Result], console: "Console") -> None:
    """Print conditions and one table a case."""
    from rich.table import Table

    console.print(" · ".join(f"{key} {value}" for key, value in header.items()), style="dim")
    for result in results:
        facts = ", ".join(f"{key} {value}" for key, value in result.case.facts.items())
        table = Table(title=f"{result.case.name}: {facts}", title_justify="left")
        for column in ("", "median ms", "p10", "p90", "peak MiB", "error"):
            table.add_column(column, justify="right" if column else "left")
        for row in result.rows:
            table.add_row(*_cells(row))
        console.print(table)
        figures = ", ".join(f"{key} {value:.3f}" for key, value in result.figures.items())
        console.print(figures or "nothing to compare with")


def _cells(row: Row) -> list[str]:
    if row.missing is not None:
        return [row.name, row.missing.replace("[", r"\[")]  # rich would read [rivals] as markup
    times = (row.median_ms, row.percentile_ms(10), row.percentile_ms(90))
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    error = "-" if row.error is None else f"{row.error:.1e}"
    return [row.name, *("-" if t is None else f"{t:.1f}" for t in times), peak, error]


def read_targets(name: str, path: Path = ROOT / "targets.toml") -> list[dict[str, Any]]:
    """Return the targets of a benchmark."""
    return list(tomllib.loads(path.read_text(encoding="utf-8")).get(name, []))


def judge(results: Sequence[Result], targets: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Compare every case with every target; a target whose rivals did not run is not met.

    A target with `cases` concerns only these.
    """
    verdicts = []
    for result in results:
        missing = {row.name: row.missing for row in result.rows if row.missing is not None}
        for target in targets:
            if result.case.name not in target.get("cases", [result.case.name]):
                continue
            absent = [f"{rival} {missing[rival]}" for rival in target["rivals"] if rival in missing]
            value = None if absent else result.figures.get(target["figure"])
            why = "; ".join(absent) or "no such figure"
            limit = target["at_most"]
            verdicts.append(Verdict(result.case.name, target["figure"], limit, value, why))
    return verdicts


def summary(verdicts: Sequence[Verdict]) -> str:
    """Say in one line whether all targets were met, the missed ones first."""
    missed = [verdict for verdict in verdicts if not verdict.met]
    head = (
        f"MISS {len(missed)} of {len(verdicts)}" if missed else f"ok, {len(verdicts)} targets met"
    )
    ordered = [*missed, *(verdict for verdict in verdicts if verdict.met)]
    return f"{head}: " + "; ".join(verdict.line for verdict in ordered)


def conclude(document: dict[str, Any], results: Sequence[Result], check: bool, out: bool) -> int:
    """Judge if asked to, keep if asked to, print JSON as the last line; 1 if a target is missed."""
    verdicts = judge(results, read_targets(document["benchmark"])) if check else []
    if check:
        document["targets"] = [{"met": item.met, "line": item.line} for item in verdicts]
    if out:
        path = results_path(document["conditions"], document["benchmark"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"kept as {path}", file=sys.stderr)
    print(json.dumps(document), flush=True)
    if check:
        print(summary(verdicts), file=sys.stderr)
    return 0 if all(item.met for item in verdicts) else 1


def results_path(header: Mapping[str, Any], name: str, root: Path = ROOT / "results") -> Path:
    """Return where a result belongs: <machine>/<date>-<commit>-<benchmark>.json."""
    machine = f"{header['machine']} {header['threads']} threads"
    folder = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", machine.lower())).strip("-")
    dirty = "-dirty" if header["dirty"] else ""
    return root / folder / f"{header['date']}-{header['commit']}{dirty}-{name}.json"
