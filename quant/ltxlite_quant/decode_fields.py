"""Reads the parts of blocks: what the decoders of several formats share.

Codes are taken apart four at a time, in 32-bit words whose bytes are separate lanes: a shift moves
bits across lanes, and the mask that follows removes them again.
"""

import torch
from torch import Tensor

LOW_NIBBLES = 0x0F0F0F0F
LOW_PAIRS = 0x03030303
LOW_BITS = 0x01010101


def field(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Copy bytes start to stop of every block.

    blocks: (n, block_bytes) uint8.  Returns (n, stop - start) uint8 at an address of its own, so
    that wider views of it are aligned wherever the blocks lie.
    """
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format)


def words(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Copy bytes start to stop of every block as words of four lanes: (n, (stop-start)/4) int32."""
    return field(blocks, start, stop).view(torch.int32)


def halves(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Return the fp16 numbers at bytes start to stop: (n, (stop - start) / 2) fp32."""
    return field(blocks, start, stop).view(torch.float16).float()


def nibble_words(packed: Tensor) -> Tensor:
    """Split words (n, ..., w) into their low and their high nibbles: (n, ..., 2, w) int32."""
    low = packed & LOW_NIBBLES
    return torch.stack([low, (packed >> 4).bitwise_and_(LOW_NIBBLES)], dim=-2)
