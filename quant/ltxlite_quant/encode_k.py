"""Codes and scales to blocks of the K-quants and of IQ4: what their decoders take apart.

Source: formats.md 2.2 and 2.3, ggml d99724f.  Codes are uint8, (n, 256 or 32), counted from 0;
scales are those of a search, whole numbers in fp32.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite_quant.search_plan import AffineScales, Scales


def _pack_q2_k(codes: Tensor, found: AffineScales) -> Tensor:
    both = torch.stack([found.scales, found.minimums], dim=1).to(torch.uint8)
    return torch.cat([_joined(both, 4), _pairs(codes), _half(found.d), _half(found.dmin)], dim=1)


def _pack_q3_k(codes: Tensor, found: Scales) -> Tensor:
    scales = (found.scales + 32).to(torch.uint8)
    packed = [_joined((scales & 15).view(-1, 2, 8), 4), _joined((scales >> 4).view(-1, 4, 4), 2)]
    return torch.cat([_bits(codes >> 2), _pairs(codes & 3), *packed, _half(found.d)], dim=1)


def _pack_q4_k(codes: Tensor, found: AffineScales) -> Tensor:
    return torch.cat([_head(found), _nibbles(codes)], dim=1)


def _pack_q5_k(codes: Tensor, found: AffineScales) -> Tensor:
    return torch.cat([_head(found), _bits(codes >> 4), _nibbles(codes & 15)], dim=1)


def _pack_q6_k(codes: Tensor, found: Scales) -> Tensor:
    low = _joined((codes & 15).view(-1, 2, 2, 64), 4)
    scales = found.scales.to(torch.int8).view(torch.uint8)
    return torch.cat([low, _pairs(codes >> 4), scales, _half(found.d)], dim=1)


def _pack_iq4_nl(codes: Tensor, found: Scales) -> Tensor:
    return torch.cat([_half(found.d), _joined(codes.view(-1, 2, 16), 4)], dim=1)


def _pack_iq4_xs(codes: Tensor, found: Scales) -> Tensor:
    scales = (found.scales + 32).to(torch.uint8)
    high = _joined((scales >> 4).view(-1, 2, 4).mT, 2)
    low = _joined((scales & 15).view(-1, 4, 2).mT, 4)
    return torch.cat([_half(found.d), high, low, _joined(codes.view(-1, 8, 2, 16), 4)], dim=1)


def _head(found: AffineScales) -> Tensor:
    # (n, 16): d, dmin, and six bits of eight scales and minimums.  The upper two bits of the last
    # four lie above the first four, their lower four are the nibbles of the last word.
    both = torch.stack([found.scales, found.minimums], dim=1).to(torch.uint8)  # (n, 2, 8)
    first, last = both[:, :, :4], both[:, :, 4:]
    six = (first | last >> 4 << 6).flatten(1)
    return torch.cat([_half(found.d), _half(found.dmin), six, _joined(last & 15, 4)], dim=1)


def _half(numbers: Tensor) -> Tensor:
    # (n,) -> (n, 2)
    return numbers.half()[:, None].view(torch.uint8)


def _bits(codes: Tensor) -> Tensor:
    # (n, 256) of 0 and 1 -> (n, 32): bit j of 32 bytes belongs to elements 32j to 32j + 31
    return _joined(codes.view(-1, 8, 32), 1)


def _pairs(codes: Tensor) -> Tensor:
    # (n, 256) of 0 to 3 -> (n, 64): bits 2g of 32 bytes are 32 neighbours, in each of two halves
    return _joined(codes.view(-1, 2, 4, 32), 2)


def _nibbles(codes: Tensor) -> Tensor:
    # (n, 256) of 0 to 15 -> (n, 128): 32 neighbours low, the next 32 high
    return _joined(codes.view(-1, 4, 2, 32), 4)


def _joined(parts: Tensor, bits: int) -> Tensor:
    # (n, ..., count, width) -> (n, bytes): part k takes the bits from bits * k
    joined = parts[..., 0, :].clone()
    for k in range(1, parts.shape[-2]):
        joined |= parts[..., k, :] << bits * k
    return joined.flatten(1)


AFFINE_PACKERS: Mapping[str, Callable[[Tensor, AffineScales], Tensor]] = MappingProxyType(
    {"Q2_K": _pack_q2_k, "Q4_K": _pack_q4_k, "Q5_K": _pack_q5_k}
)
SCALED_PACKERS: Mapping[str, Callable[[Tensor, Scales], Tensor]] = MappingProxyType(
    {
        "Q3_K": _pack_q3_k,
        "Q6_K": _pack_q6_k,
        "IQ4_NL": _pack_iq4_nl,
        "IQ4_XS": _pack_iq4_xs,
    }
)
