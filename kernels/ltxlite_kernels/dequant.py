"""Decodes a quantized weight in one pass: packed blocks in, floating point rows out.

At LTX token counts this, followed by an ordinary matmul, beats a fused dequantizing matmul
(kernels/README.md). Twin: `ltxlite_quant.decode.dequantize`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels.configs import DEQUANT
from ltxlite_quant import decode
from ltxlite_quant.formats import FORMATS, BlockFormat, FormatError

try:
    import triton
    import triton.language as tl

    from ltxlite_kernels import unpack

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where the twin decodes on a GPU: elements at a time, and bytes of temporaries for each, of the
# hungriest format (K-quants need 6). 4 Mi elements keep a card busy at 36 MiB; the scratch of
# `ltxlite.linear`, decoded at once, would need 144.
PIECE_ELEMENTS = 1 << 22
PIECE_BYTES_PER_ELEMENT = 9


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
    decode.decoder_of(block_format)
    decode.check_blocks(blocks, block_format, shape)
    out = decode.output_for(blocks, shape, dtype, out)
    torch.ops.ltxlite.dequantize.default(blocks, block_format.name, out)
    return out


def decode_into(blocks: Tensor, name: str, out: Tensor) -> None:
    """Decode checked blocks of the format `name` into `out`: what the operator runs (`ops`)."""
    block_format, unpacker = FORMATS[name], KERNELS.get(name)
    if unpacker is not None and _runs(unpacker, blocks):
        _check_launch(block_format, blocks, out.dtype)
        _launch(unpacker, block_format, blocks, out)
        return
    _warn_if_slow(block_format, blocks)
    for rows in _pieces(blocks, out):
        part = out.view(len(blocks), -1)[rows]
        decode.dequantize(blocks[rows], block_format, part.shape, out.dtype, part)


def _pieces(blocks: Tensor, out: Tensor) -> Iterator[slice]:
    """Cut rows for the twin; on a CPU it cuts by itself."""
    step = len(blocks)
    if blocks.is_cuda:
        step = max(1, PIECE_ELEMENTS * step // max(1, out.numel()))
    for start in range(0, len(blocks), max(1, step)):
        yield slice(start, start + step)


def _runs(unpacker: Any, blocks: Tensor) -> bool:
    # Anything but a JITFunction is the Triton interpreter, which takes tensors on the CPU.
    return blocks.is_cuda or not isinstance(unpacker, triton.JITFunction)


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


def _launch(unpacker: Any, block_format: BlockFormat, blocks: Tensor, out: Tensor) -> None:
    count = blocks.numel() // block_format.block_bytes
    if count == 0:
        return
    config = DEQUANT[block_format.name]
    sizes = {"BYTES": block_format.block_bytes, "SIZE": block_format.block_size}
    # Without fusion of d*q-m into one rounding, the kernel gives the bits of its twin.
    options = {"num_warps": config.warps, "enable_fp_fusion": False}
    grid = (triton.cdiv(count, config.blocks),)
    with torch.cuda.device_of(blocks):  # Triton launches on the current device
        _kernel[grid](blocks, out, count, UNPACK=unpacker, BLOCKS=config.blocks, **sizes, **options)


_kernels: dict[str, Any] = {}

if HAVE_TRITON:

    @triton.jit
    def _kernel(
        blocks,
        out,
        count,
        UNPACK: tl.constexpr,  # noqa: N803
        BYTES: tl.constexpr,  # noqa: N803
        SIZE: tl.constexpr,  # noqa: N803
        BLOCKS: tl.constexpr,  # noqa: N803
    ):
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,)
        mask = block < count
        values = UNPACK(blocks + block * BYTES, mask)  # (BLOCKS, SIZE) fp32
        offs_out = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        tl.store(out + offs_out, values.to(out.dtype.element_ty), mask=mask[:, None])

    _kernels = {name: getattr(unpack, name.lower()) for name in DEQUANT}

KERNELS: Mapping[str, Any] = MappingProxyType(_kernels)
