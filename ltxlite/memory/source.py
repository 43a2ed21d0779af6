"""Where blocks come from: RAM, or a ring of buffers that threads fill from disk ahead of need."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from itertools import cycle
from pathlib import Path

from torch import Tensor

from ltxlite.errors import CheckpointError
from ltxlite.memory.arena import FilePortion, MovableModule, Portion, TensorPortion, whole
from ltxlite.memory.machine import Machine, Mark, PinnedRefused


@dataclass(frozen=True, slots=True)
class _State:
    size: int
    changed_ns: int

    @classmethod
    def of(cls, file: os.stat_result) -> "_State":
        return cls(file.st_size, file.st_mtime_ns)


class Read:
    """A block on its way into a host buffer."""

    def __init__(self, portions: Sequence[Future[None]]) -> None:
        self._portions = portions

    @property
    def done(self) -> bool:
        """Tell whether all is there."""
        return all(part.done() and part.exception() is None for part in self._portions)

    def wait(self) -> None:
        """Wait until all is there; raises what went wrong."""
        for portion in self._portions:
            portion.result()

    def give_up(self) -> None:
        """Drop what has not begun; `settle` waits for the rest."""
        for portion in self._portions:
            portion.cancel()

    def settle(self) -> None:
        """Wait until no thread writes to the buffer any more."""
        for portion in self._portions:
            if not portion.cancelled():
                portion.exception()


class Reader:
    """Threads that read portions in the order they were asked for.

    Files are read, not mapped: one cut short is an error, not a crash, and its pages are not
    charged to the process. Each portion opens its file anew and seeks, which is the same on every
    system and shares no position between threads.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ltxlite-read")
        self._states: dict[Path, _State] = {}

    def watch(self, portions: Iterable[Portion]) -> None:
        """Remember the state of files that will be read; CheckpointError if one is too short."""
        for portion in portions:
            if isinstance(portion, FilePortion):
                if portion.path not in self._states:
                    self._states[portion.path] = _state_of(portion.path)
                end = max(span.source + span.nbytes for span in portion.spans)
                if end > self._states[portion.path].size:
                    raise _changed(portion.path)

    def fill(
        self,
        target: Tensor,
        portions: Sequence[Portion],
        free: Callable[[], None] = lambda: None,
    ) -> Read:
        """Begin to fill a buffer.  free: waits, in the threads, until it may be overwritten."""
        return Read([self.submit(partial(self._bring, part, target, free)) for part in portions])

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Leave a call to the next idle thread."""
        return self._pool.submit(call)

    def read(self, portion: FilePortion, target: Tensor) -> None:
        """Read parts of a file into a buffer; raises CheckpointError naming the file."""
        view = target.numpy().data
        try:
            with FileIO(portion.path) as file:
                for span in portion.spans:
                    file.seek(span.source)
                    _read_exactly(file, view[span.target : span.target + span.nbytes], portion.path)
                state = _State.of(os.fstat(file.fileno()))
        except OSError as error:
            raise CheckpointError(
                f"{portion.path}: cannot be read any more ({error.strerror}); it must stay in "
                "place while blocks are streamed from it"
            ) from error
        if state != self._states[portion.path]:
            raise _changed(portion.path)

    def close(self) -> None:
        """Drop what has not begun and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _bring(self, portion: Portion, target: Tensor, free: Callable[[], None]) -> None:
        free()
        if isinstance(portion, FilePortion):
            self.read(portion, target)
        else:
            for item, tensor in portion.items:
                item.view(target).copy_(tensor)


