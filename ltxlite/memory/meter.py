"""An account of activation memory at the level of tensor operations.

The allocator's own statistics exist only on CUDA and include caching; this account counts the
storages that operations create, on any device and for any code, so that two implementations can
be compared byte for byte.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


class ActivationMeter(TorchDispatchMode):
    """Counts the bytes of all storages created while it is active and still alive.

    What existed before (weights, inputs) is not counted, a view counts as the storage it shows,
    and a storage leaves the account when its last tensor dies. Scratch space that a kernel
    allocates for itself, below the dispatcher, is not seen.

        with ActivationMeter() as meter:
            output = network(given)
        meter.peak_bytes

    device: count only storages on this kind of device ("cpu", "cuda"); None counts all.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.current_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if torch.is_inference_mode_enabled():
            # Without autograd's keys a composite operation arrives whole; its parts must be seen.
            with self:
                result = func.decompose(*args, **named)
            if result is not NotImplemented:
                return result
        given = {id(storage) for storage in _storages((args, named))}
        result = func(*args, **named)
        for storage in _storages(result):
            if id(storage) in self._sizes:
                self._resize(id(storage), storage.nbytes())
            elif id(storage) not in given or func in _FRESH:
                self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        if self.device not in (None, storage.device.type):
            return
        key = id(storage)
        # The Python object lives exactly as long as the storage, however many tensors come and go.
        weakref.finalize(storage, self._release, key).atexit = False
        self._sizes[key] = 0
        self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        self.current_bytes += size - self._sizes[key]
        self._sizes[key] = size
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _release(self, key: int) -> None:
        self.current_bytes -= self._sizes.pop(key)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
