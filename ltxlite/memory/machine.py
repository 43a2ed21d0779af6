"""Buffers and the two queues that order what happens in them: one interface, two machines.

A machine has a copy queue and a compute queue. Marks are points in them; nothing else orders the
two. Copies may be done in any order that their marks allow, so whoever needs one says so.
"""

import mmap
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ltxlite.errors import BudgetError

# Opaque: only the machine that made a mark can read it.
Mark: TypeAlias = object
_ALL_ONES = 0xFF  # in every byte a NaN, whatever the floating point format


class PinnedRefused(BudgetError):  # noqa: N818  # an answer, seldom anyone's error
    """The system does not page-lock that much; the streamer goes on without."""


class Machine(Protocol):
    """Where blocks are streamed to. Buffers are (nbytes,) uint8 and die with their last tensor."""

    def device_buffer(self, nbytes: int) -> Tensor:
        """Allocate memory to compute with; BudgetError if there is none."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """Allocate host memory, page-locked where that exists; PinnedRefused if it may not be."""

    def plain_buffer(self, nbytes: int) -> Tensor:
        """Allocate ordinary host memory; BudgetError if there is none."""

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        """Enqueue a copy that begins once `after` is reached; the mark is its end."""

    def reached(self) -> Mark:
        """Mark the end of everything computed so far."""

    def hold(self, mark: Mark) -> None:
        """Let what is computed from now on wait for the mark; the host does not."""

    def wait(self, mark: Mark) -> None:
        """Let the calling thread wait for the mark."""

    def drain(self) -> None:
        """Let the calling thread wait until no copy is under way; failed ones are over too."""

    def close(self) -> None:
        """Drain and let go; no copies afterwards."""


class CudaMachine:
    """A CUDA device: the compute queue is the current stream, the copy queue one of its own.

    Buffers never tell the allocator which streams use them (record_stream delays reuse without
    bound): whoever drops one has ordered both queues behind its last use, by marks or `drain`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def device_buffer(self, nbytes: int) -> Tensor:
        """Allocate from torch's cache; the compute queue may still use that memory until a mark."""
        try:
            return _bytes(nbytes, self._device)
        except torch.OutOfMemoryError as error:
            raise _no_room("device", nbytes, "ask for a smaller job") from error

    def host_buffer(self, nbytes: int) -> Tensor:
        """Page-lock exactly the bytes asked for, rounded up to pages.

        torch's own pinned allocator rounds up to powers of two and never gives back: a block of
        280 MB would take 512. Registering ordinary memory takes what it takes, until it is freed.
        """
        whole = self.plain_buffer(nbytes + 2 * mmap.PAGESIZE)
        # Two registrations must not share a page, so the first and last one are this buffer's own.
        start = -whole.data_ptr() % mmap.PAGESIZE
        locked = whole[start : start + -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE]
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(locked.data_ptr(), locked.nbytes, 0)) != 0:
            self._discard_error()
            raise PinnedRefused(f"the system refuses to page-lock {nbytes / 1e6:.0f} MB more")
        storage, address = whole.untyped_storage(), locked.data_ptr()
        # Runs before the storage frees its memory; at the end of the process the driver does it.
        weakref.finalize(storage, runtime.cudaHostUnregister, address).atexit = False
        return locked[:nbytes]

    def plain_buffer(self, nbytes: int) -> Tensor:
        """Allocate pageable memory."""
        return _plain_buffer(nbytes)

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        """Enqueue one cudaMemcpyAsync; asynchronous for the host if the host side is locked."""
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(_event(after))
            target.copy_(source, non_blocking=True)
        return self._record(self._copies)

    def reached(self) -> Mark:
        """Record an event on the current stream."""
        return self._record(torch.cuda.current_stream(self._device))

    def hold(self, mark: Mark) -> None:
        """Let the current stream wait for an event."""
        torch.cuda.current_stream(self._device).wait_event(_event(mark))

    def wait(self, mark: Mark) -> None:
        """Wait for an event, asleep."""
        _event(mark).synchronize()

    def drain(self) -> None:
        """Wait for the copy stream."""
        self._copies.synchronize()

    def close(self) -> None:
        """Wait for the copy stream; torch keeps streams for reuse."""
        self.drain()

    def _record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        # blocking: reader threads that wait for it sleep instead of spinning on a core.
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    def _discard_error(self) -> None:
        # The runtime reports a refusal once more to the next kernel launch, as if that had failed
        # ("CUDA out of memory" on Windows): let it be this one.
        with suppress(RuntimeError):
            torch.ones(1, device=self._device)


