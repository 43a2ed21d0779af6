"""Where kernel tests run: on a card, or in a process with TRITON_INTERPRET=1 on the CPU.

Triton reads that variable when it is imported, so `run_interpreted` starts a process of its own,
in which the interpreter is corrected (`triton_shim`) and every access is checked.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltxlite_kernels.rotate import HAVE_TRITON

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernel_device() -> str:
    """Return "cpu" under the interpreter and "cuda" on a card; skip elsewhere."""
    if not HAVE_TRITON:
        pytest.skip("Triton is not installed")
    if INTERPRETED:
        import triton_shim

        triton_shim.install()
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("no CUDA device; the interpreter runs this test on the CPU")


def run_interpreted(*files: str) -> str:
    """Run the tests named test_kernel_* of some files in the interpreter; return the summary."""
    if not HAVE_TRITON or INTERPRETED:
        pytest.skip("Triton is not installed, or this is the interpreter's process")
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "test_kernel_"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *(str(folder / file) for file in files)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
    return done.stdout
