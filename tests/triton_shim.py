"""Makes Triton's interpreter trustworthy: bf16 and fp8 arithmetic, and what a sanitizer would find.

The stock interpreter computes with the bits of bf16 as integers, truncates fp32 to bf16 and gets
fp8 casts wrong by up to a factor of two (triton 3.6 and 3.9; triton-lang/triton#11584). Here such
values are widened to fp32, computed and rounded to nearest even, fp8 saturating as PTX does.
Loads and stores are checked: every address must lie in an argument, aligned to its width, and no
two programs may store to one address.
Import it, with TRITON_INTERPRET=1 set before Triton is imported, and call `install()`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Array = np.ndarray[Any, Any]
FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


class AccessError(AssertionError):
    """A load or store that a card would have answered with garbage, a fault or a race."""


class _Accesses:
    """The argument ranges of the running launch, and who stored where."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.stores: dict[object, list[Array]] = {}

    def begin(self, values: list[object]) -> None:
        self.ranges, self.stores = [], {}
        for value in values:
            tensor = getattr(value, "base", value)
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                pairs = zip(tensor.shape, tensor.stride(), strict=True)
                last = sum((size - 1) * step for size, step in pairs)
                first = tensor.data_ptr()
                self.ranges.append((first, first + (last + 1) * tensor.element_size()))

    def check(self, kind: str, pointers: Any, mask: Any, program: object) -> Array:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        inside = np.zeros(addresses.shape, bool)
        for first, end in self.ranges:
            inside |= (addresses >= first) & (addresses + np.uint64(width) <= end)
        if not inside.all():
            raise AccessError(
                f"{kind}: {int((~inside).sum())} of {addresses.size} addresses lie outside of "
                f"every argument, program {program}"
            )
        if (addresses % np.uint64(width)).any():
            raise AccessError(f"{kind}: misaligned access of {width} bytes, program {program}")
        return addresses

    def store(self, addresses: Array, program: object) -> None:
        for other, earlier in self.stores.items():
            if other != program and any(np.isin(addresses, one).any() for one in earlier):
                raise AccessError(f"programs {other} and {program} race")
        self.stores.setdefault(program, []).append(np.unique(addresses))


def widened(handle: Any) -> Array:
    """Return the values of a handle, bf16 and fp8 as fp32."""
    kind, data = handle.dtype.scalar, np.ascontiguousarray(handle.data)
    if kind == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    if kind in FP8:
        return torch.from_numpy(data).view(FP8[kind]).float().numpy()
    return handle.data


def narrowed(values: Array, kind: Any) -> Array:
    """Round values to the bits of a type, to nearest even."""
    if kind == tl.bfloat16:
        rounded = torch.from_numpy(np.array(values, np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    if kind in FP8:
        limit = torch.finfo(FP8[kind]).max
        exact = torch.from_numpy(np.array(values, np.float32)).clamp(-limit, limit)
        return exact.to(FP8[kind]).view(torch.uint8).numpy()
    return values.astype(interpreter._get_np_dtype(kind))


def _is_narrow(kind: Any) -> bool:
    return kind == tl.bfloat16 or kind in FP8


def install() -> None:
    """Patch the interpreter of this process; a second call does nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "ltxlite_shim", False):
        return
    builder.ltxlite_shim = True
    _patch_casts(builder)
    for name in ("binary_op", "unary_op", "ternary_op"):
        _patch_arithmetic(builder, name)
    _patch_dot(builder)
    _patch_accesses(builder, _Accesses())
    _patch_index()
    builder.get_bf16 = lambda self, value: interpreter.TensorHandle(
        narrowed(np.array([value], np.float32), tl.bfloat16), tl.bfloat16
    )


def _patch_casts(builder: Any) -> None:
    plain = builder.cast_impl

    def cast(self: Any, source: Any, wanted: Any, *_: Any) -> Any:
        given, target = source.dtype.scalar, wanted.scalar
        if given == target:
            return source
        if not (_is_narrow(given) or _is_narrow(target)):
            return plain(self, source, wanted)
        values = np.asarray(widened(source), np.float32)
        return interpreter.TensorHandle(narrowed(values, target), target)

    builder.cast_impl = builder.create_fp_to_fp = cast


def _patch_arithmetic(builder: Any, name: str) -> None:
    plain = getattr(builder, name)

    def compute(self: Any, *given: Any) -> Any:
        *operands, operation = given
        kind = operands[-1].dtype.scalar
        if not _is_narrow(kind) or operation is np.where:
            return plain(self, *given)
        out = operation(*(widened(item) for item in operands))
        bits = out if out.dtype == np.bool_ else narrowed(out, kind)
        return interpreter.TensorHandle(bits, kind)

    setattr(builder, name, compute)


def _patch_dot(builder: Any) -> None:
    def dot(self: Any, a: Any, b: Any, c: Any, *_: Any) -> Any:
        left, right, kind = widened(a), widened(b), c.dtype.scalar
        if left.dtype == np.int8:
            # BLAS is 30 times faster than integers: exact in fp32 below 2^24, else in fp64.
            wide = np.float32 if left.shape[-1] * 127 * 128 < 1 << 24 else np.float64
            product = np.matmul(left.astype(wide), right.astype(wide)).astype(np.int32)
            return interpreter.TensorHandle(product + c.data, kind)
        product = np.matmul(np.asarray(left, np.float32), np.asarray(right, np.float32))
        total = product + np.asarray(c.data, np.float32)
        return interpreter.TensorHandle(narrowed(total, kind), kind)

    builder.create_dot = dot


def _patch_accesses(builder: Any, accesses: _Accesses) -> None:
    executor = interpreter.GridExecutor
    begin, load, store = (
        executor._init_args_hst,
        builder.create_masked_load,
        builder.create_masked_store,
    )

    def init(self: Any, args: Any, kwargs: Any) -> Any:
        found = begin(self, args, kwargs)
        values = [*found[0], *found[1].values()]
        accesses.begin([x for v in values for x in (v if isinstance(v, tuple) else (v,))])
        return found

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        accesses.check("load", pointers, mask, self.grid_idx)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *a: Any, **k: Any) -> Any:
        accesses.store(accesses.check("store", pointers, mask, self.grid_idx), self.grid_idx)
        return store(self, pointers, value, mask, *a, **k)

    executor._init_args_hst = init
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def _patch_index() -> None:
    # triton 3.6 with numpy 2.4: int() of an array of one element raises.
    plain: Callable[..., Any] = interpreter._patch_lang_tensor

    def patch(*given: Any) -> Any:
        found = plain(*given)

        def index(self: Any) -> int:
            return int(self.handle.data.reshape(-1)[0])

        if len(given) == 2 and hasattr(given[1], "set_attr"):
            given[1].set_attr(given[0], "__index__", index)
        else:
            given[0].__index__ = index
        return found

    interpreter._patch_lang_tensor = patch
