"""Runs through the command line that are interrupted, out of disk or started anew."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_support import ENCODER, MODEL, UPSCALER

from ltxlite.cli import main
from ltxlite.networks import Networks


def flags(folder: Path, *more: str) -> list[str]:
    return [
        *("generate", "--model", str(MODEL), "--upscaler", str(UPSCALER)),
        *("--text-encoder", str(ENCODER), "--prompt", "rain", "--size", "128x64"),
        *("--frames", "9", "-o", str(folder / "clip.mp4"), *more),
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_at(monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException) -> None:
    """Have the transformer's evaluation number `calls`, from 1, raise an error, and no other."""
    from ltxlite.models.transformer import Transformer

    real, counter = Transformer.run, iter(range(1, 999))

    def run(self: Transformer, *arguments: Any, **options: Any) -> Any:
        if next(counter) == calls:
            raise error
        return real(self, *arguments, **options)

    monkeypatch.setattr(Transformer, "run", run)


def test_an_interrupted_run_says_how_to_go_on_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tmp_path)) == 0
    wanted = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").unlink()

    stop_at(monkeypatch, 11, KeyboardInterrupt())  # in the middle of the last step
    capsys.readouterr()
    assert main(flags(tmp_path)) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "the run is saved: the same command, with seed 10, continues at stage 2 of 2, step 3 of 3"
    )
    assert names(tmp_path) == ["clip.mp4.ltxlite-resume"]

    assert main(flags(tmp_path)) == 0
    assert "continuing at stage 2 of 2, step 3 of 3" in capsys.readouterr().err
    assert (tmp_path / "clip.mp4").read_bytes() == wanted
    assert names(tmp_path) == ["clip.mp4"]


def test_a_run_stopped_before_its_first_step_promises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory"))
    assert main(flags(tmp_path)) == 1
    assert "continues" not in capsys.readouterr().err
    assert names(tmp_path) == []


def test_fresh_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(monkeypatch, 3, KeyboardInterrupt())
    assert main(flags(tmp_path)) == 130
    assert main(flags(tmp_path, "--fresh")) == 0
    assert "continuing" not in capsys.readouterr().err
    assert names(tmp_path) == ["clip.mp4"]


def test_a_run_stopped_while_decoding_needs_no_transformer_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ltxlite.pipeline as pipeline

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_clip", lambda *_: (_ for _ in ()).throw(MemoryError()))
        assert main(flags(tmp_path)) == 1
    (tmp_path / "clip.mp4.ltxlite-resume.part").write_bytes(b"half")  # killed while it saved
    assert capsys.readouterr().err.splitlines()[-1].endswith("continues at the decoding")
    monkeypatch.delattr(Networks, "transformer")
    monkeypatch.delattr(pipeline, "encode")
    assert main(flags(tmp_path)) == 0
    assert names(tmp_path) == ["clip.mp4"]


def test_a_disk_too_full_for_the_state_is_told_once_and_the_clip_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = os.fsync, iter(range(99))

    def full(file: int) -> None:
        if next(calls) < 9:  # the clip's own flush comes later
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    assert main(flags(tmp_path)) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "ltxlite-resume" in line]
    assert len(told) == 1 and "No space left on device" in told[0] and "goes on" in told[0]
    assert names(tmp_path) == ["clip.mp4"]


def test_a_disk_too_full_for_the_clip_keeps_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ltxlite.media.atomic as atomic

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_flush", full)
        assert main(flags(tmp_path)) == 1
    *_, error, hint = capsys.readouterr().err.splitlines()
    assert "clip.mp4: cannot be written here (No space left on device)" in error
    assert hint.endswith("continues at the decoding")
    assert names(tmp_path) == ["clip.mp4.ltxlite-resume"]
    assert main(flags(tmp_path)) == 0
    assert names(tmp_path) == ["clip.mp4"]


def test_what_a_killed_run_left_beside_the_clip_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ltxlite.media.atomic import _partial_name

    stop_at(monkeypatch, 3, KeyboardInterrupt())
    assert main(flags(tmp_path)) == 130
    for name in ("clip.mp4", "another.mp4"):
        _partial_name(tmp_path / name).write_bytes(b"half")
    (tmp_path / "clip.mp4.ltxlite-resume.part").write_bytes(b"half")
    assert main(flags(tmp_path)) == 0
    left = names(tmp_path)
    assert left[1:] == ["clip.mp4"] and left[0].startswith(".another.")
