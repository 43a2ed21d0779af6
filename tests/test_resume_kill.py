"""Runs that are killed, a little of `python -m benchmarks kill` in every run of the tests."""

from pathlib import Path

import pytest

from benchmarks import kill
from benchmarks.harness import GateError


def test_killed_runs_are_resumed_to_the_same_bytes() -> None:
    toll = kill.storm("guided", range(5))
    assert toll.kills >= 3, "too many runs came to their end before they were killed"


def test_a_clip_that_differs_and_a_file_left_behind_name_the_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = object.__new__(kill._Job)
    job.name, job.seconds, job.target = "euler", 0.0, tmp_path / "clip.mp4"
    job.log, job.expected = tmp_path.parent / "log", b"clip"

    def run(seconds: float | None) -> bool:
        job.target.write_bytes(contents)
        return True

    monkeypatch.setattr(job, "run", run)
    contents = b"another"
    with pytest.raises(GateError, match="euler kill 7: the resumed clip is another one"):
        job.kill_and_resume(7, kill.Toll())
    contents = b"clip"
    (tmp_path / "leftover").write_bytes(b"")
    with pytest.raises(GateError, match="euler kill 8: leftover left behind"):
        job.kill_and_resume(8, kill.Toll())
