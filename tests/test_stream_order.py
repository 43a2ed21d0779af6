"""The order of copies, reads and compute, proven on a machine that only writes down what is asked.

Two queues and reader threads may run as far ahead of each other as their marks let them, which no
real machine can be made to do. So nothing is copied here: the streamer runs once, what it asks for
becomes a graph of operations with edges for everything that orders them, and that graph is then
executed in random legal orders. An operation takes time: others may begin and end meanwhile. Every
computation must find its own block in the slot, whole, from its beginning to its end.
"""

import random
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ltxlite.memory.arena import FilePortion, FileRange
from ltxlite.memory.machine import Mark
from ltxlite.memory.source import Reader
from ltxlite.memory.stream import Placement, Streamer

COUNT = 7
TORN = -1  # what a buffer holds that is being written, or was by two at a time


class HazardError(Exception):
    """An operation read what it must not."""


@dataclass(eq=False)
class Operation:
    """Reads a buffer or nothing, writes a buffer or nothing, after others.

    block: what a read from disk brings, what a computation needs, None for a copy.
    """

    after: set["Operation"]
    reads: int | None = None
    writes: int | None = None
    block: int | None = None


@dataclass
class Recorder:
    """A machine and its reader threads, as a graph.

    ignore: what orders operations but is forgotten, to see that it is missed.
    """

    chance: random.Random
    ignore: Collection[str] = ()
    operations: list[Operation] = field(default_factory=list)
    known: set[Operation] = field(default_factory=set)  # the host has seen their end
    computed: set[Operation] = field(default_factory=set)  # what the compute queue waits for next
    reading: Operation | None = None

    def add(self, after: set[Operation], **facts: int | None) -> Operation:
        operation = Operation(after | self.known, **facts)
        self.operations.append(operation)
        return operation

    def host_buffer(self, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        # Whoever gets this memory next writes to it at once.
        weakref.finalize(buffer.untyped_storage(), self.freed, buffer.data_ptr()).atexit = False
        return buffer

    plain_buffer = host_buffer

    def freed(self, address: int) -> None:
        self.add(set(), writes=address, block=-2)

    def device_buffer(self, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        # As allocators do: memory that was freed while the compute queue still writes to it.
        self.computed = {self.add(self.computed, writes=buffer.data_ptr(), block=-2)}
        return buffer

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        before = set() if after is None or "after" in self.ignore else set(after)
        return frozenset([self.add(before, reads=source.data_ptr(), writes=target.data_ptr())])

    def reached(self) -> Mark:
        return frozenset(self.computed)

    def hold(self, mark: Mark) -> None:
        if "hold" not in self.ignore:
            self.computed = self.computed | mark

    def wait(self, mark: Mark) -> None:
        assert self.reading is not None, "only reader threads wait"
        if "wait" not in self.ignore:
            self.reading.after |= mark

    def compute(self, block: "Probe") -> None:
        address = block.weight.data_ptr()
        self.computed = {self.add(self.computed, reads=address, block=block.number)}

    def drain(self) -> None:
        if "drain" not in self.ignore:
            self.known.update(self.operations)

    def close(self) -> None: ...


class RecordedRead(Future[None]):
    """A portion that is read at some time: asking for it is what tells the host."""

    def __init__(self, recorder: Recorder, operation: Operation) -> None:
        super().__init__()
        self.recorder, self.operation, self.dropped = recorder, operation, False
        self.set_result(None)

    def cancelled(self) -> bool:
        return self.dropped

    def cancel(self) -> bool:
        # Begun already, or not: both happen.
        if self.operation not in self.recorder.known and self.recorder.chance.random() < 0.5:
            self.dropped = True
            self.operation.writes = None
        return self.dropped

    def done(self) -> bool:
        if "ready" in self.recorder.ignore:
            return True
        if self.operation in self.recorder.known or self.recorder.chance.random() < 0.5:
            self.recorder.known.add(self.operation)
            return True
        return False

    def exception(self, timeout: float | None = None) -> None:
        if self.recorder.reading is not None and "settle" not in self.recorder.ignore:
            self.recorder.reading.after.add(self.operation)

    def result(self, timeout: float | None = None) -> None:
        self.recorder.known.add(self.operation)


class RecordingReader(Reader):
    """Notes a read when it is asked for; files are numbers."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(1)
        self.recorder = recorder

    def watch(self, portions: object) -> None: ...

    def submit(self, call: Callable[[], None]) -> Future[None]:
        self.recorder.reading = self.recorder.add(set())
        call()
        operation, self.recorder.reading = self.recorder.reading, None
        return RecordedRead(self.recorder, operation)

    def read(self, portion: FilePortion, target: Tensor) -> None:
        assert self.recorder.reading is not None
        self.recorder.reading.block = int(portion.path.name)
        self.recorder.reading.writes = target.data_ptr()


class Probe(nn.Module):
    """A block that knows which one it is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.register_buffer("weight", torch.zeros(3))


def record(seed: int, ignore: Collection[str] = ()) -> list[Operation]:
    """Run walks of a streamer that chance chooses; return all it asked for."""
    chance = random.Random(seed)
    recorder = Recorder(chance, ignore)
    placement = Placement(
        resident=frozenset(chance.sample(range(COUNT), chance.choice((0, 0, 2)))),
        slots=chance.randint(1, 3),
        prefetch=chance.randint(0, 3),
        pinned_bytes=chance.choice((None, 0, 0, 2 * 256)),
        ring=chance.randint(1, 4),
    )
    origins = [{"weight": FileRange(Path(str(number)), 0, 12)} for number in range(COUNT)]
    blocks = [Probe(number) for number in range(COUNT)]
    with Streamer(blocks, recorder, placement, origins, RecordingReader(recorder)) as streamer:
        for stop in (None, chance.randint(0, COUNT), chance.randint(0, COUNT), None, 1):
            for block in islice(streamer.walk(), stop):
                recorder.compute(block)
    return recorder.operations


class Memory:
    """Buffers while operations run, each with a beginning and an end."""

    def __init__(self) -> None:
        self.holds: dict[int | None, int] = {}
        self.writers: dict[int | None, int] = {}

    def begin(self, operation: Operation) -> int | None:
        found = self.look(operation)
        if operation.writes is not None:
            self.holds[operation.writes] = TORN
            self.writers[operation.writes] = self.writers.get(operation.writes, 0) + 1
        return found

    def end(self, operation: Operation, found: int | None) -> None:
        if self.look(operation) != found:
            raise HazardError("a buffer was overwritten while it was read")
        if operation.writes is not None:
            alone = self.writers[operation.writes] == 1
            self.writers[operation.writes] -= 1
            whole = found if operation.reads is not None else operation.block
            self.holds[operation.writes] = whole if alone and whole is not None else TORN

    def look(self, operation: Operation) -> int | None:
        if operation.reads is None:
            return None
        found = self.holds.get(operation.reads, TORN)
        if found == TORN or (operation.block is not None and found != operation.block):
            raise HazardError(f"wanted block {operation.block}, found {found}")
        return found


def execute(operations: list[Operation], seed: int) -> None:
    """Run all operations in an order that chance chooses among the legal ones."""
    chance = random.Random(seed)
    memory = Memory()
    ended: set[Operation] = set()
    running: dict[Operation, int | None] = {}
    waiting = list(operations)
    while waiting or running:
        able = [item for item in waiting if item.after <= ended]
        if able and (not running or chance.random() < 0.5):
            chosen = chance.choice(able)
            waiting.remove(chosen)
            running[chosen] = memory.begin(chosen)
        else:
            chosen = chance.choice(list(running))
            memory.end(chosen, running.pop(chosen))
            ended.add(chosen)


@pytest.mark.parametrize("part", range(4))
def test_every_legal_order_of_every_walk_computes_with_the_right_blocks(part):
    for seed in range(part * 100, part * 100 + 100):
        operations = record(seed)
        for order in range(2):
            execute(operations, seed + order)


@pytest.mark.parametrize("forgotten", ["hold", "after", "wait", "settle", "ready", "drain"])
def test_whatever_orders_them_is_missed_when_it_is_forgotten(forgotten):
    found = 0
    for seed in range(100):
        try:
            execute(record(seed, ignore=[forgotten]), seed)
        except HazardError:
            found += 1
    assert found > 5, "of 100 walks, most of which need every mark"


def test_unordered_operations_are_seen_as_such():
    # The detector itself: a copy into a slot that a computation reads, with and without the edge.
    fill = Operation(set(), writes=1, block=5)
    compute = Operation({fill}, reads=1, block=5)
    again = Operation({fill}, writes=1, block=6)
    with pytest.raises(HazardError):
        for seed in range(50):
            execute([fill, compute, again], seed)
    again.after.add(compute)
    for seed in range(50):
        execute([fill, compute, again], seed)