@dataclass(frozen=True, slots=True)
class Faults:
    """What a CpuMachine does to its copies and allocations on purpose; by default nothing.

    delay: seconds before the n-th copy.  pick: which of so many copies that may begin is next.
    fail: whether the n-th copy fails.  refuse: whether the n-th allocation, of the kind "device",
    "host" or "plain", is refused.  poison: fill each target with NaN before it is overwritten,
    so that whoever reads it too late or too early knows. All count from 0.
    """

    delay: Callable[[int], float] = lambda number: 0.0
    pick: Callable[[int], int] = lambda waiting: 0
    fail: Callable[[int], bool] = lambda number: False
    refuse: Callable[[str, int], bool] = lambda kind, number: False
    poison: bool = False


@dataclass(slots=True, eq=False)
class _CpuMark:
    over: threading.Event = field(default_factory=threading.Event)
    failed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    target: Tensor
    source: Tensor
    after: _CpuMark | None
    mark: _CpuMark


class CpuMachine:
    """Ordinary memory: a thread is the copy queue, the calling thread is the compute queue.

    What is computed is computed at once, so `hold` waits and `reached` is always reached.
    """

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or Faults()
        self._queue = ThreadPoolExecutor(1, thread_name_prefix="ltxlite-copy")
        self._closed = False
        self._lock = threading.Lock()
        self._waiting: list[_Copy] = []
        self._allocations = 0
        self._copies = 0

    def device_buffer(self, nbytes: int) -> Tensor:
        """Allocate ordinary memory."""
        if self._refuses("device"):
            raise _no_room("device", nbytes, "ask for a smaller job")
        return _plain_buffer(nbytes)

    def host_buffer(self, nbytes: int) -> Tensor:
        """Allocate ordinary memory."""
        if self._refuses("host"):
            raise PinnedRefused(f"the system refuses to page-lock {nbytes / 1e6:.0f} MB more")
        return _plain_buffer(nbytes)

    def plain_buffer(self, nbytes: int) -> Tensor:
        """Allocate ordinary memory."""
        if self._refuses("plain"):
            raise _no_room("host", nbytes, "close other programs")
        return _plain_buffer(nbytes)

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        """Leave a copy to the thread."""
        mark = _CpuMark()
        with self._lock:
            copy = _Copy(target, source, None if after is None else _cpu_mark(after), mark)
            self._waiting.append(copy)
        self._queue.submit(self._copy_one)
        return mark

    def reached(self) -> Mark:
        """Return a mark that is reached."""
        mark = _CpuMark()
        mark.over.set()
        return mark

    def hold(self, mark: Mark) -> None:
        """Wait: the calling thread is what computes."""
        self.wait(mark)

    def wait(self, mark: Mark) -> None:
        """Wait for a copy; raises RuntimeError if it failed."""
        point = _cpu_mark(mark)
        point.over.wait()
        if point.failed:
            raise RuntimeError("a copy to the device failed")

    def drain(self) -> None:
        """Wait until the thread has nothing left; after `close` it has ended with nothing left."""
        if not self._closed:
            self._queue.submit(int).result()  # a task a copy, first in, first out

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._queue.shutdown(wait=True)

    def _refuses(self, kind: str) -> bool:
        number, self._allocations = self._allocations, self._allocations + 1
        return self._faults.refuse(kind, number)

    def _copy_one(self) -> None:
        with self._lock:
            # The oldest can always begin: what it waits for came before it and is over.
            able = [
                copy for copy in self._waiting if copy.after is None or copy.after.over.is_set()
            ]
            copy = able[self._faults.pick(len(able))]
            self._waiting.remove(copy)
        number, self._copies = self._copies, self._copies + 1
        copy.mark.failed = True
        try:
            if self._faults.poison:
                copy.target.fill_(_ALL_ONES)
            time.sleep(self._faults.delay(number))
            if not self._faults.fail(number):
                copy.target.copy_(copy.source)
                copy.mark.failed = False
        finally:
            copy.mark.over.set()


def _bytes(nbytes: int, device: torch.device | None = None) -> Tensor:
    # Copies write into it on other threads, where inference mode is off and forbids that to
    # tensors that were made under it.
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _plain_buffer(nbytes: int) -> Tensor:
    try:
        return _bytes(nbytes)
    except (RuntimeError, MemoryError) as error:
        raise _no_room("host", nbytes, "close other programs") from error


def _no_room(where: str, nbytes: int, remedy: str) -> BudgetError:
    return BudgetError(f"no room for {nbytes / 1e6:.0f} MB of blocks in {where} memory; {remedy}")


def _event(mark: Mark) -> torch.cuda.Event:
    assert isinstance(mark, torch.cuda.Event)  # a mark of this machine
    return mark


def _cpu_mark(mark: Mark) -> _CpuMark:
    assert isinstance(mark, _CpuMark)  # a mark of this machine
    return mark
