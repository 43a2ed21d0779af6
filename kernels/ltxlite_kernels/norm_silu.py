"""Norms the channels at each place of a picture and applies SiLU, in one pass.

Each frame before a convolution of the video VAE is read and written once, where root, quotient and
SiLU apart move it seven times. Planes lie as the convolutions have them, (C, Y, X) with columns
side by side: a program reads all channels of 16 or more neighbouring columns.
Twin: `reference_rows.norm_silu`.
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

STRIDES = ("batch", "frame", "channel", "row")  # of columns it is one


def norm_silu(x: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Scale the channels at each place to a root mean square of one, then apply SiLU.

    x: (B, F, C, Y, X) fp32, fp16 or bf16, C at most 2048; columns side by side, other strides any.
    out: the same shape and kind of strides, any of those types; it may be x itself; None for a new
    one.  Computes silu(x / √(mean x² + eps)) in fp32 and rounds once.
    Raises FormatError if anything does not fit.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    for name, frames in (("x", x), ("out", out)):
        if not takes(frames) or frames.shape != x.shape:
            raise FormatError(
                f"{name} is (B, F, C, Y, X) fp32, fp16 or bf16, at most {MOST_CHANNELS} channels, "
                f"columns side by side, got {tuple(frames.shape)} {frames.dtype}, "
                f"stride {frames.stride()}"
            )
    torch.ops.ltxlite.norm_silu.default(x, eps, out)
    return out


def takes(x: Tensor) -> bool:
    """Tell whether `norm_silu` can work on frames of this shape, type and strides."""
    fits = x.dim() == 5 and x.dtype in FLOATS and 0 < x.shape[2] <= MOST_CHANNELS
    return fits and (x.stride(4) == 1 or x.shape[4] == 1)


def fuses(x: Tensor) -> bool:
    """Tell whether to use `norm_silu`: on a card with Triton, where no gradients are recorded."""
    return HAVE_TRITON and x.is_cuda and not torch.is_grad_enabled() and takes(x)


def _norm_into(x: Tensor, eps: float, out: Tensor) -> None:
    if not runs_kernel(x):
        reference_rows.norm_silu(x, eps, out)
        return
    batch, frames, channels, rows, columns = x.shape
    if not x.numel():
        return
    if x.stride(3) == columns == out.stride(3):  # whole planes are side by side: one row
        rows, columns = 1, rows * columns
    given = constants(channels)
    grid = (triton.cdiv(columns, given["PLACES"]), rows, batch * frames)
    with torch.cuda.device_of(x):
        _norm_silu[grid](
            x, out, channels, frames, columns, *_strides(x), *_strides(out), eps, **given
        )


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    batch, frame, channel, row, _ = x.stride()
    return batch, frame, channel, row


def constants(channels: int) -> dict[str, Any]:
    """Return what the kernel is compiled for."""
    block, places = 1 << (channels - 1).bit_length(), norm_silu_places(channels)
    return {
        "BLOCK_C": block,
        "PLACES": places,
        "num_warps": min(16, max(4, block * places // 1024)),  # 32 values a thread
        "enable_fp_fusion": True,
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define("norm_silu(Tensor x, float eps, Tensor(a!) out) -> ()")
_library.impl("norm_silu", _norm_into, "CompositeExplicitAutograd")
_library.impl("norm_silu", lambda *_: None, "Meta")


if HAVE_TRITON:

    @triton.jit
    def _norm_silu(
        x,
        out,
        C,  # noqa: N803
        frames,
        X,  # noqa: N803
        x_batch,
        x_frame,
        x_channel,
        x_row,
        out_batch,
        out_frame,
        out_channel,
        out_row,
        eps,
        BLOCK_C: tl.constexpr,  # noqa: N803
        PLACES: tl.constexpr,  # noqa: N803
    ):
        row, item = tl.program_id(1).to(tl.int64), tl.program_id(2)
        sample, frame = (item // frames).to(tl.int64), (item % frames).to(tl.int64)
        place = (tl.program_id(0) * PLACES + tl.arange(0, PLACES))[None, :]
        channel = tl.arange(0, BLOCK_C)[:, None]
        mask = (channel < C) & (place < X)
        channel = channel.to(tl.int64)
        at = x + sample * x_batch + frame * x_frame + row * x_row
        values = tl.load(at + channel * x_channel + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 0) / C + eps)  # (PLACES,)
        values = values * scale[None, :]
        values = values * tl.sigmoid(values)
        at = out + sample * out_batch + frame * out_frame + row * out_row
        values = values.to(out.dtype.element_ty)
        tl.store(at + channel * out_channel + place, values, mask=mask)
