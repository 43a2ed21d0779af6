"""Readers bring portions in order; the ring reuses a buffer only when its copy is over."""

import threading
import time
from itertools import cycle

import pytest
import torch
from stream_stack import layers, write

from ltxlite.errors import CheckpointError
from ltxlite.memory.arena import FilePortion, FileRange, MovableModule, Span, divide, whole
from ltxlite.memory.machine import CpuMachine, Faults
from ltxlite.memory.source import Reader, Ring


@pytest.fixture
def reader():
    made = Reader(2)
    yield made
    made.close()
    assert not [item for item in threading.enumerate() if item.name.startswith("ltxlite-read")]


@pytest.fixture
def machine():
    made = CpuMachine()
    yield made
    made.close()


def test_a_block_read_from_a_file_has_the_bytes_of_its_tensors(tmp_path, reader):
    layer = layers(1)[0]
    movable = MovableModule(layer)
    (origins,) = write(tmp_path / "file", [layer], but=("shift",))
    portions = divide(movable, origins)
    reader.watch(portions)
    buffer = torch.full((movable.layout.nbytes,), 0xFF, dtype=torch.uint8)
    read = reader.fill(buffer, portions)
    read.wait()
    assert read.done
    for item, tensor in zip(movable.layout.fields, movable.tensors(), strict=True):
        assert torch.equal(item.view(buffer), tensor), item.name


def test_portions_of_two_files_come_from_the_right_one(tmp_path, reader):
    paths = [tmp_path / "one", tmp_path / "two"]
    for value, path in enumerate(paths):
        path.write_bytes(bytes([value + 1]) * 100)
    portions = [
        FilePortion(path, (Span(30, 10 * number, 10), Span(0, 50 + 10 * number, 10)))
        for number, path in enumerate(paths)
    ]
    reader.watch(portions)
    buffer = torch.zeros(70, dtype=torch.uint8)
    reader.fill(buffer, portions).wait()
    assert buffer.view(7, 10)[:, 0].tolist() == [1, 2, 0, 0, 0, 1, 2]


def test_a_range_beyond_the_end_of_its_file_is_refused_before_reading(tmp_path, reader):
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(99))
    with pytest.raises(CheckpointError, match=r"short\.safetensors: the file is not the one"):
        reader.watch([FilePortion(path, (Span(0, 0, 100),))])
    assert FileRange(path, 0, 99).nbytes == 99


def test_a_file_that_shrinks_after_it_was_looked_at_is_an_error_and_not_a_crash(tmp_path, reader):
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(100))
    portions = [FilePortion(path, (Span(0, 0, 100),))]
    reader.watch(portions)
    path.write_bytes(bytes(40))
    read = reader.fill(torch.zeros(100, dtype=torch.uint8), portions)
    with pytest.raises(CheckpointError, match=r"short\.safetensors: .*cut short"):
        read.wait()
    assert not read.done, "failed is not there"


def blocks_of(values: list[int], nbytes: int = 65):
    return {value: whole(torch.full((nbytes,), value, dtype=torch.uint8)) for value in values}


def test_the_ring_brings_blocks_in_order_over_and_over(reader, machine):
    buffers = [torch.zeros(65, dtype=torch.uint8) for _ in range(3)]
    ring = Ring(buffers, machine, reader)
    ring.start(cycle([4, 7, 9, 2]), blocks_of([4, 7, 9, 2]))
    for wanted in [4, 7, 9, 2] * 3:
        target = torch.zeros(65, dtype=torch.uint8)
        mark = machine.copy(target, ring.take(), None)
        ring.sent(mark)
        machine.wait(mark)
        assert (target == wanted).all()


def test_a_buffer_is_filled_again_only_when_its_copy_is_over_and_the_caller_never_waits(reader):
    machine = CpuMachine(Faults(delay=lambda number: 0.05))
    ring = Ring([torch.zeros(65, dtype=torch.uint8)], machine, reader)
    ring.start(iter([1, 2]), blocks_of([1, 2]))
    target = torch.zeros(65, dtype=torch.uint8)
    source = ring.take()
    since = time.perf_counter()
    mark = machine.copy(target, source, None)
    ring.sent(mark)
    assert time.perf_counter() - since < 0.04, "it is the reader that waits"
    assert not ring.ready and (source == 1).all()
    machine.wait(mark)
    assert (target == 1).all()
    assert (ring.take() == 2).all()
    machine.close()


class SlowReader(Reader):
    """Is stuck in the middle of blocks below 10 until it is released."""

    def __init__(self) -> None:
        super().__init__(2)
        self.release = threading.Event()

    def _bring(self, portion, target, free):
        def stuck() -> None:
            free()
            if int(portion.items[0][1][0]) < 10:
                self.release.wait()

        super()._bring(portion, target, stuck)


def test_starting_over_twice_in_the_middle_of_reads_brings_the_new_order(machine):
    # Both threads are stuck in the first order; the second is dropped before it begins, so that
    # the third must wait for the first itself.
    reader = SlowReader()
    ring = Ring([torch.zeros(65, dtype=torch.uint8) for _ in range(2)], machine, reader)
    contents = blocks_of([1, 2, 11, 12, 21, 22])
    for order in ([1, 2], [11, 12], [21, 22]):
        ring.start(cycle(order), contents)
    assert not ring.ready
    reader.release.set()
    for wanted in [21, 22, 21, 22]:
        assert (ring.take() == wanted).all()
        ring.sent(machine.reached())
    reader.close()


def test_waiting_for_the_disk_is_measured(machine):
    reader = SlowReader()
    ring = Ring([torch.zeros(65, dtype=torch.uint8)], machine, reader)
    ring.start(iter([1, 12]), blocks_of([1, 12]))
    threading.Timer(0.05, reader.release.set).start()
    assert (ring.take() == 1).all() and ring.waits == 1
    # The timer began a little before the wait.
    assert ring.waited_seconds > 0.02
    ring.sent(machine.reached())
    while not ring.ready:
        time.sleep(1e-3)
    assert (ring.take() == 12).all() and ring.waits == 1, "what is there already is no wait"
    reader.close()
