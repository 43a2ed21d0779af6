"""Decoders of GGML's formats whose 4-bit codes are indices into sixteen values.

Source: formats.md 2.3 and 2.4, ggml d99724f.  All are (n, block_bytes) uint8 -> (n, block_size)
fp32.  The products of a scale and a value are exact in fp32.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite_quant.decode_fields import field, halves, nibble_words, words

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# FP4 (E2M1) doubled, to be integers; the scales are halved.
FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _decode_iq4_nl(blocks: Tensor) -> Tensor:
    # 18 bytes: d fp16 @0, 32 nibbles @2
    values = _values(words(blocks, 2, 18), IQ4_VALUES)
    return values.view(-1, 32).mul_(halves(blocks, 0, 2))


def _decode_iq4_xs(blocks: Tensor) -> Tensor:
    # 136 bytes: d fp16 @0, 8 x 2 high @2 and 8 x 4 low bits @4 of the scales, 256 nibbles @8
    values = _values(words(blocks, 8, 136).view(-1, 8, 4), IQ4_VALUES)
    factors = _iq4_xs_scales(blocks) * halves(blocks, 0, 2)  # (n, 8)
    return values.view(-1, 8, 32).mul_(factors[:, :, None]).view(-1, 256)


def _decode_mxfp4(blocks: Tensor) -> Tensor:
    # 17 bytes: exponent @0, 32 nibbles @1
    values = _values(words(blocks, 1, 17), FP4_DOUBLED)
    return values.view(-1, 32).mul_(half_power_of_two(field(blocks, 0, 1)))


def _decode_nvfp4(blocks: Tensor) -> Tensor:
    # 36 bytes: 4 x unsigned E4M3 scale @0, 64 nibbles @4
    values = _values(words(blocks, 4, 36).view(-1, 4, 2), FP4_DOUBLED)
    scales = _half_e4m3(field(blocks, 0, 4))  # (n, 4)
    return values.view(-1, 4, 16).mul_(scales[:, :, None]).view(-1, 64)


def half_power_of_two(exponents: Tensor) -> Tensor:
    """Return 2^(e - 128) in fp32 for exponents e, uint8.  e = 0 and 1 give subnormal numbers."""
    wide = exponents.int()
    subnormal = 0x200000 << wide.clamp(max=1)
    return torch.where(wide < 2, subnormal, (wide - 1) << 23).view(torch.float32)


def _values(packed: Tensor, codebook: tuple[int, ...]) -> Tensor:
    table = torch.tensor(codebook, dtype=torch.float32, device=packed.device)
    codes = nibble_words(packed).view(torch.uint8).flatten().int()
    return table.index_select(0, codes)


def _iq4_xs_scales(blocks: Tensor) -> Tensor:
    # (n, 8) int8.  Scale j: nibble j of bytes 4 to 8, bits 2j of the 16-bit number at 2; minus 32.
    low, high = field(blocks, 4, 8), field(blocks, 2, 4)
    low = torch.stack([low & 15, low >> 4], dim=2).view(-1, 8)
    high = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).view(-1, 8)
    return (low | high << 4).view(torch.int8).sub_(32)


def _half_e4m3(scales: Tensor) -> Tensor:
    # E4M3 fits fp16's bit fields: seven bits left, and the bias differs by 8.  ggml ignores the
    # sign and reads 0x7F, but not 0xFF, as zero.
    bits = (scales.to(torch.int16) & 0x7F) << 7
    return (bits.view(torch.float16).float() * 128).masked_fill_(scales == 0x7F, 0)


CODEBOOK_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "IQ4_NL": _decode_iq4_nl,
        "IQ4_XS": _decode_iq4_xs,
        "MXFP4": _decode_mxfp4,
        "NVFP4": _decode_nvfp4,
    }
)
