"""Whole jobs in other arithmetic, from the command line."""

import json
from pathlib import Path

import pytest
from test_engine_runs import Files, clip_of, force, generate

from ltxlite.cli import main
from ltxlite.math_errors import LIMIT, exact_layers, write_errors
from ltxlite.media.container import read_metadata
from ltxlite.memory.stream import Placement
from ltxlite.pipeline import JOB_TAG

NONE_RESIDENT = Placement(slots=2, prefetch=1, pinned_bytes=0, ring=2)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("mode", ["int8", "fp16"])
def test_a_clip_in_other_arithmetic_is_another_and_streamed_the_same(
    demo_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    plain = clip_of(demo_files, tmp_path)
    coded = clip_of(demo_files, tmp_path, ("--math", mode))
    assert coded != plain
    force(NONE_RESIDENT, monkeypatch)
    assert clip_of(demo_files, tmp_path, ("--math", mode, "--vram", "4GiB")) == coded


def test_a_job_remembers_its_arithmetic(demo_files: Files, tmp_path: Path) -> None:
    errors = tmp_path / "errors.json"
    write_errors(errors, {"blocks.0": 2 * LIMIT, "blocks.1": LIMIT / 2})
    clip = tmp_path / "one" / "clip.mp4"
    assert generate(demo_files, clip, "--math", "int8", "--exact", str(errors)) == 0
    job = json.loads(read_metadata(clip)[JOB_TAG])
    assert job["math"] == "int8" and job["exact"] == ["blocks.0"]
    errors.unlink()
    again = tmp_path / "two" / "clip.mp4"
    assert main(["generate", "--job", str(clip), "-o", str(again), "--fresh"]) == 0
    assert again.read_bytes() == clip.read_bytes().replace(b"/one/", b"/two/")


def test_calibration_finds_what_int8_costs_each_layer(
    demo_files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, upscaler, encoder = map(str, demo_files)
    files = ["--model", model, "--upscaler", upscaler, "--text-encoder", encoder]
    target, errors = tmp_path / "i.safetensors", tmp_path / "e.json"
    short = ["--prompt", "a red circle", "--size", "128x128", "--frames", "9", "--steps", "2"]
    command = ["calibrate", *files, *short, "--device", "cpu", "-o", str(target)]
    assert main([*command, "--math-errors", str(errors)]) == 0
    found = json.loads(errors.read_text())["errors"]
    assert {"blocks.0.video.feed_forward.up", "blocks.1.audio_to_video.to_out"} <= set(found)
    # A product of two int8 rows that are not outliers is off by about a percent.
    assert all(1e-4 < error < 0.05 for error in found.values())
    worst = max(found, key=found.__getitem__)
    assert worst in exact_layers(errors, limit=found[worst] * 0.999)
    assert exact_layers(errors, limit=found[worst]) == ()


def test_lists_of_layers_that_are_none_are_refused_in_one_line(
    demo_files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    for text, said in (
        ("no json", "--exact"),
        ('{"ltxlite_math_errors": 2}', "calibrate --math-errors"),
        ('{"ltxlite_math_errors": 1, "errors": {"blocks.0": "x"}}', "no number"),
    ):
        bad.write_text(text)
        assert generate(demo_files, tmp_path / "clip.mp4", "--exact", str(bad)) != 0
        message = capsys.readouterr().err
        assert said in message and len(message.strip().splitlines()) == 1
    assert generate(demo_files, tmp_path / "clip.mp4", "--exact", str(tmp_path / "none")) != 0
    assert "no such file" in capsys.readouterr().err
