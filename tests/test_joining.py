"""Clips joined: every frame is one of theirs, sound is exactly as long and passes smoothly."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import read_pngs, steady, tone, write_clip

from ltxlite.cli import main
from ltxlite.joining import joined_sound, open_joint
from ltxlite.media.audio import read_audio
from ltxlite.media.video_reader import iter_frames

FPS = Fraction(30000, 1001)


def parts(folder: Path, *counts: int) -> list[Path]:
    paths = []
    for number, count in enumerate(counts):
        sound = (tone(2, float(count / FPS), 44_100), 44_100)
        paths.append(write_clip(folder / f"{number}.mp4", steady(count, FPS), (64, 32), sound))
    return paths


@pytest.mark.parametrize("overlap", [0, 4])
def test_the_joined_clip_is_made_of_its_parts_frames(tmp_path: Path, overlap: int) -> None:
    paths = parts(tmp_path, 12, 9, 11)
    words = [*map(str, paths), "--overlap", str(overlap), "-o", str(tmp_path / "made")]
    assert main(["join", *words]) == 0
    own = [list(iter_frames(path)) for path in paths]
    wanted = torch.stack([*own[0], *own[1][overlap:], *own[2][overlap:]])
    assert torch.equal(read_pngs(tmp_path / "made"), wanted)
    waveform, rate = read_audio(tmp_path / "made" / "audio.wav")
    assert waveform.shape[1] == round(len(wanted) / FPS * rate)


def test_sound_that_overlaps_passes_at_equal_gain(tmp_path: Path) -> None:
    level = np.full((2, 22_050), 0.5, dtype=np.float32)
    paths = [
        write_clip(tmp_path / f"{n}.mkv", steady(15, Fraction(30)), (64, 32), (level, 44_100))
        for n in range(2)
    ]
    joint = open_joint(paths, 6)
    sound = joined_sound(joint, Fraction(1, 10))
    assert sound is not None
    # A constant stays one through the overlap of 0.2 s, but for AAC's first and last frames.
    assert (sound[0][:, 3000:-3000] - 0.5).abs().max() < 0.02


def test_frames_are_counted_at_the_first_clips_rate(tmp_path: Path) -> None:
    slow = write_clip(tmp_path / "a.mp4", steady(10, Fraction(20)), (64, 32))
    fast = write_clip(tmp_path / "b.mp4", steady(30, Fraction(60)), (64, 32))
    joint = open_joint([slow, fast], 2)
    assert (joint.rate, joint.counts, joint.starts, joint.frames) == (20, (10, 10), (0, 8), 18)
    assert joined_sound(joint, Fraction(1, 20)) is None


def test_clips_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = parts(tmp_path, 9)[0], tmp_path / "large.mp4"
    write_clip(large, steady(9, FPS), (96, 32))
    target = ["-o", str(tmp_path / "out.mp4")]
    for words, line in (
        ([str(small), str(large)], "is 96x32"),
        ([str(small)], "two clips or more"),
        ([str(small), str(small), "--overlap", "9"], "less than the shortest clip's 9 frames"),
        ([str(small), str(small), "--fade", "11"], "wanted 0 to 10 seconds"),
    ):
        assert main(["join", *words, *target]) == 1
        assert line in capsys.readouterr().err
