"""Compile every kernel for every supported card, without one, and compare with the committed table.

Fails on registers in memory (spills), on more shared memory than an architecture has, on a matrix
product that missed its tensor-core instruction, on loads of single bytes, and on registers or a
hot loop more than a tenth above the table. `compiled.json` holds a line for each kernel,
architecture and Triton version, so that a change of generated code shows as a diff.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.sass import TENSOR_CORE

DESCRIPTION = "compile every kernel for every card, without one"
ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_name("compiled.json")
ARCHITECTURES = (80, 86, 89, 90, 120)
# Shared memory a block may have, bytes (CUDA C++ programming guide, compute capabilities).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
GROWTH = 1.1  # of registers and of instructions in a hot loop
KEPT = ("registers", "spills", "shared", "instructions", "loop", "tensor", "loads", "stores", "ptx")

Row = Mapping[str, Any]
Recorded = dict[str, dict[str, Any]]  # "kernel sm_86" -> its line, of one Triton version


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, then compare with the table or rewrite it; 0 is fine, 1 a regression."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    folder = None if options.triton is None else fetched(options.triton)
    rows = []
    for row in compiled(
        options.arch or ARCHITECTURES, options.kernel or [""], folder, options.jobs
    ):
        rows.append(row)
        console.print(_line(row), style="dim", soft_wrap=True, markup=False, highlight=False)
    if not rows:
        console.print("no kernel has such a name", style="red")
        return 2
    version = rows[0]["triton"]
    recorded = read().get(version, {})
    found = [text for row in rows for text in problems(row, {} if options.write else recorded)]
    if options.write:
        write(version, rows, whole=options.arch is options.kernel is None)
    _show(rows, console)
    for text in found:
        console.print(text, style="red", soft_wrap=True, markup=False, highlight=False)
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    summary = {"benchmark": "compile", "triton": version, "compiled": len(rows)}
    print(json.dumps(summary | {"seconds": round(seconds, 1), "problems": found}))
    return 1 if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks compile", description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite these lines of the table")
    parser.add_argument("--triton", metavar="VERSION", help="another Triton, fetched with pip")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="[all]")
    parser.add_argument("--kernel", action="append", help="only names that hold this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes [cores]")
    return parser


def fetched(version: str) -> Path:
    """Return a folder that holds only this version of Triton; install it if need be."""
    folder = Path(tempfile.gettempdir()) / f"ltxlite-triton-{version}"
    if not (folder / "triton").is_dir():
        package = "triton-windows" if sys.platform == "win32" else "triton"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(folder), f"{package}=={version}"], check=True)
    return folder


def compiled(
    architectures: Sequence[int], names: Sequence[str], folder: Path | None = None, jobs: int = 1
) -> Iterator[Row]:
    """Yield what the worker found out, kernel by kernel; `jobs` processes share the work.

    names: texts of which a kernel's name must hold one.  folder: where another Triton lies.
    """
    arguments = [f"--arch={one}" for one in architectures] + [f"--kernel={one}" for one in names]
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(jobs) as pool:
        environment = _environment(Path(cache), folder)
        shares = [[*arguments, "--share", str(job), str(jobs)] for job in range(jobs)]
        for lines in pool.map(lambda share: _work(share, environment), shares):
            yield from lines


def _environment(cache: Path, folder: Path | None) -> dict[str, str]:
    roots = [folder, ROOT, ROOT / "kernels", ROOT / "quant"]
    path = os.pathsep.join(str(root) for root in roots if root is not None)
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # A cache of its own: seconds are those of compiling, and no home folder is written.
    return clean | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}


def _work(arguments: Sequence[str], environment: Mapping[str, str]) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.compile_worker", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the compiling process ended with {done.returncode}; see above")
    return [json.loads(line) for line in done.stdout.splitlines()]


def problems(row: Row, recorded: Mapping[str, Row]) -> list[str]:
    """Return what is wrong with a compiled kernel, also beside its line in the table."""
    name = _name(row)
    if "error" in row:
        return [f"{name}: does not compile: {row['error']}"]
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} loads and stores of spilled registers")
    if row["shared"] > SHARED[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory, {SHARED[row['arch']]} allowed")
    kinds = [TENSOR_CORE[kind] for kind in (row["tensor_core"] or "").split()]
    used = set(row["tensor"])
    if used - {name for names in kinds for name in names} or not all(used & set(k) for k in kinds):
        wanted = ", and ".join(" or ".join(names) for names in kinds) or "none"
        found.append(f"tensor-core instructions {row['tensor']}, wanted {wanted}")
    if row["loads"].get("1") and not row["byte_loads"]:
        found.append(f"{row['loads']['1']} loads of a single byte")
    found += _grown(row, recorded.get(name)) if recorded else []
    return [f"{name}: {text}" for text in found]


def _grown(row: Row, before: Row | None) -> list[str]:
    if before is None:
        return ["not in the table; add it with --write"]
    pairs = {
        "registers": (row["registers"], before["registers"]),
        "instructions in the hot loop": (row["loop"][0], before["loop"][0]),
    }
    return [
        f"{now} {what}, {then} in the table"
        for what, (now, then) in pairs.items()
        if now > GROWTH * then
    ]


def _name(row: Row) -> str:
    return f"{row['kernel']} sm_{row['arch']}"


def read() -> dict[str, Recorded]:
    """Return the table: Triton version -> line by name."""
    if not TABLE.exists():
        return {}
    table: dict[str, Recorded] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def write(version: str, rows: Sequence[Row], whole: bool) -> None:
    """Put rows in the table; `whole` drops what else it has of this Triton version."""
    table = read()
    lines = {} if whole else table.get(version, {})
    for row in rows:
        if "error" not in row:
            lines[_name(row)] = {key: row[key] for key in KEPT}
    table[version] = lines
    versions = [
        f" {json.dumps(one)}: {{\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table[one].items()))
        + "\n }"
        for one in sorted(table)
    ]
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n", encoding="utf-8")


def _line(row: Row) -> str:
    if "error" in row:
        return f"{_name(row)}: {row['error']}"
    return f"{_name(row)}: {row['registers']} registers, {row['seconds']} s"


def _show(rows: Sequence[Row], console: Console) -> None:
    """Print registers, spills and shared KiB by architecture."""
    architectures = sorted({row["arch"] for row in rows})
    table = Table(title=f"registers / spills / shared bytes, Triton {rows[0]['triton']}")
    table.add_column("kernel")
    for one in architectures:
        table.add_column(f"sm_{one}", justify="right")
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        shown = "failed"
        if "error" not in row:
            shown = f"{row['registers']} / {row['spills']} / {row['shared']}"
        cells.setdefault(row["kernel"], {})[row["arch"]] = shown
    for kernel, by in cells.items():
        table.add_row(kernel, *(by.get(one, "") for one in architectures))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
