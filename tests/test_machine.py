"""The CPU machine keeps the promises of its marks, and does harm when told to."""

import mmap
import threading
import time

import pytest
import torch
from torch import nn

from ltxlite.errors import BudgetError
from ltxlite.memory.machine import CpuMachine, CudaMachine, Faults, PinnedRefused
from ltxlite.memory.stream import Placement, Streamer


@pytest.fixture
def made():
    """Makes machines; afterwards they are closed and their threads gone."""
    machines: list[CpuMachine] = []

    def make(**faults) -> CpuMachine:
        machines.append(CpuMachine(Faults(**faults)))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()
    assert not [item for item in threading.enumerate() if item.name.startswith("ltxlite-copy")]


def ones(nbytes: int = 63) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8)


def test_a_copy_is_over_when_its_mark_is_reached_and_not_before(made):
    machine = made(delay=lambda number: 0.02)
    target = torch.zeros(63, dtype=torch.uint8)
    mark = machine.copy(target, ones(), None)
    assert not target.any(), "the host goes on"
    machine.hold(mark)
    assert target.all()


def test_copies_are_done_in_the_order_that_is_picked_within_what_marks_allow(made):
    # The first takes a while, so that four wait behind it; then the newest that may begin is next.
    machine = made(pick=lambda waiting: waiting - 1, delay=lambda n: 0.05 if n == 0 else 0.0)
    target = torch.zeros(5, dtype=torch.uint8)
    marks = [machine.copy(torch.zeros(1), torch.zeros(1), None)]
    while machine._waiting:
        time.sleep(1e-3)
    values = [torch.full((5,), number, dtype=torch.uint8) for number in (1, 2, 3, 4)]
    places = [slice(0, 2), slice(0, 3), slice(2, 5), slice(2, 4)]
    for value, place in zip(values, places, strict=True):
        after = marks[3] if int(value[0]) == 4 else None
        marks.append(machine.copy(target[place], value[place], after))
    machine.drain()
    # 3 and its follower 4, then 2 over a part of them, then 1 over a part of that.
    assert target.tolist() == [1, 1, 2, 4, 3]


def test_poison_shows_who_reads_a_buffer_that_is_being_filled(made):
    machine = made(poison=True, delay=lambda number: 0.05)
    target = torch.zeros(4, dtype=torch.uint8)
    mark = machine.copy(target, ones(4), None)
    while not target.all():
        time.sleep(1e-3)
    assert target.view(torch.float32).isnan().all() and target.view(torch.bfloat16).isnan().all()
    machine.wait(mark)
    assert target.view(torch.float32).isfinite().all()


def test_a_failed_copy_is_over_and_says_so(made):
    machine = made(fail=lambda number: number == 1)
    target = torch.zeros(63, dtype=torch.uint8)
    first, second, third = (machine.copy(target, ones(), None) for _ in range(3))
    machine.drain()
    machine.wait(first), machine.wait(third)
    for wait in (machine.wait, machine.hold):
        with pytest.raises(RuntimeError, match="copy to the device failed"):
            wait(second)


def test_what_was_computed_is_reached(made):
    machine = made()
    machine.wait(machine.reached())


def test_refusals_are_of_the_kind_and_number_asked_for(made):
    machine = made(refuse=lambda kind, number: (kind, number) in {("host", 1), ("device", 3)})
    assert machine.host_buffer(65).shape == (65,)
    with pytest.raises(PinnedRefused, match="page-lock 2 MB more"):
        machine.host_buffer(2_000_000)
    assert machine.plain_buffer(0).dtype is torch.uint8
    with pytest.raises(BudgetError, match="no room for 3 MB of blocks in device memory"):
        machine.device_buffer(3_000_000)


def test_memory_that_does_not_exist_is_a_budget_error(made):
    for allocate in (made().device_buffer, made().host_buffer, made().plain_buffer):
        with pytest.raises(BudgetError, match="no room for"):
            allocate(1 << 55)


def test_buffers_made_under_inference_mode_can_be_written_to_by_other_threads(made):
    machine = made()
    with torch.inference_mode():
        target = machine.device_buffer(63)
        source = machine.host_buffer(63).fill_(7)
        machine.hold(machine.copy(target, source, None))
    assert (target == 7).all() and not target.is_inference()


class Runtime:
    """Stands in for the CUDA runtime: notes what is registered."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if self.code == 0:
            self.registered[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.registered[address]


@pytest.fixture
def runtime(monkeypatch):
    """A CUDA machine without CUDA, good for host memory alone."""

    def make(code: int) -> tuple[CudaMachine, Runtime]:
        fake = Runtime(code)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
        machine = object.__new__(CudaMachine)
        machine._device = torch.device("cpu")
        return machine, fake

    return make


@pytest.mark.parametrize("nbytes", [1, mmap.PAGESIZE - 1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 5])
def test_page_locked_buffers_are_whole_pages_of_their_own_until_they_die(runtime, nbytes):
    machine, fake = runtime(0)
    buffers = [machine.host_buffer(nbytes) for _ in range(5)]
    for buffer in buffers:
        assert buffer.shape == (nbytes,) and buffer.data_ptr() % mmap.PAGESIZE == 0
        locked = fake.registered[buffer.data_ptr()]
        assert nbytes <= locked < nbytes + mmap.PAGESIZE and locked % mmap.PAGESIZE == 0
    view = buffers[0][:1]
    del buffer, buffers
    assert list(fake.registered) == [view.data_ptr()], "as long as anything shows it"
    del view
    assert not fake.registered


def test_a_refusal_of_the_runtime_is_no_error_of_the_next_kernel(runtime, monkeypatch):
    launches = []

    def first_kernel(*size: int, device: torch.device) -> None:
        launches.append(device)
        raise RuntimeError("CUDA error: out of memory")

    machine, _ = runtime(2)
    monkeypatch.setattr(torch, "ones", first_kernel)
    with pytest.raises(PinnedRefused, match="refuses to page-lock 5 MB more"):
        machine.host_buffer(5_000_000)
    assert launches == [torch.device("cpu")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pinned_bytes", [None, 3 * 1024 * 1024 * 4, 0])
def test_blocks_streamed_to_a_gpu_give_the_bits_of_resident_ones(pinned_bytes):
    # 12 matrices of 4 MB; no tolerance: the same kernels on the same values.
    device = torch.device("cuda")
    machine = CudaMachine(device)
    blocks = [nn.Linear(1024, 1024, bias=False) for _ in range(12)]
    x = torch.randn(777, 1024, device=device)
    wanted = x
    for _ in range(5):
        for block in blocks:
            wanted = (wanted @ block.weight.detach().to(device).t()).tanh()
    placement = Placement(frozenset({4}), pinned_bytes=pinned_bytes)
    with Streamer(blocks, machine, placement) as streamer:
        for _ in range(5):
            for block in streamer.walk():
                x = block(x).tanh()
        assert torch.equal(x, wanted)
    machine.close()
