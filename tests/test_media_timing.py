"""Clips of constant and variable rate, brought to a constant one."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clip_files import steady, write_clip

from ltxlite.errors import MediaError
from ltxlite.media.timing import Timing, frames_at, read_timing
from ltxlite.media.video_reader import iter_frames


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), Fraction(30), Fraction(19)])
def test_a_constant_rate_is_read_exactly_and_keeps_every_frame(
    tmp_path: Path, fps: Fraction
) -> None:
    timing = read_timing(write_clip(tmp_path / "a.mp4", steady(30, fps), (64, 32)))
    assert timing.rate == fps
    assert timing.is_constant
    assert timing.count(fps) == 30
    assert timing.numbers(fps) == list(range(30))


def test_a_rate_is_exact_although_the_file_counts_milliseconds(tmp_path: Path) -> None:
    # 24 frames at 23.976 and at 24 fps end within a millisecond of each other.
    path = write_clip(tmp_path / "a.mkv", steady(24, Fraction(30000, 1001)), (64, 32))
    assert read_timing(path).rate == Fraction(30000, 1001)
    assert read_timing(path).numbers(Fraction(30000, 1001)) == list(range(24))


def test_each_moment_gets_the_nearest_frame() -> None:
    starts = tuple(Fraction(n, 100) for n in (0, 3, 8, 13, 40))
    timing = Timing(starts, Fraction(1, 2), Fraction(10))
    assert not timing.is_constant
    # At 20 a second: 0, .05, .1, .15 ... ; .05 lies nearer to .03 and .1 nearer to .08.
    assert timing.numbers(Fraction(20)) == [0, 1, 2, 3, 3, 3, 4, 4, 4, 4]
    brute = [min(range(5), key=lambda k: abs(timing.starts[k] - Fraction(n, 7))) for n in range(4)]
    assert timing.numbers(Fraction(7)) == brute


def test_a_variable_rate_is_noticed_and_its_frames_stay_frames_of_the_file(tmp_path: Path) -> None:
    times = [Fraction(n, 1000) for n in (0, 33, 80, 133, 150, 160, 300, 333, 400, 500)]
    path = write_clip(tmp_path / "v.mp4", times, (64, 32))
    timing = read_timing(path)
    assert not timing.is_constant
    numbers = timing.numbers(Fraction(24))
    assert numbers[:6] == [0, 1, 2, 3, 5, 5]
    own = list(iter_frames(path))
    for number, frame in zip(numbers, frames_at(path, numbers), strict=True):
        assert torch.equal(frame, own[number])


def test_another_rate_repeats_or_leaves_out_frames() -> None:
    timing = Timing(tuple(Fraction(n, 30) for n in range(30)), Fraction(1), Fraction(30))
    assert timing.numbers(Fraction(60))[:5] == [0, 0, 1, 1, 2]
    assert timing.numbers(Fraction(15)) == list(range(0, 30, 2))


def test_a_frame_beyond_the_end_is_an_error(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", steady(3, Fraction(24)), (64, 32))
    with pytest.raises(MediaError, match="ends before its frame 3"):
        list(frames_at(path, [1, 3]))


def test_a_file_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        read_timing(tmp_path / "none.mp4")
