"""An account of activation memory at the level of tensor operations.

The allocator's own statistics exist only on CUDA and include caching; this account counts the
storages that operations create, on any device and for any code, so that two implementations can
be compared byte for byte. On the meta device it counts full-size networks that nothing computes:
there `meta` stands for the card, and what lies on `cpu` beside it for the host.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ltxlite.memory.recall import Recall

_FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
_LIBRARIES = str(Path(torch.__file__).parent.parent)


@dataclass(frozen=True, slots=True)
class Footprints:
    """What operations cost on a card beyond their results; functions of (result, *arguments).

    workspaces: bytes an operation needs while it runs; they raise the peak.
    libraries: the same where it is only assumed, as of cuBLAS and cuDNN; kept apart.
    fused: what to run instead of a composition whose parts a card never makes.
    """

    workspaces: Mapping[Any, Callable[..., int]] = field(default_factory=dict)
    libraries: Mapping[Any, Callable[..., int]] = field(default_factory=dict)
    fused: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Holder:
    """Memory that lived at the peak: what made it, how large, and where in the program."""

    operation: str
    shape: tuple[int, ...]
    nbytes: int
    where: str = ""

    def line(self) -> str:
        """Return it as text."""
        shape = "x".join(map(str, self.shape))
        return f"{self.nbytes / 2**20:9.1f} MiB  {shape:24} {self.operation:28} {self.where}"


class ActivationMeter(TorchDispatchMode):
    """Counts the bytes of all storages created while it is active and still alive.

    What existed before (weights, inputs) is not counted, a view counts as the storage it shows,
    and a storage leaves the account when its last tensor dies. Scratch space that a kernel
    allocates for itself, below the dispatcher, is what `footprints` says; nothing by default.

        with ActivationMeter() as meter:
            output = network(given)
        meter.peak_bytes

    device: count only storages on this kind of device ("cpu", "cuda", "meta"); None counts all.
    trace: remember where each storage was made, for `largest`.
    `footprints.fused` acts under inference mode only; elsewhere compositions arrive in parts.
    """

    def __init__(
        self, device: str | None = None, footprints: Footprints | None = None, trace: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.trace = device, trace
        self.footprints = footprints or Footprints()
        self.current_bytes = 0
        self.peak_bytes = 0
        self.library_bytes = 0  # the most that libraries are assumed to need at once
        self._alive: dict[int, Holder] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._at_peak: list[Holder] | None = []  # None: what is alive now
        self._whole: set[Any] = set()  # operations without parts
        self._views: set[Any] = set()  # those of them that make no memory
        self._recall = Recall()

    def restart(self) -> int:
        """Return the peak so far and begin another account with what is alive."""
        peak, self.peak_bytes = self.peak_bytes, self.current_bytes
        self._at_peak, self.library_bytes = None, 0
        return peak

    def largest(self, count: int = 10) -> list[Holder]:
        """Return the largest of what was alive at the peak."""
        alive = self._alive.values() if self._at_peak is None else self._at_peak
        return sorted(alive, key=lambda holder: -holder.nbytes)[:count]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func in self._views:
            return func(*args, **named)
        fused = self.footprints.fused.get(func)
        if fused is None and func not in self._whole and torch.is_inference_mode_enabled():
            # Without autograd's keys a composite operation arrives whole; its parts must be seen.
            with self:
                result = func.decompose(*args, **named)
            if result is not NotImplemented:
                return result
            self._whole.add(func)
            if _only_views(func):
                self._views.add(func)
        result, new = self._recall(func, fused or func, args, named)
        for tensor in _tensors(result):
            self._see(tensor, func, () if new else (args, named))
        self._add_footprint(func, result, args)
        return result

    def _see(self, tensor: Tensor, func: Any, given: tuple[Any, ...]) -> None:
        """Count a result, unless it shows the memory of something given."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            if self._alive[key].nbytes != storage.nbytes():
                self._hold(key, self._holder(tensor, func))
        elif self.device in (None, tensor.device.type) and (
            func in _FRESH or all(other is not storage for other in _storages(given))
        ):
            # The Python object lives as long as the storage, however many tensors come and go.
            self._references[key] = weakref.ref(storage, lambda _: self._release(key))
            self._hold(key, self._holder(tensor, func))

    def _holder(self, tensor: Tensor, func: Any) -> Holder:
        where = _caller(sys._getframe(3)) if self.trace else ""
        return Holder(str(func), tuple(tensor.shape), tensor.untyped_storage().nbytes(), where)

    def _hold(self, key: int, holder: Holder) -> None:
        before = self._alive.get(key)
        if before is not None and holder.nbytes < before.nbytes:
            self._keep_peak()
        self._alive[key] = holder
        self.current_bytes += holder.nbytes - (before.nbytes if before else 0)
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes, self._at_peak = self.current_bytes, None

    def _release(self, key: int) -> None:
        self._keep_peak()
        del self._references[key]
        self.current_bytes -= self._alive.pop(key).nbytes

    def _keep_peak(self) -> None:
        """Note what is alive before it changes, if this is the peak."""
        if self._at_peak is None:
            self._at_peak = list(self._alive.values())

    def _add_footprint(self, func: Any, result: Any, args: tuple[Any, ...]) -> None:
        if library := self.footprints.libraries.get(func):
            self.library_bytes = max(self.library_bytes, library(result, *args))
        if workspace := self.footprints.workspaces.get(func):
            needed = workspace(result, *args)
            if needed and self.current_bytes + needed > self.peak_bytes:
                self.peak_bytes = self.current_bytes + needed
                where = _caller(sys._getframe(2)) if self.trace else ""
                temporary = Holder(f"workspace of {func}", (), needed, where)
                self._at_peak = [*self._alive.values(), temporary]


def _only_views(func: Any) -> bool:
    aliases = [item.alias_info for item in func._schema.returns]
    shown = all(alias is not None and not alias.is_write for alias in aliases)
    return bool(aliases) and shown and func not in _FRESH


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in _tensors(tree):
        yield tensor.untyped_storage()


def _caller(frame: FrameType | None) -> str:
    """Name the innermost line that belongs to neither torch nor this file."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(_LIBRARIES) and not name.startswith("<"):
            return f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
