"""What goes wrong while blocks stream is one clear error; no thread, buffer or hang is left."""

import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from stream_stack import layers, plain, run, write
from torch import Tensor

from ltxlite.errors import BudgetError, CheckpointError
from ltxlite.memory.arena import FilePortion, layout_of
from ltxlite.memory.machine import CpuMachine, Faults
from ltxlite.memory.source import Reader
from ltxlite.memory.stream import Placement, Streamer

COUNT = 6
SIZE = layout_of(layers(1)[0]).nbytes
DISK = Placement(slots=2, prefetch=1, pinned_bytes=0, ring=2, threads=2)
MIXED = Placement(frozenset({3}), slots=2, prefetch=1, pinned_bytes=2 * SIZE, ring=2, threads=2)


def threads() -> set[str]:
    return {item.name for item in threading.enumerate() if item.name.startswith("ltxlite")}


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not threads()


class TrackingMachine(CpuMachine):
    """Knows every buffer it gave away, without keeping it."""

    def __init__(self, faults: Faults | None = None) -> None:
        super().__init__(faults)
        self.buffers: list[weakref.ref[torch.UntypedStorage]] = []

    def device_buffer(self, nbytes: int) -> Tensor:
        return self.track(super().device_buffer(nbytes))

    def host_buffer(self, nbytes: int) -> Tensor:
        return self.track(super().host_buffer(nbytes))

    def plain_buffer(self, nbytes: int) -> Tensor:
        return self.track(super().plain_buffer(nbytes))

    def track(self, buffer: Tensor) -> Tensor:
        self.buffers.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    def living(self) -> int:
        return sum(buffer() is not None for buffer in self.buffers)


class FailingReader(Reader):
    """Calls `before` ahead of each portion."""

    def __init__(self, before: Callable[[int], None]) -> None:
        super().__init__(2)
        self.before, self.count, self.lock = before, 0, threading.Lock()

    def read(self, portion: FilePortion, target: Tensor) -> None:
        with self.lock:
            number, self.count = self.count, self.count + 1
        self.before(number)
        super().read(portion, target)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000))


def overwrite(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw + b"more")


