"""A streamer that gives its slots back between walks, and takes them again."""

import weakref
from itertools import islice
from pathlib import Path

import pytest
import torch
from stream_stack import layers, plain, run, write

from ltxlite.memory.arena import layout_of
from ltxlite.memory.machine import CpuMachine, Faults
from ltxlite.memory.stream import Placement, Streamer

COUNT = 6
SIZE = layout_of(layers(1)[0]).nbytes


@pytest.mark.parametrize("resident", [frozenset(), frozenset({1, 4}), frozenset(range(COUNT))])
@pytest.mark.parametrize("pinned", [None, 2 * SIZE, 0])
def test_walks_before_and_after_a_rest_have_the_bits_of_the_plain_stack(
    tmp_path: Path, resident: frozenset[int], pinned: int | None
) -> None:
    machine = CpuMachine(Faults(poison=True))
    blocks = layers(COUNT)
    origins = write(tmp_path / "file", blocks)
    with Streamer(blocks, machine, Placement(resident, 2, 1, pinned), origins) as streamer:
        for stop in (COUNT, 0, 3):  # after a whole walk, an empty one, one that was left
            run(islice(streamer.walk(), stop))
            streamer.rest()
            streamer.rest()
            assert torch.equal(run(streamer.walk()), plain(COUNT))
    machine.close()


def test_a_rest_frees_the_slots_and_nothing_else(tmp_path: Path) -> None:
    machine = CpuMachine()
    blocks = layers(COUNT)
    origins = write(tmp_path / "file", blocks)
    taken: list[weakref.ref[torch.UntypedStorage]] = []
    allocate = machine.device_buffer

    def watched(nbytes: int) -> torch.Tensor:
        buffer = allocate(nbytes)
        taken.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    machine.device_buffer = watched  # type: ignore[method-assign]
    with Streamer(blocks, machine, Placement(frozenset({2}), 2, 1), origins) as streamer:
        run(streamer.walk())
        assert sum(item() is not None for item in taken) == 3  # a resident block and two slots
        streamer.rest()
        assert sum(item() is not None for item in taken) == 1
        assert streamer.report.slots == 0 and streamer.report.resident == SIZE
        run(streamer.walk())
        assert streamer.report.slots == 2 * SIZE
    machine.close()


def test_no_rest_in_the_middle_of_a_walk(tmp_path: Path) -> None:
    machine = CpuMachine()
    blocks = layers(COUNT)
    with Streamer(blocks, machine, Placement(slots=2, prefetch=1)) as streamer:
        walk = streamer.walk()
        next(walk)
        with pytest.raises(RuntimeError, match="under way"):
            streamer.rest()
        walk.close()
        streamer.rest()
    streamer.rest()  # closed: nothing left to give
    machine.close()
