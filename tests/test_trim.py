"""Frames and sound that are left out at the beginning of a clip."""

import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_engine_runs import Files, generate


def frames_of(folder: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))]


def samples_of(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        data = file.readframes(file.getnframes())
        return np.frombuffer(data, "<i2").reshape(-1, file.getnchannels())


@pytest.mark.parametrize("trim", [1, 3])
def test_the_first_frames_and_their_sound_are_left_out(
    demo_files: Files, tmp_path: Path, trim: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert generate(demo_files, whole, "--wav", f"{whole}.wav") == 0
    flags = ("--wav", f"{cut}.wav", "--trim-head", str(trim))
    assert generate(demo_files, cut, *flags) == 0
    assert frames_of(cut) == frames_of(whole)[trim:]
    first = round(trim * 48000 / 24)
    assert np.array_equal(samples_of(Path(f"{cut}.wav")), samples_of(Path(f"{whole}.wav"))[first:])


@pytest.mark.parametrize(("trim", "said"), [("9", "leave nothing"), ("-1", "0 or more")])
def test_what_cannot_be_left_out_is_refused(
    demo_files: Files, tmp_path: Path, trim: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(demo_files, tmp_path / "clip.mp4", "--trim-head", trim) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]