def rename(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


@pytest.mark.parametrize("change", [truncate, touch, overwrite, Path.unlink, rename])
def test_a_file_that_changes_or_vanishes_is_one_error_that_names_it(tmp_path, change):
    path, blocks = tmp_path / "model.gguf", layers(COUNT)
    machine = TrackingMachine()
    with Streamer(blocks, machine, DISK, write(path, blocks)) as streamer:
        run(streamer.walk())
        change(path)
        with pytest.raises(CheckpointError, match=r"model\.gguf: .*") as info:
            for _ in range(2):  # what was read ahead of the change may still be used
                run(streamer.walk())
        assert "\n" not in str(info.value)
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            run(streamer.walk())
    del info
    machine.close()
    gc.collect()  # the error's traceback and the read that raised it know each other
    assert machine.living() == 0


def test_a_read_error_fails_the_walk_and_the_next_walk_tries_again(tmp_path):
    def before(number: int) -> None:
        if number == COUNT + 3:
            raise OSError(errno.EIO, "Input/output error")

    # The error arises before the file is opened, so what reaches the walk is the error itself.
    blocks, machine = layers(COUNT), CpuMachine()
    origins = write(tmp_path / "model.gguf", blocks)
    with Streamer(blocks, machine, DISK, origins, FailingReader(before)) as streamer:
        run(streamer.walk())
        with pytest.raises(OSError, match="Input/output"):
            run(streamer.walk())
        assert torch.equal(run(streamer.walk()), plain(COUNT))
    machine.close()


def test_a_file_that_is_gone_or_too_short_before_is_refused_with_the_modules_untouched(tmp_path):
    blocks, machine = layers(COUNT), CpuMachine()
    path = tmp_path / "model.gguf"
    origins = write(path, blocks)
    truncate(path)
    with pytest.raises(CheckpointError, match=r"model\.gguf: the file is not the one"):
        Streamer(blocks, machine, DISK, origins)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.gguf: cannot be read \(No such file"):
        Streamer(blocks, machine, DISK, origins)
    machine.close()
    assert torch.equal(run(blocks), plain(COUNT))


def test_a_failure_at_every_allocation_is_a_budget_error_and_leaves_nothing(tmp_path):
    # From allocation n on nothing is granted, not even ordinary memory in place of page-locked.
    blocks = layers(COUNT)
    write(tmp_path / "file", blocks)
    total = 0
    while True:
        machine = TrackingMachine(Faults(refuse=lambda kind, number, n=total: number >= n))
        blocks = layers(COUNT)
        origins = write(tmp_path / "file", blocks)
        try:
            Streamer(blocks, machine, MIXED, origins).close()
        except BudgetError as error:
            assert "MB" in str(error) and "\n" not in str(error)
            refused = True
        else:
            refused = False
        machine.close()
        assert machine.living() == 0 and not threads()
        if not refused:
            break
        if total < 4:  # slots, residents, ring: the run may plan anew with the same modules
            assert torch.equal(run(blocks), plain(COUNT))
        total += 1
    # 2 slots, 1 resident, 2 ring buffers (one is enough), 2 arenas.
    assert total == 7


@pytest.mark.parametrize("granted", range(6))
def test_page_locked_memory_refused_is_a_smaller_ring_and_not_an_error(tmp_path, granted):
    # 2 ring buffers, then 4 arenas: after `granted` of them the system refuses for good.
    locked = [0]

    def refuse(kind: str, number: int) -> bool:
        locked[0] += kind == "host"
        return kind == "host" and locked[0] > granted

    machine = TrackingMachine(Faults(refuse=refuse, poison=True))
    blocks = layers(COUNT)
    origins = write(tmp_path / "file", blocks)
    placement = Placement(slots=2, prefetch=1, pinned_bytes=4 * SIZE, ring=2)
    with Streamer(blocks, machine, placement, origins) as streamer:
        report = streamer.report
        assert torch.equal(run(streamer.walk(), run(streamer.walk())), plain(COUNT, walks=2))
    assert report.pinned == max(0, granted - 2) * SIZE
    assert report.pinned + report.pageable == 4 * SIZE
    assert report.ring == (1 if granted == 1 else 2) * SIZE
    assert all("refuses to page-lock" in note for note in report.notes)
    assert len(report.notes) == (2 if granted < 2 else 1)
    machine.close()
    assert machine.living() == 0


@pytest.mark.parametrize("stop", [0, 1, 3, COUNT])
def test_closing_in_the_middle_of_a_walk_frees_everything_and_ends_it(tmp_path, stop):
    blocks, machine = layers(COUNT), TrackingMachine(Faults(delay=lambda number: 1e-3))
    streamer = Streamer(blocks, machine, MIXED, write(tmp_path / "file", blocks))
    walk = streamer.walk()
    run(islice(walk, stop))
    streamer.close()
    streamer.close()
    assert machine.living() == 0
    assert not any(name.startswith("ltxlite-read") for name in threads())
    with pytest.raises(RuntimeError, match="closed"):
        next(walk)
    with pytest.raises(RuntimeError, match="closed"):
        next(streamer.walk())
    machine.close()


def test_an_error_in_the_consumer_leaves_a_streamer_that_walks_again(tmp_path):
    blocks, machine = layers(COUNT), CpuMachine(Faults(poison=True))
    with Streamer(blocks, machine, MIXED, write(tmp_path / "file", blocks)) as streamer:
        with pytest.raises(ZeroDivisionError):
            for number, _ in enumerate(streamer.walk()):
                1 / (number - 2)
        assert torch.equal(run(streamer.walk()), plain(COUNT))
    machine.close()


def test_a_second_walk_ends_the_first(tmp_path):
    blocks, machine = layers(COUNT), CpuMachine(Faults(poison=True))
    with Streamer(blocks, machine, DISK, write(tmp_path / "file", blocks)) as streamer:
        first = streamer.walk()
        next(first), next(first)
        second = streamer.walk()
        x = run(islice(second, 3))
        with pytest.raises(RuntimeError, match="this walk has ended"):
            next(first)
        assert torch.equal(run(second, x), plain(COUNT))
    machine.close()


@pytest.mark.parametrize("failing", range(8))
def test_a_failed_copy_is_an_error_and_never_wrong_numbers(tmp_path, failing):
    blocks, machine = layers(COUNT), TrackingMachine(Faults(fail=lambda number: number == failing))
    with (
        pytest.raises(RuntimeError, match="copy to the device failed"),
        Streamer(blocks, machine, MIXED, write(tmp_path / "file", blocks)) as streamer,
    ):
        run(streamer.walk(), run(streamer.walk()))
    machine.close()
    assert machine.living() == 0


def test_a_block_used_outside_its_turn_is_refused(tmp_path):
    blocks, machine = layers(COUNT), CpuMachine()
    x = torch.ones(1, 33)
    with Streamer(blocks, machine, Placement(frozenset({1}), slots=2)) as streamer:
        walk = streamer.walk()
        first = next(walk)
        first(x)
        blocks[1](x)  # resident: always there
        next(walk)
        with pytest.raises(RuntimeError, match="Layer was called outside its turn"):
            first(x)
        assert all(value.is_meta for value in first.state_dict().values())
    with pytest.raises(RuntimeError, match="outside its turn"):
        blocks[1](x)
    machine.close()


def test_the_tensors_a_module_came_with_are_let_go(tmp_path):
    blocks, machine = layers(COUNT), CpuMachine()
    originals = [
        weakref.ref(value.untyped_storage())
        for block in blocks
        for name, value in block.state_dict().items()
        if value.nbytes and name != "gain"
    ]
    origins = write(tmp_path / "file", blocks)
    with Streamer(blocks, machine, MIXED, origins) as streamer:
        assert not [item for item in originals if item() is not None]
        run(streamer.walk())
    machine.close()
