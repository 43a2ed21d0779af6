"""Blocks to values, one decoder a format, in plain torch.

A decoder is the definition of its format: bit-exact to gguf-py in fp32, the path on machines
without Triton, and the twin (same signature, same bits) of the kernel in
`ltxlite_kernels.dequant`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite_quant.decode_codebook import CODEBOOK_DECODERS
from ltxlite_quant.decode_k import K_DECODERS
from ltxlite_quant.decode_legacy import LEGACY_DECODERS
from ltxlite_quant.formats import BlockFormat, FormatError, byte_shape

# Elements decoded at a time on a CPU: 512 KiB of fp32 and its codes stay in the second-level cache,
# which triples the speed over whole tensors; half as many would pay for calls (quant/README.md).
CPU_CHUNK_ELEMENTS = 1 << 17


def dequantize(
    blocks: Tensor,
    block_format: BlockFormat,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Decode the blocks of a tensor.

    blocks: (rows, row_bytes) uint8.  shape: logical (..., K) with `rows` rows.  dtype: floating.
    out: contiguous tensor of that shape and dtype to write into; a new one by default.
    The arithmetic is fp32 and rounds to `dtype` once.  Raises FormatError if anything disagrees.
    """
    decode = decoder_of(block_format)
    check_blocks(blocks, block_format, shape)
    out = output_for(blocks, shape, dtype, out)
    sources = blocks.reshape(-1, block_format.block_bytes)
    targets = out.view(-1, block_format.block_size)
    step = max(1, len(sources))
    if blocks.device.type == "cpu":
        step = CPU_CHUNK_ELEMENTS // block_format.block_size
    with torch.inference_mode():  # nothing here is recorded: 13 % less time a call
        for start in range(0, len(sources), step):
            targets[start : start + step].copy_(decode(sources[start : start + step]))
    return out


def decoder_of(block_format: BlockFormat) -> Callable[[Tensor], Tensor]:
    """Return the function (n, block_bytes) uint8 -> (n, block_size) fp32 of a format."""
    if block_format.name in DECODERS:
        return DECODERS[block_format.name]
    kind = "not decoded by ltxlite yet" if block_format.is_quantized else "plain, not quantized"
    raise FormatError(f"{block_format.name} is {kind}; decoders exist for {', '.join(DECODERS)}")


def check_blocks(blocks: Tensor, block_format: BlockFormat, shape: Sequence[int]) -> None:
    """Raise FormatError unless `blocks` is the (rows, row_bytes) uint8 matrix of such a tensor."""
    *rows, row_bytes = byte_shape(shape, block_format)
    wanted = (math.prod(rows), row_bytes)
    if blocks.dtype != torch.uint8 or tuple(blocks.shape) != wanted:
        raise FormatError(
            f"{block_format.name} blocks of a {tuple(shape)} tensor are uint8 {wanted}, "
            f"got {blocks.dtype} {tuple(blocks.shape)}"
        )


def output_for(
    blocks: Tensor, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """Return `out` if it can take the decoded tensor, or a new tensor if it is None."""
    if not dtype.is_floating_point:
        raise FormatError(f"blocks decode to a floating point dtype, got {dtype}")
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=blocks.device)
    fits = out.shape == torch.Size(shape) and out.dtype == dtype and out.device == blocks.device
    if not fits or not out.is_contiguous():
        raise FormatError(
            f"out must be contiguous {tuple(shape)} {dtype} on {blocks.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}, stride {out.stride()}"
        )
    return out


DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {**LEGACY_DECODERS, **K_DECODERS, **CODEBOOK_DECODERS}
)
