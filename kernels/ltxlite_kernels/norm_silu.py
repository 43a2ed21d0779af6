"""Norms the channels at each place of a picture and applies SiLU, in one pass.

`spread` writes frames, activated or as they are, straight into what a convolution over three frames
reads: a frame is read once and written to the up to three windows that it belongs to, where root,
quotient, SiLU and copies apart move it twelve times.
Channels or columns lie side by side, on either side of a call: a program holds all channels of 16
or more neighbouring places, so where the sides differ it turns them in shared memory.
Twins: `reference_rows.norm_silu`, `reference_rows.spread`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import reference_rows
from ltxlite_kernels.configs import MOST_CHANNELS, norm_silu_places
from ltxlite_kernels.quantize import FLOATS, runs_kernel
from ltxlite_kernels.rotate import HAVE_TRITON
from ltxlite_quant.formats import FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl

STRIDES = tuple(
    [f"x_{of}" for of in ("batch", "frame", "channel", "row", "column")]
    + [f"out_{of}" for of in ("batch", "window", "slot", "channel", "row", "column")]
)
SLOTS = 3  # frames that a convolution sees at once


def norm_silu(x: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Scale the channels at each place to a root mean square of one, then apply SiLU.

    x: (B, F, C, Y, X) fp32, fp16 or bf16, C at most 2048; channels or columns side by side, other
    strides any.  out: the same shape and kind of strides, any of those types; it may be x itself;
    None for a new one, strides as those of x.
    Computes silu(x / √(mean x² + eps)) in fp32 and rounds once.
    Raises FormatError if anything does not fit.
    """
    out = torch.empty_like(x) if out is None else out
    for name, frames in (("x", x), ("out", out)):
        if not takes(frames) or frames.shape != x.shape:
            raise FormatError(f"{name} is {_WANTED}, got {_described(frames)}")
    torch.ops.ltxlite.spread.default(x, eps, out.unsqueeze(2), 0)
    return out


def spread(x: Tensor, windows: Tensor, first: int, eps: float | None = None) -> None:
    """Write frames into the windows of three neighbours that they belong to.

    x: (B, f, C, Y, X) as for `norm_silu`.  windows: (B, F, 3, C, Y, X) of those types, any strides;
    window w has frame w + s in slot s.  first: the number of the first frame of x, from 0 to F + 1.
    eps: of `norm_silu`, which is applied on the way; None leaves frames as they are.
    Raises FormatError if anything does not fit.
    """
    if not takes(x):
        raise FormatError(f"x is {_WANTED}, got {_described(x)}")
    sides = (*windows.shape[:1], *windows.shape[2:])
    if sides != (x.shape[0], SLOTS, *x.shape[2:]) or windows.dtype not in FLOATS:
        raise FormatError(
            f"windows of frames {tuple(x.shape)} are (B, F, {SLOTS}, C, Y, X) fp32, fp16 or bf16, "
            f"got {_described(windows)}"
        )
    torch.ops.ltxlite.spread.default(x, eps, windows, first)


_WANTED = (
    f"(B, F, C, Y, X) fp32, fp16 or bf16, at most {MOST_CHANNELS} channels, channels or columns "
    "side by side"
)


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}, stride {x.stride()}"


def takes(x: Tensor) -> bool:
    """Tell whether `norm_silu` and `spread` can work on frames of this shape, type and strides."""
    fits = x.dim() == 5 and x.dtype in FLOATS and 0 < x.shape[2] <= MOST_CHANNELS
    return fits and (1 in (x.stride(2), x.stride(4)) or x.shape[4] == 1)


def fuses(x: Tensor) -> bool:
    """Tell whether to use `spread`: on a card with Triton, where no gradients are recorded."""
    return HAVE_TRITON and x.is_cuda and not torch.is_grad_enabled() and takes(x)


def _spread_into(x: Tensor, eps: float | None, windows: Tensor, first: int) -> None:
    if not runs_kernel(x):
        reference_rows.spread(x, windows, first, eps)
        return
    batch, frames, channels, rows, columns = x.shape
    if not x.numel():
        return
    if _in_one_row(x) and _in_one_row(windows):
        rows, columns = 1, rows * columns
    given = constants(channels, windows.shape[2], eps is not None)
    grid = (triton.cdiv(columns, given["PLACES"]), rows, batch * frames)
    sizes = (channels, frames, columns, first, windows.shape[1])
    kernel: Any = _spread[grid]
    with torch.cuda.device_of(x):
        kernel(x, windows, *sizes, *x.stride(), *windows.stride(), eps or 0.0, **given)


def _in_one_row(x: Tensor) -> bool:
    """Tell whether the rows of a frame follow each other as the columns of a row do."""
    return x.shape[-2] == 1 or x.stride(-2) == x.shape[-1] * x.stride(-1)


def constants(channels: int, slots: int, active: bool) -> dict[str, Any]:
    """Return what the kernel is compiled for."""
    block, places = 1 << (channels - 1).bit_length(), norm_silu_places(channels)
    return {
        "BLOCK_C": block,
        "PLACES": places,
        "SLOTS": slots,
        "ACTIVE": active,
        "num_warps": min(16, max(4, block * places // 1024)),  # 32 values a thread
        "enable_fp_fusion": True,
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define("spread(Tensor x, float? eps, Tensor(a!) windows, int first) -> ()")
_library.impl("spread", _spread_into, "CompositeExplicitAutograd")
_library.impl("spread", lambda *_: None, "Meta")


if HAVE_TRITON:
    # Frames come one by one or in groups, anywhere among windows: one binary for all of them.
    @triton.jit(do_not_specialize=("frames", "first", "count"))
    def _spread(
        x,
        out,
        C,  # noqa: N803
        frames,
        X,  # noqa: N803
        first,
        count,
        x_batch,
        x_frame,
        x_channel,
        x_row,
        x_column,
        out_batch,
        out_window,
        out_slot,
        out_channel,
        out_row,
        out_column,
        eps,
        BLOCK_C: tl.constexpr,  # noqa: N803
        PLACES: tl.constexpr,  # noqa: N803
        SLOTS: tl.constexpr,  # noqa: N803
        ACTIVE: tl.constexpr,  # noqa: N803
    ):
        row, item = tl.program_id(1).to(tl.int64), tl.program_id(2)
        sample, frame = (item // frames).to(tl.int64), (item % frames).to(tl.int64)
        place = (tl.program_id(0) * PLACES + tl.arange(0, PLACES))[None, :]
        channel = tl.arange(0, BLOCK_C)[:, None]
        mask = (channel < C) & (place < X)
        channel, place = channel.to(tl.int64), place.to(tl.int64)
        at = x + sample * x_batch + frame * x_frame + row * x_row
        values = tl.load(at + channel * x_channel + place * x_column, mask=mask, other=0.0)
        if ACTIVE:
            values = values.to(tl.float32)
            scale = tl.rsqrt(tl.sum(values * values, 0) / C + eps)  # (PLACES,)
            values = values * scale[None, :]
            values = values * tl.sigmoid(values)
        values = values.to(out.dtype.element_ty)
        at = out + sample * out_batch + row * out_row
        at = at + channel * out_channel + place * out_column
        for slot in tl.static_range(SLOTS):
            window = first + frame - slot
            if (window >= 0) & (window < count):
                tl.store(at + window * out_window + slot * out_slot, values, mask=mask)
