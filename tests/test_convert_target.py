"""Where a conversion writes: disks that are full, targets that are taken."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_support import (
    SMALL,
    Killed,
    beside,
    converted,
    refused,
)

import ltxlite.convert.file as convert_file
from ltxlite.convert.run import Conversion, convert
from ltxlite.errors import BudgetError
from ltxlite.progress import Report
from ltxlite_quant.policy import recipe_named

pytest_plugins = ("convert_fixtures",)


def full(after: int) -> Callable[..., None]:
    calls = iter(range(after))

    def write(file, data) -> None:  # type: ignore[no-untyped-def]
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(data)

    return write


def test_a_disk_that_fills_up_keeps_what_is_done(
    tmp_path: Path, small_written: Path, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    target = tmp_path / small_written.name
    with monkeypatch.context() as patch:
        patch.setattr(convert_file, "_write_all", full(after=100))
        with pytest.raises(BudgetError, match=r"the disk is full; .* the same command again"):
            converted(target, small)
    assert not target.exists()
    assert converted(target, small).resumed == 99  # and the header
    assert target.read_bytes() == small_written.read_bytes()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert_file.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BudgetError, match=r"x\.gguf: needs 0\.00 GB more on a disk with 0\.00 GB"):
        converted(tmp_path / "x.gguf", small)
    assert beside(tmp_path / "x.gguf") == []


def test_targets_that_cannot_be_written_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    (tmp_path / "file").write_text("x")
    assert "file is no folder" in refused(capsys, small, tmp_path / "file" / "sub" / "x.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert "is a folder" in refused(capsys, small, tmp_path / "folder.gguf")
    assert "must be called .gguf" in refused(capsys, small, tmp_path / "x.safetensors")


def test_an_input_is_never_overwritten(
    tmp_path: Path, small_written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.gguf"
    source.write_bytes(small_written.read_bytes())
    before = source.read_bytes()
    assert "is one of the inputs" in refused(capsys, source, source, "--overwrite")
    link = tmp_path / "b.gguf"
    link.hardlink_to(source)
    assert "is one of the inputs" in refused(capsys, source, link, "--overwrite")
    assert source.read_bytes() == before


def test_a_file_that_exists_is_replaced_only_if_asked_and_only_at_the_end(
    tmp_path: Path, small_written: Path, capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"older")
    assert "exists already" in refused(capsys, small, target)
    replacing = Conversion((small,), target, recipe_named("Q8_0"), overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        convert(replacing, Killed(2 * SMALL + 9))
    assert target.read_bytes() == b"older"
    convert(replacing, Report())
    assert target.read_bytes() == small_written.read_bytes()
