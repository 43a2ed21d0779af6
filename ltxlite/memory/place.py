"""Puts a loaded network where the plan wants it: blocks streamed or resident, the rest beside."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ltxlite.memory.arena import FileRange
from ltxlite.memory.machine import Machine
from ltxlite.memory.stream import Placement, Streamer


@dataclass(frozen=True, slots=True)
class FileMap:
    """A file that is mapped into memory: where, how long, which."""

    address: int
    nbytes: int
    path: Path


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Which parts of a network are not simply moved to the device.

    streamed: names of module lists that are walked from first to last.  host: names of modules
    that stay in ordinary memory, because little of them is read, or seldom.
    """

    streamed: tuple[str, ...] = ()
    host: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """The machine that blocks move on, where those of each component live, tokens of a chunk."""

    machine: Machine
    placements: Mapping[str, Placement] = field(default_factory=dict)
    chunk: int | None = None

    def of(self, component: str) -> Placement:
        """Return a component's placement; by default everything is streamed."""
        return self.placements.get(component, Placement())


class StreamedList(nn.ModuleList):
    """A list of blocks that are brought to the device one by one as it is iterated over."""

    def __init__(self, blocks: nn.ModuleList, streamer: Streamer) -> None:
        super().__init__(blocks)
        self.streamer = streamer
        # Threads and page-locked memory go with the network, whoever drops it.
        weakref.finalize(self, streamer.close)

    def __iter__(self) -> Iterator[nn.Module]:
        return self.streamer.walk()


def place(
    network: nn.Module,
    anatomy: Anatomy,
    device: torch.device,
    memory: Memory,
    placement: Placement,
    maps: Sequence[FileMap],
) -> None:
    """Move a network that was loaded on the CPU: its walked lists become streamed ones.

    maps: files that its tensors may lie in; what does is read from there, not from a copy.
    Raises BudgetError if memory runs out; the network is of no use then.
    """
    lists = {name: network.get_submodule(name) for name in anatomy.streamed}
    kept = [*lists.values(), *(network.get_submodule(name) for name in anatomy.host)]
    _move(network, device, {id(module) for module in kept})
    for name, blocks in lists.items():
        assert isinstance(blocks, nn.ModuleList)
        origins = [file_ranges(block, maps) for block in blocks]
        streamer = Streamer(list(blocks), memory.machine, placement, origins)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, StreamedList(blocks, streamer))


def rest(network: nn.Module) -> None:
    """Have a network give its slots back until it is used again."""
    for module in network.modules():
        if isinstance(module, StreamedList):
            module.streamer.rest()


def close(network: nn.Module) -> None:
    """Stop the streams of a network and free their memory; a plain network has none."""
    for module in network.modules():
        if isinstance(module, StreamedList):
            module.streamer.close()


def file_ranges(module: nn.Module, maps: Sequence[FileMap]) -> dict[str, FileRange]:
    """Return where in a file each parameter and buffer stands that was not changed on loading."""
    found = {}
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if (origin := _range(value, maps)) is not None:
            found[name] = origin
    return found


def _range(value: Tensor, maps: Sequence[FileMap]) -> FileRange | None:
    if value.device.type != "cpu" or not value.is_contiguous() or not value.nbytes:
        return None
    address = value.data_ptr()
    for item in maps:
        if item.address <= address and address + value.nbytes <= item.address + item.nbytes:
            return FileRange(item.path, address - item.address, value.nbytes)
    return None


def _move(module: nn.Module, device: torch.device, kept: set[int]) -> None:
    if id(module) in kept:
        return
    for name, parameter in module.named_parameters(recurse=False):
        moved = nn.Parameter(parameter.to(device), requires_grad=parameter.requires_grad)
        module.register_parameter(name, moved)
    for name, buffer in module.named_buffers(recurse=False):
        module.register_buffer(name, buffer.to(device))
    for child in module.children():
        _move(child, device, kept)