class Ring:
    """A few host buffers that are filled with blocks in the order in which they will be wanted.

    A buffer is filled again when its last copy to the device is over; reader threads wait for
    that, never the caller.
    """

    def __init__(self, buffers: Sequence[Tensor], machine: Machine, reader: Reader) -> None:
        self.waits = 0
        self.waited_seconds = 0.0
        self.nbytes = sum(buffer.nbytes for buffer in buffers)
        self._machine, self._reader = machine, reader
        self._idle = deque(_Cell(buffer) for buffer in buffers)
        self._filling: deque[_Cell] = deque()
        self._order: Iterator[int] = iter(())
        self._contents: Mapping[int, Sequence[Portion]] = {}

    def start(self, order: Iterable[int], contents: Mapping[int, Sequence[Portion]]) -> None:
        """Read blocks in this order from now on; what was under way is given up."""
        self._order, self._contents = iter(order), contents
        for cell in self._filling:
            cell.read.give_up()
            cell.given_up.append(cell.read)
        self._idle.extendleft(reversed(self._filling))
        self._filling.clear()
        for _ in range(len(self._idle)):
            self._refill(self._idle.popleft())

    @property
    def ready(self) -> bool:
        """Tell whether the next block of the order is there."""
        return self._filling[0].read.done

    def take(self) -> Tensor:
        """Return the buffer with the next block, waiting for it if need be; see `sent`."""
        read = self._filling[0].read
        if not read.done:
            since = time.perf_counter()
            read.wait()
            self.waits += 1
            self.waited_seconds += time.perf_counter() - since
        return self._filling[0].buffer

    def sent(self, mark: Mark) -> None:
        """Reuse the buffer last taken once `mark`, the end of its copy, is reached."""
        cell = self._filling.popleft()
        cell.copied = mark
        cell.given_up.clear()  # its read came after them all
        self._refill(cell)

    def close(self) -> None:
        """Drop the buffers; the reader is closed already."""
        self._filling.clear()
        self._idle.clear()
        self._contents = {}

    def _refill(self, cell: "_Cell") -> None:
        number = next(self._order, None)
        if number is None:
            self._idle.append(cell)
            return
        free = partial(_until_free, self._machine, cell.copied, tuple(cell.given_up))
        cell.read = self._reader.fill(cell.buffer, self._contents[number], free)
        self._filling.append(cell)


@dataclass(slots=True, eq=False)
class _Cell:
    buffer: Tensor
    copied: Mark | None = None
    read: Read = field(default_factory=lambda: Read([]))
    given_up: list[Read] = field(default_factory=list)


def _until_free(machine: Machine, copied: Mark | None, given_up: Sequence[Read]) -> None:
    # Other threads may still be writing for reads that were given up. All of those, not the last
    # alone: one that was dropped before it began did not wait for those before it. They began
    # before ours, so this wait ends.
    for read in given_up:
        read.settle()
    if copied is not None:
        machine.wait(copied)


