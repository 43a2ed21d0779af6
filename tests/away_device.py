"""A device that is not the CPU, on any machine: tensors that compute, and refuse the CPU's.

`meta` tensors have no values, so nothing that looks at one can run on them. These have: each wraps
a tensor of the CPU, claims the device `meta`, and mixes with nothing that was left behind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

AWAY = torch.device("meta")
_TRANSFERS = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class AwayTensor(Tensor):
    """A tensor that says it is elsewhere."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "AwayTensor":
        """Wrap a tensor of the CPU."""
        made: AwayTensor = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=AWAY,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _dispatched(func, args, kwargs or {})


class _Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _dispatched(func, args, kwargs or {})


def _dispatched(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = any(isinstance(x, AwayTensor) for x in tensors)
    left = any(x.ndim and not isinstance(x, AwayTensor) for x in tensors)
    if away and left and func not in _TRANSFERS:
        raise RuntimeError(f"{func}: tensors of two devices")
    named = kwargs.get("device")
    if named is not None:
        away = torch.device(named) == AWAY
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif func is torch.ops.aten.copy_.default:
        away = isinstance(args[0], AwayTensor)
    out = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if not away:
        return out
    wrapped = tree_map(lambda x: AwayTensor(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, tuple(args), dict(kwargs), wrapped)


def _unwrapped(value: Any) -> Any:
    return value.here if isinstance(value, AwayTensor) else value


@contextmanager
def elsewhere(patch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Give the device for a while: what is moved to it, or made on it, is there.

    Two things of torch want a device that they know: AdamW in one kernel, and autocast.
    """
    plain: Callable[..., torch.optim.AdamW] = torch.optim.AdamW
    patch.setattr(torch.optim, "AdamW", lambda given, fused, **rest: partial(plain, given)(**rest))
    patch.setattr(torch, "autocast", lambda *_: nullcontext())
    with _Elsewhere():
        yield AWAY
