"""Decoders of GGML's K-quants: 256 elements in sub-blocks, whose scales are quantized too.

Source: formats.md 2.2, ggml d99724f.  All are (n, block_bytes) uint8 -> (n, 256) fp32.
value = (d * scale) * code - dmin * minimum.  Both products have at most 24 significant bits (11 of
d, 4 to 8 of the scale, 2 to 6 of the code), so fp32 holds them exactly; the difference is rounded.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite_quant.decode_fields import (
    LOW_BITS,
    LOW_NIBBLES,
    LOW_PAIRS,
    field,
    halves,
    nibble_words,
    words,
)


def _decode_q2_k(blocks: Tensor) -> Tensor:
    # 84 bytes: 16 x (scale low, minimum high nibble) @0, 256 pairs @16, d fp16 @80, dmin fp16 @82
    both = words(blocks, 0, 16)
    scales = _lanes(both & LOW_NIBBLES) * halves(blocks, 80, 82)  # (n, 16)
    minimums = _lanes((both >> 4) & LOW_NIBBLES) * halves(blocks, 82, 84)
    return _affine(_pairs(blocks, 16), scales, minimums)


def _decode_q3_k(blocks: Tensor) -> Tensor:
    # 110 bytes: 256 high bits @0, 256 pairs @32, 16 x 6-bit scale @96, d fp16 @108
    high = words(blocks, 104, 108)
    high = torch.cat([high << 4, high << 2, high, high >> 2], dim=1) & (LOW_PAIRS << 4)
    scales = nibble_words(words(blocks, 96, 104)).view(-1, 4) | high
    factors = _lanes(scales).view(torch.int8).sub_(32) * halves(blocks, 108, 110)  # (n, 16)
    codes = _pairs(blocks, 32).add_(_bits(blocks, 0), alpha=4)
    # The code counts from -4, and the high bit means +4.
    return _scaled(_lanes(codes).view(torch.int8).sub_(4), factors)


def _decode_q4_k(blocks: Tensor) -> Tensor:
    # 144 bytes: d fp16 @0, dmin fp16 @2, 8 x 6-bit (scale, minimum) @4, 256 nibbles @16
    return _affine(nibble_words(words(blocks, 16, 144).view(-1, 4, 8)), *_scales_minimums(blocks))


def _decode_q5_k(blocks: Tensor) -> Tensor:
    # 176 bytes: as Q4_K to 16, then 256 high bits @16, 256 nibbles @48
    codes = nibble_words(words(blocks, 48, 176).view(-1, 4, 8)).view(-1, 64)
    return _affine(codes.add_(_bits(blocks, 16), alpha=16), *_scales_minimums(blocks))


def _decode_q6_k(blocks: Tensor) -> Tensor:
    # 210 bytes: 256 nibbles @0, 256 pairs @128, 16 x int8 scale @192, d fp16 @208
    codes = nibble_words(words(blocks, 0, 128).view(-1, 2, 16)).view(-1, 64)
    codes = codes.add_(_pairs(blocks, 128), alpha=16)
    factors = field(blocks, 192, 208).view(torch.int8) * halves(blocks, 208, 210)  # (n, 16)
    return _scaled(_lanes(codes).view(torch.int8).sub_(32), factors)


def _scaled(codes: Tensor, factors: Tensor) -> Tensor:
    # codes (n, 256), factors (n, s) fp32: one for every 256 / s codes
    values = codes.float().view(*factors.shape, -1)
    return values.mul_(factors[:, :, None]).view(-1, 256)


def _affine(codes: Tensor, scales: Tensor, minimums: Tensor) -> Tensor:
    # codes (n, ...) int32 of four lanes, scales and minimums (n, s) fp32
    values = _scaled(_lanes(codes).view(-1, 256), scales).view(*minimums.shape, -1)
    return values.sub_(minimums[:, :, None]).view(-1, 256)


def _lanes(packed: Tensor) -> Tensor:
    # (n, ..., w) int32 -> (n, lanes) uint8
    return packed.view(torch.uint8).view(len(packed), -1)


def _pairs(blocks: Tensor, start: int) -> Tensor:
    # (n, 64) int32: bits 2g of 32 bytes are 32 neighbouring elements, in each of two halves.
    # Doubling twice takes five operations where one a shift would take nine.
    packed = words(blocks, start, start + 64).view(-1, 2, 8)
    packed = torch.stack([packed, packed >> 2], dim=2)  # (n, 2, 2, 8)
    packed = torch.stack([packed, packed >> 4], dim=2)  # (n, 2, 2, 2, 8)
    return packed.bitwise_and_(LOW_PAIRS).view(-1, 64)


def _bits(blocks: Tensor, start: int) -> Tensor:
    # (n, 64) int32: bit j of 32 bytes belongs to elements 32j to 32j + 31
    packed = words(blocks, start, start + 32)
    for shift in (1, 2, 4):
        packed = torch.stack([packed, packed >> shift], dim=1)
    return packed.bitwise_and_(LOW_BITS).view(-1, 64)


def _scales_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    # Bytes 0 to 16 -> d * scale and dmin * minimum, (n, 8) each.  The first four scales and
    # minimums are the low six bits of their words; the upper two belong to the last four, whose
    # low four bits are the nibbles of the third word.
    packed = words(blocks, 4, 16).T.contiguous()  # long rows: 30 % faster than columns
    first, third = packed[:2], packed[2:]
    last = torch.cat([third, third >> 4]).bitwise_and_(LOW_NIBBLES)
    last |= (first >> 2).bitwise_and_(LOW_PAIRS << 4)
    codes = torch.stack([first & (LOW_NIBBLES | LOW_PAIRS << 4), last], dim=2)  # (2, n, 2)
    both = codes.view(torch.uint8) * halves(blocks, 0, 4).T[:, :, None]  # (2, n, 8)
    return both[0], both[1]


K_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "Q2_K": _decode_q2_k,
        "Q3_K": _decode_q3_k,
        "Q4_K": _decode_q4_k,
        "Q5_K": _decode_q5_k,
        "Q6_K": _decode_q6_k,
    }
)