class Host:
    """Blocks in RAM and on disk: page-locked arenas, and a ring for what has none.

    contents: of every block, by number; each is let go of once it is in an arena or on the device.
    """

    def __init__(
        self,
        blocks: Sequence[MovableModule],
        contents: dict[int, Sequence[Portion]],
        machine: Machine,
        reader: Reader,
    ) -> None:
        self.notes: list[str] = []
        self.locked = self.pageable = self.read = 0  # bytes; the last ones a walk
        self.ring: Ring | None = None
        self._sizes = [block.layout.nbytes for block in blocks]
        self._contents, self._machine, self._reader = contents, machine, reader
        for portions in contents.values():
            reader.watch(portions)
        self._arenas: dict[int, Tensor] = {}
        self._order: Sequence[int] = ()
        self._ring_locked = self._lockable = True

    def open_ring(self, count: int) -> None:
        """Allocate up to `count` ring buffers, ordinary ones if not even one may be locked."""
        nbytes = max(self._sizes, default=0)
        buffers: list[Tensor] = []
        try:
            while len(buffers) < count:
                buffers.append(self._machine.host_buffer(nbytes))
        except PinnedRefused as refusal:
            self._ring_locked = bool(buffers)
            self.notes.append(f"{refusal}: {len(buffers)} of {count} ring buffers are page-locked")
        buffers = buffers or [self._machine.plain_buffer(nbytes) for _ in range(count)]
        self.ring = Ring(buffers, self._machine, self._reader)

    def bring(self, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks and their bytes, once and for good; `sent` must follow each."""
        assert self.ring is not None
        self.ring.start(numbers, self._contents)
        for number in numbers:
            source = self.take(number)
            del self._contents[number]
            yield number, source

    def keep(self, numbers: Sequence[int]) -> Iterator[int]:
        """Load blocks into arenas of their own; yields each when it is there."""
        begun: deque[tuple[int, Read]] = deque()
        for number in numbers:
            # Page-locking takes as long as reading: the next arena is made while this one fills.
            begun.append((number, self._begin_arena(number)))
            if len(begun) > 1:
                yield _finished(*begun.popleft())
        for pair in begun:
            yield _finished(*pair)

    def stream(self, order: Sequence[int], lengths: Sequence[int]) -> None:
        """Begin, or begin again, to bring blocks in this order, over and over.

        lengths: of every block, by number, how many of its bytes are wanted.
        """
        read = [number for number in order if number not in self._arenas]
        wanted = {n: [p for p in self._contents[n] if p.begin < lengths[n]] for n in read}
        self.read = sum(_file_bytes(part) for parts in wanted.values() for part in parts)
        if read and self.ring is not None:
            self.ring.start(cycle(read), wanted)
        elif self.ring is not None:
            self._machine.drain()  # it may still be copied from
            self.ring = None

    def ready(self, number: int) -> bool:
        """Tell whether the next block can be taken without waiting."""
        return number in self._arenas or (self.ring is not None and self.ring.ready)

    def take(self, number: int) -> Tensor:
        """Return the bytes of the next block of the order, waiting for the disk if need be."""
        if number in self._arenas:
            return self._arenas[number]
        assert self.ring is not None
        return self.ring.take()[: self._sizes[number]]

    def sent(self, number: int, mark: Mark) -> None:
        """Say when the copy of the block last taken will be over."""
        if number not in self._arenas and self.ring is not None:
            self.ring.sent(mark)

    def close(self) -> None:
        """Drop all buffers; the reader is closed already and no copy under way."""
        self._arenas.clear()
        self._contents.clear()
        if self.ring is not None:
            self.ring.close()

    def _begin_arena(self, number: int) -> Read:
        nbytes = self._sizes[number]
        locked = self._locked(nbytes) if self._lockable else None
        arena = self._machine.plain_buffer(nbytes) if locked is None else locked
        read = self._reader.fill(arena, self._contents.pop(number))
        self.pageable += nbytes if locked is None else 0
        self.locked += 0 if locked is None else nbytes
        if locked is None and self._ring_locked:
            # Copies from pageable memory hold up the host and run at half the speed.
            self._contents[number] = whole(arena)
        else:
            self._arenas[number] = arena
        return read

    def _locked(self, nbytes: int) -> Tensor | None:
        try:
            return self._machine.host_buffer(nbytes)
        except PinnedRefused as refusal:
            self._lockable = False
            self.notes.append(f"{refusal}: the remaining blocks are in pageable memory")
            return None


def _finished(number: int, read: Read) -> int:
    read.wait()
    return number


def _file_bytes(portion: Portion) -> int:
    if isinstance(portion, TensorPortion):
        return 0
    return sum(span.nbytes for span in portion.spans)


def _state_of(path: Path) -> _State:
    try:
        with FileIO(path) as file:  # asked as `read` asks: directories lag behind on Windows
            return _State.of(os.fstat(file.fileno()))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _read_exactly(file: FileIO, view: memoryview, path: Path) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise _changed(path)
        view = view[count:]


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: the file is not the one that was opened, it was cut short or written to since; "
        "let it be while it is in use, or download it again, and start anew"
    )
