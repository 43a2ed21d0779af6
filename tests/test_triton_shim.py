"""The interpreter shim finds what it is there to find; runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_the_shim_rounds_as_hardware_does_and_finds_bad_accesses() -> None:
    folder = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder)}
    # Triton reads the source of a kernel from its file.
    program = folder / "shim_program.py"
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
