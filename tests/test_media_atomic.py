"""Output files: whole under their name, or not there at all."""

import errno
import threading
from pathlib import Path

import pytest

from ltxlite.errors import MediaError
from ltxlite.media.atomic import folder_written_beside, written_beside
from ltxlite.media.background import WAITING_CALLS, Background


def test_a_file_appears_under_its_name_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "made" / "on the way" / "clip.mp4"
    with written_beside(target) as partial:
        assert partial.suffix == ".mp4" and partial.parent == target.parent
        partial.write_bytes(b"all of it")
        assert not target.exists()
    assert target.read_bytes() == b"all of it"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"older")
    with pytest.raises(error), written_beside(target) as partial:
        partial.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(MediaError, match=r"clip\.mp4: the disk is full") as caught,
        written_beside(tmp_path / "clip.mp4"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_errors_of_the_writing_code_keep_their_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_beside(tmp_path / "clip.mp4"):
        (tmp_path / "no such input").read_bytes()


def test_places_that_cannot_be_written_are_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path / "file" / "clip.mp4", tmp_path):
        message = r"cannot be written|is a folder"
        with pytest.raises(MediaError, match=message), written_beside(target):
            pytest.fail("the block must not begin")


def test_a_folder_appears_only_at_the_end_and_never_mixes_with_older_files(tmp_path: Path) -> None:
    target = tmp_path / "frames"
    target.mkdir()
    with folder_written_beside(target) as partial:
        (partial / "1").write_bytes(b"")
        assert not list(target.iterdir())
    assert [file.name for file in target.iterdir()] == ["1"]
    with pytest.raises(MediaError, match="not an empty folder"), folder_written_beside(target):
        pytest.fail("the block must not begin")
    with pytest.raises(KeyboardInterrupt), folder_written_beside(tmp_path / "other") as partial:
        (partial / "1").write_bytes(b"")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [target]


def test_background_calls_run_in_order_beside_the_caller_and_no_more_than_two_wait() -> None:
    release, third_submitted, done = threading.Event(), threading.Event(), list[int]()

    def work(number: int) -> None:
        assert release.wait(5)
        done.append(number)

    def submit_all(background: Background) -> None:
        for number in range(WAITING_CALLS + 1):
            background.submit(lambda number=number: work(number))
        third_submitted.set()

    with Background() as background:
        caller = threading.Thread(target=submit_all, args=(background,))
        caller.start()
        assert not third_submitted.wait(0.05)  # two are under way, none is done
        release.set()
        caller.join()
        background.finish()
    assert done == [0, 1, 2]


def test_an_error_on_the_background_thread_reaches_the_caller() -> None:
    def fail() -> None:
        raise MediaError("encoder broke")

    with pytest.raises(MediaError, match="encoder broke"), Background() as background:
        background.submit(fail)
        background.finish()
    with pytest.raises(MediaError, match="encoder broke"), Background() as background:
        for _ in range(WAITING_CALLS + 1):
            background.submit(fail)
        pytest.fail("the third call must report the first one's error")
