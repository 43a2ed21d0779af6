"""A network's blocks, brought to the device one after the other while earlier ones compute.

    file --reader threads--> ring --copy--> slot      blocks that stay on disk
    pinned arena ------------------copy--> slot       blocks that RAM holds
    resident buffer                                   blocks that stay on the device

One copy a block, on the copy queue, ordered by marks alone: a slot is written when the compute that
read it is over, a block is computed when its copy is over, a ring buffer is read into when its copy
is over. The host waits in one case: the next block is still being read from disk.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import Tensor, nn

from ltxlite.errors import BudgetError, ShapeError
from ltxlite.memory.arena import FileRange, MovableModule, Portion, divide
from ltxlite.memory.machine import Machine, Mark
from ltxlite.memory.needed import Needed
from ltxlite.memory.source import Host, Reader

_STAGING = 2  # host buffers on the way to what stays: one is read into while the other is copied


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the blocks of a network live.

    resident: blocks that stay on the device.  slots: device buffers for the others.  prefetch: how
    many may be on their way while one computes.  pinned_bytes: RAM for blocks that are streamed
    (None: all of them), the rest is read from disk, through `ring` host buffers, by `threads`.
    """

    resident: frozenset[int] = frozenset()
    slots: int = 3
    prefetch: int = 2
    pinned_bytes: int | None = None
    ring: int = 4
    threads: int = 4

    def __post_init__(self) -> None:
        least = {"slots": 0, "prefetch": 0, "ring": 1, "threads": 1, "pinned_bytes": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise BudgetError(f"placement: {name} must be at least {bound}, got {value}")


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What a streamer holds and how it did. Bytes; `moved` and `read` for one walk.

    pageable: in RAM, but not page-locked.  waits, waited_seconds: of the host, for the disk.
    notes: what was asked for and not had.
    """

    resident: int
    slots: int
    pinned: int
    pageable: int
    ring: int
    moved: int
    read: int
    waits: int
    waited_seconds: float
    notes: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Slot:
    number: int
    buffer: Tensor
    after: Mark  # the last use of the buffer


@dataclass(frozen=True, slots=True, eq=False)
class _Arrival:
    block: int
    slot: _Slot
    mark: Mark


class Streamer:
    """Walks through blocks of which only some are on the device at a time.

    What no block reads at present, low-rank factors of strength 0, is left out (`needed`).
    From its construction on the modules have values only while `walk` yields them. Not for several
    threads; one walk at a time, a new one ends the last and begins at the first block again.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        machine: Machine,
        placement: Placement,
        origins: Sequence[Mapping[str, FileRange]] = (),
        reader: Reader | None = None,
    ) -> None:
        """Take over loaded modules, whose tensors are on the CPU and are never written to.

        origins: for each module, where in files its tensors stand.  reader: in place of its own.
        Device memory and the ring are allocated first: if that raises BudgetError, the modules
        still have their values. Raises CheckpointError if a file cannot be read.
        """
        _check(modules, placement, origins)
        self._blocks = [MovableModule(module) for module in modules]
        self._taken: list[MovableModule] = []
        self._machine = machine
        self._reader = reader or Reader(placement.threads)
        self._sizes = [block.layout.nbytes for block in self._blocks]
        self._needed = Needed(modules, [block.layout for block in self._blocks])
        self._lengths = self._needed.lengths()  # of what is sent
        self._order = _streamed_blocks(len(modules), placement)
        self._prefetch = placement.prefetch
        self._resident: dict[int, Tensor] = {}
        self._slots: list[_Slot] = []
        self._free: deque[_Slot] = deque()
        self._coming: deque[_Arrival] = deque()
        self._current: _Arrival | None = None
        self._count = 0  # of slots
        self._ahead = 0  # place in _order of the next block to send
        self._views: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._walk: object | None = None
        self._finished = True  # the last walk; what is sent ahead follows from that
        self._closed = False
        self._host = Host(self._blocks, _divided(self._blocks, origins), machine, self._reader)
        try:
            self._load(placement)
        except BaseException:
            self.close()
            raise

    @property
    def report(self) -> StreamReport:
        """Say what is where, and how long the host has waited so far."""
        host, ring = self._host, self._host.ring
        moved = sum(self._lengths[number] for number in self._order)
        return StreamReport(
            resident=sum(buffer.nbytes for buffer in self._resident.values()),
            slots=sum(slot.buffer.nbytes for slot in self._slots),
            pinned=host.locked,
            pageable=host.pageable,
            ring=0 if ring is None else ring.nbytes,
            moved=moved,
            read=host.read,
            waits=0 if ring is None else ring.waits,
            waited_seconds=0.0 if ring is None else ring.waited_seconds,
            notes=tuple(host.notes),
        )

    def walk(self) -> Iterator[nn.Module]:
        """Yield the modules in order, each with its values until the next is asked for.

        Raises CheckpointError if a file fails; the next walk tries again.
        """
        walk = self._begin()
        try:
            for number, block in enumerate(self._blocks):
                self._enter(number)
                yield block.module
                if self._walk is not walk:
                    raise RuntimeError("this walk has ended: its streamer was closed or walks anew")
                self._leave()
                self._send_ahead()
            self._finished = True
        finally:
            if self._walk is walk:
                self._leave()
                self._walk = None

    def rest(self) -> None:
        """Give the slots back while another network works; the next walk takes them again.

        Resident blocks stay. Raises RuntimeError in the middle of a walk.
        """
        if self._walk is not None:
            raise RuntimeError("a walk is under way: its blocks lie in the slots")
        if self._closed:
            return
        self._machine.drain()
        self._start_over()
        self._slots.clear()
        self._free.clear()
        self._views.clear()

    def close(self) -> None:
        """Stop the threads and free all memory; the modules have no values afterwards.

        May be called at any time, in the middle of a walk too, and more than once.
        """
        if self._closed:
            return
        self._closed = True
        self._walk = None
        try:
            self._reader.close()
            self._machine.drain()
        finally:
            self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _load(self, placement: Placement) -> None:
        self._allocate(placement)
        streamed = [self._sizes[number] for number in self._order]
        places = _kept_in_ram(streamed, placement.pinned_bytes)
        self._host.open_ring(min(placement.ring, len(self._order) - len(places) or _STAGING))
        self._load_residents()
        for number in self._host.keep([self._order[place] for place in sorted(places)]):
            self._take(number)
        for place, number in enumerate(self._order):
            if place not in places:
                self._take(number)
        self._host.stream(self._order, self._lengths)
        self._send_ahead()

    def _allocate(self, placement: Placement) -> None:
        self._count = placement.slots if self._order else 0
        buffers = self._slot_buffers()
        for number, size in enumerate(self._sizes):
            if number not in self._order:
                self._resident[number] = self._machine.device_buffer(size)
        self._fill_slots(buffers)

    def _slot_buffers(self) -> list[Tensor]:
        largest = max((self._sizes[number] for number in self._order), default=0)
        return [self._machine.device_buffer(largest) for _ in range(self._count)]

    def _fill_slots(self, buffers: Sequence[Tensor]) -> None:
        # An allocator may hand out memory that the compute queue is not done with.
        begun = self._machine.reached()
        self._slots = [_Slot(number, buffer, begun) for number, buffer in enumerate(buffers)]
        self._free.extend(self._slots)

    def _load_residents(self) -> None:
        begun = self._machine.reached()
        for number, source in self._host.bring(list(self._resident)):
            buffer = self._resident[number]
            mark = self._machine.copy(buffer, source, begun)
            self._host.sent(number, mark)
            self._take(number)
            self._blocks[number].bind(self._blocks[number].views(buffer))
            self._machine.hold(mark)

    def _take(self, number: int) -> None:
        self._blocks[number].release()
        self._taken.append(self._blocks[number])

    def _begin(self) -> object:
        if self._closed:
            raise RuntimeError("the streamer is closed")
        self._leave()
        lengths = self._needed.lengths()
        if not self._finished or lengths != self._lengths:
            self._lengths = lengths
            self._start_over()
        if self._order and not self._slots:
            self._fill_slots(self._slot_buffers())
        self._finished = False
        self._walk = object()
        return self._walk

    def _start_over(self) -> None:
        for arrival in self._coming:
            arrival.slot.after = arrival.mark
            self._free.append(arrival.slot)
        self._coming.clear()
        self._ahead = 0
        self._host.stream(self._order, self._lengths)

    def _enter(self, number: int) -> None:
        if number in self._resident:
            return
        if not self._coming:
            self._send()
        arrival = self._coming[0]
        assert arrival.block == number
        self._machine.hold(arrival.mark)
        self._current = self._coming.popleft()
        self._blocks[number].bind(self._views_of(number, arrival.slot))
        self._send_ahead()

    def _leave(self) -> None:
        if self._current is not None:
            arrival, self._current = self._current, None
            self._blocks[arrival.block].unbind()
            arrival.slot.after = self._machine.reached()
            self._free.append(arrival.slot)

    def _send_ahead(self) -> None:
        while self._free and self._order and len(self._coming) < self._prefetch:
            if not self._host.ready(self._order[self._ahead]):
                return
            self._send()

    def _send(self) -> None:
        number, slot = self._order[self._ahead], self._free[0]
        length = self._lengths[number]
        source = self._host.take(number)[:length]
        mark = self._machine.copy(slot.buffer[:length], source, slot.after)
        self._host.sent(number, mark)
        self._coming.append(_Arrival(number, self._free.popleft(), mark))
        self._ahead = (self._ahead + 1) % len(self._order)

    def _views_of(self, number: int, slot: _Slot) -> tuple[Tensor, ...]:
        key = number, slot.number
        if key not in self._views:
            self._views[key] = self._blocks[number].views(slot.buffer)
        return self._views[key]

    def _forget(self) -> None:
        for block in self._taken:
            block.unbind()
        self._views.clear()
        self._resident.clear()
        self._slots.clear()
        self._free.clear()
        self._coming.clear()
        self._current = None
        self._host.close()


