"""Output that appears under its name only when it is complete."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ltxlite.errors import MediaError


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to, and rename it to `path` at the end.

    The parent folders are made; the file has the suffix of `path`, so that encoders which choose
    a format by name still do. An older file under `path` is replaced only on success. Any error,
    KeyboardInterrupt included, removes the unfinished file and passes on.
    Raises MediaError if the place cannot be written, or the disk is full.
    """
    partial = _partial_name(path)
    with _naming(path):
        if path.is_dir():
            raise MediaError(f"{path}: is a folder, wanted a file name to write to")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.open("xb").close()
    try:
        with _naming_full_disk(path):
            yield partial
        with _naming(path):
            _flush(partial)
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def folder_written_beside(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` to fill, and rename it to `path` at the end.

    `path` must not exist yet, or be an empty folder, so that no files of an older run mix in. Any
    error, KeyboardInterrupt included, removes the unfinished folder and passes on.
    Raises MediaError if the place is taken or cannot be written, or the disk is full.
    """
    partial = _partial_name(path)
    with _naming(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise MediaError(f"{path}: exists and is not an empty folder; name another one")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    try:
        with _naming_full_disk(path):
            yield partial
        with _naming(path):
            if path.exists():
                path.rmdir()  # Windows does not rename onto a folder, even an empty one
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process left of a file or folder that was to become `path`.

    Call it only where no other process can be writing `path`: its unfinished file would go too.
    """
    for leftover in path.parent.glob(f"{glob.escape(_hidden_name(path))}.????????{path.suffix}"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                leftover.unlink()


def _partial_name(path: Path) -> Path:
    """Return an unused hidden name with the same suffix in the same folder."""
    return path.with_name(f"{_hidden_name(path)}.{secrets.token_hex(4)}{path.suffix}")


def _hidden_name(path: Path) -> str:
    # The checksum keeps apart what differs only in the part of a long name that is cut.
    return f".{path.stem[:40]}.{zlib.crc32(path.name.encode()):08x}"


def _flush(path: Path) -> None:
    # Without it a power cut after the rename can leave an empty file under the final name.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise MediaError(
            f"{path}: cannot be written here ({reason}); choose another place, "
            "or close the program that holds the file"
        ) from error


@contextmanager
def _naming_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into one line; other errors of the writing code are not ours to name."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MediaError(f"{path}: the disk is full; free space or write elsewhere") from error
