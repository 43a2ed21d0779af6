"""A block as one buffer: every parameter and buffer of a module side by side, and what fills it.

One buffer is one copy. The 120 or so tensors of a transformer block, copied one by one, would be
as many launches and allocations, 48 times a step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.memory.needed import lateness

# Vectorised loads and the tensor memory accelerator want 16 bytes, cuBLAS is fastest from there on;
# a multiple of 256 also keeps every field on its own lines and pages as torch's allocator would.
# It costs 120 x 128 bytes a block on average: 15 kB of 280 MB.
ALIGNMENT = 256
# What a thread brings at one go: large enough that opening a file costs nothing beside it (20 µs
# of 5 ms on an NVMe drive), small enough that several threads share a block and end promptly.
PORTION_BYTES = 16 << 20
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FileRange:
    """A tensor whose bytes stand in a file as they are in memory."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor within a buffer; `name` is its own within the module ("attention.to_q.weight")."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes it takes, contiguous."""
        return prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """Show this part of a buffer as the tensor."""
        part = buffer[self.offset : self.offset + self.nbytes]
        return part.view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where in one buffer each parameter and buffer of a module lies."""

    fields: tuple[Field, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes: where in the file, where in the buffer, how many."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FilePortion:
    """A part of a block that is read from a file."""

    path: Path
    spans: tuple[Span, ...]

    @property
    def begin(self) -> int:
        """Where in the buffer its first byte goes."""
        return min(span.target for span in self.spans)


@dataclass(frozen=True, slots=True, eq=False)
class TensorPortion:
    """A part of a block that is copied from ordinary memory, converted on load perhaps."""

    items: tuple[tuple[Field, Tensor], ...]

    @property
    def begin(self) -> int:
        """Where in the buffer its first byte goes."""
        return min(item.offset for item, _ in self.items)


Portion: TypeAlias = FilePortion | TensorPortion


class MovableModule:
    """A module whose tensors are, from `release` on, views of whatever buffer it is bound to.

    Between bindings it has tensors on `meta`: shapes without bytes. Calling it then raises
    RuntimeError; the tensors alone are no protection, since F.linear(x, weight on meta) returns
    uninitialised memory (torch 2.13).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        found = _tensors(module)
        for item in found:
            if item.tensor.is_meta:
                raise CheckpointError(f"{item.name} has no values; load weights before streaming")
        self.layout = _layout(found)
        self._places = [
            (registry, key, number)
            for number, item in enumerate(found)
            for registry, key in item.places
        ]
        self._is_parameter = [isinstance(item.tensor, nn.Parameter) for item in found]
        self._presence = _Presence()
        self._absent: tuple[Tensor, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Return the module's tensors of the moment, in the order of the layout's fields."""
        return list({number: registry[key] for registry, key, number in self._places}.values())

    def release(self) -> None:
        """Let go of the tensors the module came with, for good."""
        fields = self.layout.fields
        empty = (torch.empty(item.shape, dtype=item.dtype, device="meta") for item in fields)
        self._absent = self._wrapped(empty)
        self.module.register_forward_pre_hook(self._presence.require)
        self.unbind()

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Return the module's tensors as views of a buffer; making them takes about 10 µs each."""
        return self._wrapped(item.view(buffer) for item in self.layout.fields)

    def bind(self, views: Sequence[Tensor]) -> None:
        """Give the module tensors that `views` returned."""
        self._assign(views)
        self._presence.bound = True

    def unbind(self) -> None:
        """Leave the module without values."""
        self._assign(self._absent)
        self._presence.bound = False

    def _assign(self, tensors: Sequence[Tensor]) -> None:
        for registry, key, number in self._places:
            registry[key] = tensors[number]

    def _wrapped(self, tensors: Iterator[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            for tensor, is_parameter in zip(tensors, self._is_parameter, strict=True)
        )


@dataclass(slots=True)
class _Presence:
    # An object of its own: a hook that knew the MovableModule would tie a knot of references, and
    # the blocks of a network that is dropped would wait for the garbage collector.
    bound: bool = True

    def require(self, module: nn.Module, arguments: Any) -> None:
        if not self.bound:
            raise RuntimeError(
                f"a streamed {type(module).__name__} was called outside its turn of the walk, "
                "without its weights; iterate over the network's blocks instead of keeping one"
            )


def layout_of(module: nn.Module) -> Layout:
    """Lay out every parameter and buffer of a module; one that has several names comes once.

    The module may be on `meta`.  Raises ShapeError for tensors other than plain strided ones.
    """
    return _layout(_tensors(module))


def divide(block: MovableModule, origins: Mapping[str, FileRange]) -> tuple[Portion, ...]:
    """Divide the tensors that a module came with into portions for threads.

    origins: by field name.  A tensor that has none is copied, and so is one that is not
    contiguous: the file has its bytes in another order.  Raises ShapeError for an origin of no
    tensor or of another size.
    """
    fields = block.layout.fields
    if strangers := origins.keys() - {item.name for item in fields}:
        raise ShapeError(f"{min(strangers)}: the block has no tensor of that name to read")
    ranges: list[tuple[FileRange, Field]] = []
    kept: list[tuple[Field, Tensor]] = []
    for item, tensor in zip(fields, block.tensors(), strict=True):
        origin = origins.get(item.name) if tensor.is_contiguous() else None
        if origin is None:
            kept.append((item, tensor.detach()))
        elif origin.nbytes != item.nbytes:
            what = f"{item.nbytes} bytes, but {origin.nbytes} in {origin.path}"
            raise ShapeError(f"{item.name} takes {what}; only verbatim tensors have an origin")
        else:
            ranges.append((origin, item))
    copied = _grouped(kept, lambda pair: pair[0].nbytes)
    return (*_file_portions(ranges), *(TensorPortion(tuple(items)) for items in copied))


def whole(buffer: Tensor) -> tuple[Portion, ...]:
    """Divide a block that already lies in ordinary memory as it will in the buffer."""
    pieces = buffer.split(PORTION_BYTES)
    fields = (
        Field("", index * PORTION_BYTES, tuple(piece.shape), torch.uint8)
        for index, piece in enumerate(pieces)
    )
    return tuple(TensorPortion((pair,)) for pair in zip(fields, pieces, strict=True))


@dataclass(slots=True)
class _Found:
    name: str
    tensor: Tensor
    places: list[tuple[dict[str, Any], str]]


def _tensors(module: nn.Module) -> list[_Found]:
    found: dict[int, _Found] = {}
    for path, child in module.named_modules():
        for registry in (child._parameters, child._buffers):
            for key, tensor in registry.items():
                if tensor is not None:
                    name = f"{path}.{key}" if path else key
                    item = found.setdefault(id(tensor), _Found(name, tensor, []))
                    item.places.append((registry, key))
    for item in found.values():
        _check(item.name, item.tensor)
    late = lateness(module)
    return sorted(found.values(), key=lambda item: late.get(item.name, 0))


def _check(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        kind = f"a {type(tensor).__name__} of layout {tensor.layout}"
        raise ShapeError(f"{name}: only plain tensors can be streamed, got {kind}")


def _layout(found: Sequence[_Found]) -> Layout:
    fields, end = [], 0
    for item in found:
        fields.append(Field(item.name, end, tuple(item.tensor.shape), item.tensor.dtype))
        end += -(-fields[-1].nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(fields), end)


def _file_portions(ranges: Iterable[tuple[FileRange, Field]]) -> Iterator[FilePortion]:
    by_path: dict[Path, list[Span]] = {}
    for origin, item in sorted(ranges, key=lambda pair: pair[0].offset):
        spans = by_path.setdefault(origin.path, [])
        for start in range(0, item.nbytes, PORTION_BYTES):
            length = min(PORTION_BYTES, item.nbytes - start)
            spans.append(Span(origin.offset + start, item.offset + start, length))
    for path, spans in by_path.items():
        for group in _grouped(spans, lambda span: span.nbytes):
            yield FilePortion(path, tuple(group))


def _grouped(items: Iterable[_T], nbytes: Callable[[_T], int]) -> Iterator[list[_T]]:
    group: list[_T] = []
    total = 0
    for item in items:
        if group and total + nbytes(item) > PORTION_BYTES:
            yield group
            group, total = [], 0
        group.append(item)
        total += nbytes(item)
    if group:
        yield group
