"""Decodes a quantized weight in one pass: packed blocks in, floating point rows out.

At LTX token counts this, followed by an ordinary matmul, beats a fused dequantizing matmul
(kernels/README.md). Twin: `ltxlite_quant.decode.dequantize`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels.configs import DEQUANT
from ltxlite_quant import decode
from ltxlite_quant.formats import BlockFormat, FormatError

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dequantize(
    blocks: Tensor,
    block_format: BlockFormat,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Decode the blocks of a tensor, on a GPU in one pass over memory.

    blocks: (rows, row_bytes) uint8, contiguous.  shape: logical (..., K) with `rows` rows.
    dtype: fp32, fp16 or bf16.  out: contiguous tensor of that shape and dtype, or None.
    The arithmetic is fp32 and rounds to `dtype` once.  Raises FormatError if anything disagrees.
    On a CPU the twin computes; on a GPU without Triton too, with a RuntimeWarning.
    """
    kernel = KERNELS.get(block_format.name)
    if kernel is None or not _runs(kernel, blocks):
        _warn_if_slow(block_format, blocks)
        return decode.dequantize(blocks, block_format, shape, dtype, out)
    decode.check_blocks(blocks, block_format, shape)
    _check_launch(block_format, blocks, dtype)
    out = decode.output_for(blocks, shape, dtype, out)
    _launch(kernel, block_format, blocks, out)
    return out


def _runs(kernel: Any, blocks: Tensor) -> bool:
    # Anything but a JITFunction is the Triton interpreter, which takes tensors on the CPU.
    return blocks.is_cuda or not isinstance(kernel, triton.JITFunction)


def _warn_if_slow(block_format: BlockFormat, blocks: Tensor) -> None:
    if blocks.is_cuda:
        reason = "it has no kernel yet" if HAVE_TRITON else "Triton is not installed"
        warnings.warn(
            f"{block_format.name} is decoded by plain torch, several times slower: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_launch(block_format: BlockFormat, blocks: Tensor, dtype: torch.dtype) -> None:
    if dtype not in OUTPUT_DTYPES:
        raise FormatError(f"the kernel decodes to fp32, fp16 or bf16, got {dtype}")
    if not blocks.is_contiguous():
        raise FormatError(f"blocks must be contiguous, got stride {blocks.stride()}")
    alignment = DEQUANT[block_format.name].alignment
    if blocks.data_ptr() % alignment:
        raise FormatError(
            f"{block_format.name} blocks must start at a multiple of {alignment} bytes, "
            f"got address {blocks.data_ptr():#x}"
        )


def _launch(kernel: Any, block_format: BlockFormat, blocks: Tensor, out: Tensor) -> None:
    count = blocks.numel() // block_format.block_bytes
    if count == 0:
        return
    config = DEQUANT[block_format.name]
    # Without fusion of d*q-m into one rounding, the kernel gives the bits of its twin.
    options = {"num_warps": config.warps, "enable_fp_fusion": False}
    grid = (triton.cdiv(count, config.blocks),)
    with torch.cuda.device_of(blocks):  # Triton launches on the current device
        kernel[grid](blocks, out, count, BLOCKS=config.blocks, **options)


_kernels: dict[str, Any] = {}

if HAVE_TRITON:

    @triton.jit
    def _q8_0_kernel(blocks, out, count, BLOCKS: tl.constexpr):  # noqa: N803
        # 34 bytes: scale fp16 @0, 32 int8 @2
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,)
        element = tl.arange(0, 32)  # (32,)
        mask_block = block < count
        mask = mask_block[:, None]
        start = blocks + block * 34
        scale = tl.load(start.to(tl.pointer_type(tl.float16)), mask=mask_block, other=0.0)
        codes_at = (start + 2)[:, None] + element[None, :]  # (BLOCKS, 32)
        codes = tl.load(codes_at.to(tl.pointer_type(tl.int8)), mask=mask, other=0)
        values = codes.to(tl.float32) * scale.to(tl.float32)[:, None]  # (BLOCKS, 32)
        offs_out = block[:, None] * 32 + element[None, :]
        tl.store(out + offs_out, values.to(out.dtype.element_ty), mask=mask)

    _kernels["Q8_0"] = _q8_0_kernel

KERNELS: Mapping[str, Any] = MappingProxyType(_kernels)
