"""A large file written tensor by tensor beside its place, which a killed process can go on with.

Beside `out.gguf` lie `out.gguf.ltxlite-part`, at its full size from the beginning, and
`out.gguf.ltxlite-journal`: a line of JSON that says whose file it is, and one for each tensor that
is safely on the disk. Lines are only ever appended; the last of a tensor holds.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ltxlite.convert.layout import Layout, Placed
from ltxlite.errors import BudgetError, RequestError

# Written bytes between two flushes to the disk: what a kill costs at most, 3 s of a slow disk.
_SYNC_BYTES = 256 << 20
_READ_BYTES = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class PartialFile:
    """A GGUF file that is being written; a context manager that keeps what is done.

    identity: of inputs and recipe; a file begun with another one is not continued.  `done` has the
    checksums of finished tensors by name.  Raises RequestError for a file of another conversion,
    or one that another process writes, BudgetError if the disk is too small.
    """

    def __init__(self, target: Path, layout: Layout, identity: str) -> None:
        self.target, self.layout = target, layout
        self.path = target.with_name(f"{target.name}.ltxlite-part")
        self.journal_path = target.with_name(f"{target.name}.ltxlite-journal")
        self.done: dict[str, int] = {}
        self._identity = identity
        self._waiting: list[tuple[str, int]] = []
        self._unsynced = 0
        self._published = self._is_new = False
        self._file: IO[bytes]
        self._journal: IO[bytes]

    def __enter__(self) -> Self:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            opened.callback(self._forget)
            self._journal = opened.enter_context(self.journal_path.open("a+b"))
            _lock(self._journal, self.target)
            recorded = self._recorded()
            self._is_new = not self.path.exists()
            mode = "w+b" if self._is_new else "r+b"
            self._file = opened.enter_context(self.path.open(mode, buffering=0))
            self._begin(recorded)
            opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._published:
            return
        with contextlib.suppress(OSError):  # a full disk: what was journaled before still counts
            self._sync()
        self._file.close()
        self._journal.close()
        self._is_new = not self.done
        self._forget()

    def write(self, tensor: Placed, pieces: Iterable[memoryview]) -> None:
        """Write a tensor's bytes, which come in pieces, and note it as done."""
        checksum = written = 0
        with self._naming_full_disk():
            self._file.seek(tensor.offset)
            for piece in pieces:
                _write_all(self._file, piece)
                checksum, written = zlib.crc32(piece, checksum), written + len(piece)
            assert written == tensor.nbytes, tensor.name  # the encoder's promise
            self._waiting.append((tensor.name, checksum))
            self.done[tensor.name] = checksum
            self._unsynced += written
            if self._unsynced >= _SYNC_BYTES:
                self._sync()

    def sync(self) -> None:
        """Bring everything to the disk, so that the file can be read under `path`."""
        with self._naming_full_disk():
            self._sync()

    def publish(self) -> None:
        """Give the finished file its name; an older one is replaced."""
        self.sync()
        self._file.close()
        self.path.replace(self.target)
        self._published = True
        self._journal.close()
        self.journal_path.unlink(missing_ok=True)

    def _begin(self, recorded: dict[str, int]) -> None:
        size = self._file.seek(0, os.SEEK_END)
        self.done = dict(self._intact(recorded, size))
        self._refuse_small_disk()
        with self._naming_full_disk():
            self._file.truncate(self.layout.size)
            self._file.seek(0)
            _write_all(self._file, self.layout.header)

    def _recorded(self) -> dict[str, int]:
        """Return what the journal says is done; of a new file nothing, and claim it."""
        self._journal.seek(0)
        text = self._journal.read()
        entries = [entry for line in text.splitlines() if (entry := _entry(line)) is not None]
        if self.path.exists():
            if not entries or entries[0].get("identity") != self._identity:
                raise RequestError(
                    f"{self.path}: the unfinished file of another conversion (other inputs, recipe "
                    "or version); finish that one, name another target, or delete the file"
                )
            if not text.endswith(b"\n"):  # cut by a kill; the next line must not grow onto it
                self._journal.write(b"\n")
            return {e["tensor"]: e["crc32"] for e in entries[1:] if {"tensor", "crc32"} <= e.keys()}
        self._journal.truncate(0)
        self._record({"identity": self._identity})
        self._journal.flush()
        return {}

    def _intact(self, recorded: dict[str, int], size: int) -> Iterator[tuple[str, int]]:
        """Yield the recorded tensors whose bytes are really there."""
        for tensor in self.layout.tensors:
            wanted = recorded.get(tensor.name)
            is_there = wanted is not None and tensor.offset + tensor.nbytes <= size
            if is_there and self._checksum(tensor) == wanted:
                yield tensor.name, wanted

    def _checksum(self, tensor: Placed) -> int:
        self._file.seek(tensor.offset)
        checksum, left = 0, tensor.nbytes
        while left and (piece := self._file.read(min(left, _READ_BYTES))):
            checksum, left = zlib.crc32(piece, checksum), left - len(piece)
        return checksum

    def _sync(self) -> None:
        """Bring data to the disk, then the journal that vouches for it."""
        os.fsync(self._file.fileno())
        for name, checksum in self._waiting:
            self._record({"tensor": name, "crc32": checksum})
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._waiting, self._unsynced = [], 0

    def _record(self, entry: dict[str, Any]) -> None:
        self._journal.write(json.dumps(entry).encode() + b"\n")

    def _refuse_small_disk(self) -> None:
        kept = sum(t.nbytes for t in self.layout.tensors if t.name in self.done)
        needed, free = self.layout.size - kept, shutil.disk_usage(self.target.parent).free
        if needed > free:
            raise BudgetError(
                f"{self.target}: needs {needed / 1e9:.2f} GB more on a disk with "
                f"{free / 1e9:.2f} GB free; free space, or write elsewhere"
            )

    @contextlib.contextmanager
    def _naming_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise BudgetError(
                f"{self.target}: the disk is full; free space and run the same command again, it "
                f"goes on from {self.path.name}"
            ) from error

    def _forget(self) -> None:
        """Remove a file that holds nothing worth going on with."""
        if self._is_new and not self.done:
            for path in (self.path, self.journal_path):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:  # an unbuffered file may take less than it is given
        left = left[file.write(left) :]


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return a line of the journal; the last one may have been cut by a kill."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _lock(file: IO[bytes], target: Path) -> None:
    """Keep other processes from the same target; the lock ends with the process."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # beyond the text, which stays readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise RequestError(f"{target}: another process is writing this file") from None
