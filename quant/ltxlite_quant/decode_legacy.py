"""Decoders of GGML's 32-element formats: a scale, perhaps a minimum, and the codes.

Source: formats.md 2.1, ggml d99724f.  All are (n, block_bytes) uint8 -> (n, 32) fp32.
A scale has 11 significant bits and a code at most 8, so their fp32 product is exact.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite_quant.decode_fields import field, halves, nibble_words, words


def _decode_q4_0(blocks: Tensor) -> Tensor:
    # 18 bytes: d fp16 @0, 32 nibbles @2
    codes = _codes(blocks, 2).view(torch.int8).sub_(8)
    return codes.float().mul_(halves(blocks, 0, 2))


def _decode_q4_1(blocks: Tensor) -> Tensor:
    # 20 bytes: d fp16 @0, m fp16 @2, 32 nibbles @4
    return _codes(blocks, 4).float().mul_(halves(blocks, 0, 2)).add_(halves(blocks, 2, 4))


def _decode_q5_0(blocks: Tensor) -> Tensor:
    # 22 bytes: d fp16 @0, 32 high bits @2, 32 nibbles @6
    codes = _codes(blocks, 6).bitwise_or_(_high_bits(blocks, 2))
    return codes.view(torch.int8).sub_(16).float().mul_(halves(blocks, 0, 2))


def _decode_q5_1(blocks: Tensor) -> Tensor:
    # 24 bytes: d fp16 @0, m fp16 @2, 32 high bits @4, 32 nibbles @8
    codes = _codes(blocks, 8).bitwise_or_(_high_bits(blocks, 4))
    return codes.float().mul_(halves(blocks, 0, 2)).add_(halves(blocks, 2, 4))


def _decode_q8_0(blocks: Tensor) -> Tensor:
    # 34 bytes: d fp16 @0, 32 int8 @2
    return blocks[:, 2:].view(torch.int8).float().mul_(halves(blocks, 0, 2))


def _codes(blocks: Tensor, start: int) -> Tensor:
    # (n, 32) uint8: byte j holds element j in its low nibble, element j + 16 in its high one
    return nibble_words(words(blocks, start, start + 16)).view(torch.uint8).view(-1, 32)


def _high_bits(blocks: Tensor, start: int) -> Tensor:
    # (n, 32) uint8, 0 or 16.  A table from a byte to its eight bits, in eight lanes of one number.
    numbers = torch.arange(256, dtype=torch.uint8, device=blocks.device)
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    table = (((numbers[:, None] >> bits) & 1) << 4).view(torch.int64).flatten()  # (256,)
    packed = field(blocks, start, start + 4).flatten().int()
    return table.index_select(0, packed).view(torch.uint8).view(-1, 32)


LEGACY_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "Q4_0": _decode_q4_0,
        "Q4_1": _decode_q4_1,
        "Q5_0": _decode_q5_0,
        "Q5_1": _decode_q5_1,
        "Q8_0": _decode_q8_0,
    }
)
