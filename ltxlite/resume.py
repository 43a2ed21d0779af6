"""Keeps a run in a file beside its output while it lasts, so that a killed one can go on.

The file of `out.mp4` is `out.mp4.ltxlite-resume`. It is written anew after every step and stage,
beside and then renamed, on a second thread: a step waits neither for the disk nor for the copy
from the GPU. When the clip is there the file goes.
"""

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from ltxlite.errors import LtxliteError
from ltxlite.media.atomic import remove_unfinished
from ltxlite.media.background import Background
from ltxlite.networks import Networks
from ltxlite.request import Request
from ltxlite.saved_state import conditions, describe, encode_state, read_state
from ltxlite.stages import Progress
from ltxlite_quant.formats import FormatError

SUFFIX = ".ltxlite-resume"


class SavedRun:
    """The saved state of one job; a context manager around its run.

    Leaving by an error keeps the file, and adds a note to the error that tells how to go on.
    A state that cannot be written is told once and never stops the run: the clip matters more.
    """

    def __init__(self, request: Request, networks: Networks, note: Callable[[str], None]) -> None:
        output = Path(request.output.path)
        self.path = output.with_name(output.name + SUFFIX)
        self._request, self._networks, self._note = request, networks, note
        self._conditions = conditions(request, networks)
        self._background = Background()
        self._lock = threading.Lock()
        self._newest: _Snapshot | None = None
        self._where: str | None = None  # the last saved state goes on here
        self._trouble: OSError | None = None
        self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._background:
            self._background.finish()
        self._warn()
        if self._where is not None and isinstance(error, Exception | KeyboardInterrupt):
            error.add_note(
                f"the run is saved: the same command, with seed {self._request.seed}, continues "
                f"at {self._where}"
            )

    def load(self) -> Progress | None:
        """Return where an earlier run of this job was stopped; None, and why, if there is none.

        What that run left unfinished beside the output is removed.
        """
        if not self.path.exists():
            return None
        for output in (self._request.output.path, self._request.output.wav):
            if output is not None:
                remove_unfinished(Path(output))
        try:
            progress = read_state(self.path, self._request, self._networks)
        except (LtxliteError, FormatError, OSError) as error:
            self._note(f"{self.path}: not continued, {_reason(error)}; starting anew")
            return None
        self._where = describe(progress, self._request, self._networks)
        self._note(f"continuing at {self._where} ({self.path}; --fresh starts anew)")
        return progress

    def save(self, progress: Progress) -> None:
        """Have a progress written; while the disk is busy, only the newest one waits for it."""
        self._warn()
        with self._lock:
            is_idle, self._newest = self._newest is None, _Snapshot(progress)
        if is_idle:
            self._background.submit(self._write_newest)

    def discard(self) -> None:
        """Remove the file: the run has reached its end."""
        self._background.finish()
        self._where = None
        for path in (self.path, _partial(self.path)):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _write_newest(self) -> None:
        with self._lock:
            snapshot, self._newest = self._newest, None
        if snapshot is None:
            return
        pieces = snapshot.encode(self._conditions)
        try:
            _write(self.path, pieces)
        except OSError as error:
            self._trouble = error
        else:
            self._where = describe(snapshot.progress, self._request, self._networks)

    def _warn(self) -> None:
        if self._trouble is None or self._warned:
            return
        self._warned = True
        self._note(
            f"warning: {self.path} cannot be written ({_reason(self._trouble)}); the run goes on, "
            "but what is not saved will be lost if it is stopped"
        )


class _Snapshot:
    """A progress whose tensors a GPU may still be computing."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        device = progress.latents.video.device
        self._ready = None
        if device.type == "cuda":
            self._ready = torch.cuda.current_stream(device).record_event()

    def encode(self, facts: dict[str, object]) -> list[memoryview]:
        """Wait for the tensors and return the file's pieces; called on the second thread."""
        if self._ready is None:
            return encode_state(self.progress, facts)
        self._ready.synchronize()
        # A stream of its own: on the default one the copy would queue behind the next step.
        with torch.cuda.stream(torch.cuda.Stream(self.progress.latents.video.device)):
            return encode_state(self.progress, facts)


def _write(path: Path, pieces: Iterable[memoryview]) -> None:
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            # Without it a power cut after the rename can leave an empty file under the name.
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _partial(path: Path) -> Path:
    # One name for all runs: what a killed one leaves is written over, or removed at the end.
    return path.with_name(f"{path.name}.part")


def _reason(error: Exception) -> str:
    if isinstance(error, FormatError):
        return "it is damaged or cut short"
    return getattr(error, "strerror", None) or str(error)
