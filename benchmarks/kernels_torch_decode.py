"""GGUF blocks to values by torch operations as ComfyUI-GGUF does it: what our kernels must beat.

Written anew from the description of its algorithm (formats.md 2, peers.md 2.5): whole tensors,
byte by byte, products in fp16 as by its default, one operation after the other. A decoder maps
(n, block_bytes) uint8 to (n, block_size) fp16; the caller rounds to bf16. MXFP4 and NVFP4 are not
among its formats. Nothing but torch is imported.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Decoder = Callable[[Tensor], Tensor]
# Values of the four-bit codes of IQ4_NL and IQ4_XS. Source: ggml-common.h (ggml d99724f).
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _halves(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _shifts(blocks: Tensor, bits: int, total: int = 8) -> Tensor:
    # Comes from the host at each call, as there: a copy that waits for pageable memory.
    shifts = torch.tensor(list(range(0, total, bits)), dtype=torch.uint8, device=blocks.device)
    return shifts[:, None]


def _split(packed: Tensor, width: int, bits: int) -> Tensor:
    """Cut bytes (n, b) into codes (n, b * 8 / bits / width, width), low parts first."""
    parts = packed.reshape(len(packed), -1, 1, width) >> _shifts(packed, bits)
    return (parts & (1 << bits) - 1).reshape(len(packed), -1, width)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Spread 32 bits in four bytes over (n, 32)."""
    words = packed.contiguous().view(torch.int32)
    shifts = torch.arange(32, dtype=torch.int32, device=packed.device)[None]
    return ((words >> shifts) & 1).to(torch.uint8)


def _nibbles(blocks: Tensor, at: int) -> Tensor:
    return _split(blocks[:, at : at + 16], 16, 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0) * (_nibbles(blocks, 2).to(torch.int8) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0) * _nibbles(blocks, 4) + _halves(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks, 6) | _fifth_bits(blocks[:, 2:6]) << 4
    return _halves(blocks, 0) * (codes.to(torch.int8) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks, 8) | _fifth_bits(blocks[:, 4:8]) << 4
    return _halves(blocks, 0) * codes + _halves(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    steps = (_halves(blocks, 80) * (scales & 15))[:, :, None]
    minimums = (_halves(blocks, 82) * (scales >> 4))[:, :, None]
    codes = _split(blocks[:, 16:80], 32, 2).view(len(blocks), 16, 16)
    return (steps * codes - minimums).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _split(blocks[:, 96:104], 8, 4).flatten(1)
    high = _split(blocks[:, 104:108], 4, 2).flatten(1)
    scales = (low | high << 4).to(torch.int8) - 32
    steps = (_halves(blocks, 108) * scales)[:, :, None]
    codes = _split(blocks[:, 32:96], 32, 2).view(len(blocks), 16, 16)
    bits = _split(blocks[:, :32], 32, 1).view(len(blocks), 16, 16)
    return (steps * (codes.to(torch.int8) - ((bits ^ 1) << 2).to(torch.int8))).flatten(1)


def _scales_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, (third & 15) | (first >> 2 & 48)], dim=1)
    minimums = torch.cat([second & 63, (third >> 4) | (second >> 2 & 48)], dim=1)
    return (
        (_halves(blocks, 0) * scales)[:, :, None],
        (_halves(blocks, 2) * minimums)[:, :, None],
    )


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_minimums(blocks)
    return (scales * _split(blocks[:, 16:], 32, 4) - minimums).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_minimums(blocks)
    codes = _split(blocks[:, 48:], 32, 4) | _split(blocks[:, 16:48], 32, 1) << 4
    return (scales * codes - minimums).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _split(blocks[:, :128], 64, 4).reshape(len(blocks), 8, 32)
    codes = (low | _split(blocks[:, 128:192], 32, 2) << 4).view(torch.int8) - 32
    scales = _halves(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return (scales[:, :, None] * codes.view(-1, 16, 16)).flatten(1)


def _iq4(codes: Tensor) -> Tensor:
    values = torch.tensor(_IQ4, dtype=torch.int8, device=codes.device)
    return values[codes.long()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0) * _iq4(_nibbles(blocks, 2))


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = _split(blocks[:, 4:8].reshape(len(blocks), 4), 1, 4).flatten(1)
    high = _split(blocks[:, 2:4].reshape(len(blocks), 2), 1, 2).flatten(1)
    scales = (low | high << 4).to(torch.int8) - 32
    steps = (_halves(blocks, 0) * scales)[:, :, None]
    codes = _split(blocks[:, 8:], 16, 4).view(len(blocks), 8, 32)
    return (steps * _iq4(codes)).flatten(1)


DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_NL": _iq4_nl,
        "IQ4_XS": _iq4_xs,
    }
)


def decoded(name: str, blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Decode blocks (rows, row_bytes) uint8 to bf16 (N, K)."""
    block_bytes = blocks.numel() // (shape[0] * shape[1] // _block_size(name))
    values = DECODERS[name](blocks.view(-1, block_bytes))
    return values.to(torch.bfloat16).view(shape)


def _block_size(name: str) -> int:
    return 256 if name.endswith(("_K", "_XS")) else 32
