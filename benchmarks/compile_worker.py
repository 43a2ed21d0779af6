"""Compiles specimens for cards that are not there; run by `benchmarks.compile` in processes of
its own, with the Triton that their path has.

No driver is needed: Triton compiles for a named target and brings ptxas and cuobjdump along.
Prints a line of JSON for each compilation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from ltxlite_kernels.specimens import Specimen, specimens

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(specimen: Specimen, architecture: int) -> Any:
    """Compile a specimen for sm_<architecture>."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for at, name in enumerate(specimen.kernel.arg_names):
        given = specimen.types.get(name)
        if name in specimen.constants or given is None:
            signature[name], constants[(at,)] = "constexpr", specimen.constants.get(name)
            continue
        signature[name] = given.partition(":")[0]
        if given.startswith("*") or given.endswith(":16"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(specimen.kernel, signature, constants, attributes)
    options = {key: specimen.constants[key] for key in OPTIONS if key in specimen.constants}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def examined(specimen: Specimen, architecture: int) -> dict[str, Any]:
    """Compile a specimen and return what its code asks of the card."""
    start = time.perf_counter()
    kernel = compiled(specimen, architecture)
    seconds = time.perf_counter() - start
    listing = _listing(kernel.asm["cubin"])
    code = sass.instructions(listing)
    loads, stores = sass.accesses(kernel.asm["ptx"])
    loop, tensor = sass.hot_loop(code)
    return {
        "registers": int(listing.split("REG:")[1].split()[0]),
        "spills": sass.spills(code),
        "shared": kernel.metadata.shared,
        "instructions": len(code),
        "tensor": sass.tensor_names(code),
        "ptx": sass.ptx_tensor(kernel.asm["ptx"]),
        "loop": [loop, tensor],
        "loads": loads,
        "stores": stores,
        "seconds": round(seconds, 2),
    }


def _listing(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = TOOLS / ("cuobjdump.exe" if sys.platform == "win32" else "cuobjdump")
        command = [str(tool), "-res-usage", "-sass", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile one share of the specimens whose names hold a text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, action="append", required=True)
    parser.add_argument("--kernel", action="append", required=True)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1))
    options = parser.parse_args(arguments)
    first, step = options.share
    wanted = [
        (specimen, architecture)
        for architecture in options.arch
        for specimen in specimens(architecture)
        if any(text in specimen.name for text in options.kernel)
    ]
    for specimen, architecture in wanted[first::step]:
        expected = {"tensor_core": specimen.tensor_core, "byte_loads": specimen.byte_loads}
        about = {"kernel": specimen.name, "arch": architecture, "triton": triton.__version__}
        print(json.dumps(about | expected | _outcome(specimen, architecture)), flush=True)


def _outcome(specimen: Specimen, architecture: int) -> dict[str, Any]:
    try:
        return examined(specimen, architecture)
    except (triton.CompilationError, RuntimeError, subprocess.CalledProcessError) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


if __name__ == "__main__":
    main()