def evenly_spread(count: int, total: int) -> frozenset[int]:
    """Return `count` of the numbers below `total`, as far apart as they can be."""
    return frozenset((2 * index + 1) * total // (2 * count) for index in range(count))


def _divided(
    blocks: Sequence[MovableModule], origins: Sequence[Mapping[str, FileRange]]
) -> dict[int, Sequence[Portion]]:
    return {
        number: divide(block, origins[number] if origins else {})
        for number, block in enumerate(blocks)
    }


def _streamed_blocks(count: int, placement: Placement) -> tuple[int, ...]:
    streamed = tuple(number for number in range(count) if number not in placement.resident)
    # With a slot for each they would stay where they are, in more memory than they need.
    return streamed if len(streamed) > placement.slots else ()


def _kept_in_ram(sizes: Sequence[int], budget: int | None) -> frozenset[int]:
    # Evenly spread, so that the disk has the time of several blocks to read one.
    for count in range(len(sizes), 0, -1):
        chosen = evenly_spread(count, len(sizes))
        if budget is None or sum(sizes[place] for place in chosen) <= budget:
            return chosen
    return frozenset()


def _check(
    modules: Sequence[nn.Module],
    placement: Placement,
    origins: Sequence[Mapping[str, FileRange]],
) -> None:
    if origins and len(origins) != len(modules):
        raise ShapeError(f"{len(modules)} blocks need as many origins, got {len(origins)}")
    if not placement.slots and len(placement.resident) < len(modules):
        raise BudgetError("placement: blocks that are not resident need at least one slot, got 0")
    if strangers := placement.resident - set(range(len(modules))):
        raise BudgetError(f"placement: no block {min(strangers)} among {len(modules)} to reside")
    parts = [part for module in modules for part in module.modules()]
    if len(set(parts)) != len(parts):
        raise ShapeError("two blocks share a module; a streamed block owns its weights alone")
