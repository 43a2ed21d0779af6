"""Conversion as a whole: what comes out makes a clip, and the command line reports it."""

import json
from pathlib import Path

import pytest
from convert_support import GEMMA, MODEL

from ltxlite.cli import main

pytest_plugins = ("convert_fixtures",)


def test_a_converted_model_makes_a_clip(tmp_path: Path, written: Path) -> None:
    clip = tmp_path / "clip.mp4"
    parts = ("--text-projection", "--vae", "--audio-vae")
    files = [word for flag in parts for word in (flag, str(MODEL))]
    arguments = ["generate", "--model", str(written), *files, "--text-encoder", str(GEMMA)]
    arguments += ["--prompt", "rain", "--size", "128x64", "--frames", "9", "--quality", "draft"]
    assert main([*arguments, "--quiet", "-o", str(clip)]) == 0
    assert clip.stat().st_size > 1000


def test_the_command_line_reports_errors_by_group_and_companions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a-distilled.gguf"
    arguments = ["convert", str(MODEL), str(target), "--type", "Q4_0", "--device", "cpu"]
    assert main([*arguments, "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    errors = {row["group"]: row for row in told["errors"]}
    found = errors["transformer_blocks.N.attn1.to_q.weight"]
    assert (found["format"], found["tensors"]) == ("Q4_0", 4)
    # formats.md 2.0: 0.0859 for gaussian weights; a sample of four rows varies by a few percent.
    assert abs(found["relative_error"] - 0.0859) < 0.02
    assert errors["transformer_blocks.N.ff.net.2.weight"]["format"] == "Q4_1"
    assert told["nbytes"] == target.stat().st_size
    assert any("text projection" in line for line in told["companions"])
    assert main([*arguments, "--overwrite"]) == 0
    output = capsys.readouterr()
    assert "relative error:" in output.out
    assert "ComfyUI-GGUF of January 2026" in output.out
    assert "verify" in output.err
