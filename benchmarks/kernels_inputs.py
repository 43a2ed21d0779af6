"""Random weights and activations for kernels, made on the card."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from benchmarks.kernels_run import Bench
from ltxlite_kernels.rotate import Rotation, matrix, signs
from ltxlite_quant import decode
from ltxlite_quant.formats import FORMATS

# Offsets of a block's fp16 scales and minimums; random bytes elsewhere are good codes.
_HALVES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "Q4_0": (0,),
        "Q4_1": (0, 2),
        "Q5_0": (0,),
        "Q5_1": (0, 2),
        "Q8_0": (0,),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
        "IQ4_NL": (0,),
        "IQ4_XS": (0,),
    }
)


def random_blocks(bench: Bench, name: str, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return blocks (N, row_bytes) uint8 of random codes with scales around 2^-6."""
    form = FORMATS[name]
    generator = torch.Generator(bench.device).manual_seed(seed)
    count = shape[0] * shape[1] // form.block_size

    def drawn(least: int, most: int, *size: int) -> Tensor:
        bytes_ = torch.empty(size, dtype=torch.uint8, device=bench.device)
        return bytes_.random_(least, most, generator=generator)

    blocks = drawn(0, 256, count, form.block_bytes)
    for at in _HALVES.get(name, ()):
        high = blocks[:, at + 1]
        high &= 0x87  # a sign and the exponents 8 and 9
        high |= 0x20
    if name == "MXFP4":
        blocks[:, 0] = drawn(119, 123, count)
    return blocks.view(shape[0], -1)


def calm_q4_k(bench: Bench, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return Q4_K blocks of a weight that keeps activations as large as they are.

    All scales and minimums of parts are 32, so values are d·32·(code - 7.5), uniform, with a
    standard deviation of 1/√K.
    """
    blocks = random_blocks(bench, "Q4_K", shape, seed).view(-1, FORMATS["Q4_K"].block_bytes)
    step = shape[1] ** -0.5 / (32 * 4.61)  # 4.61: of codes 0 to 15
    blocks[:, :4] = (
        torch.tensor([step, 7.5 * step], dtype=torch.float16).view(torch.uint8).to(bench.device)
    )
    blocks[:, 4:12], blocks[:, 12:16] = 0xA0, 0  # 32, and 32 again in the pairs of high bits
    return blocks.view(shape[0], -1)


def exact(name: str, blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the values of blocks in float64; they are exact in fp32."""
    return decode.dequantize(blocks, FORMATS[name], shape, torch.float32).double()


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """Return rows (R, K) turned along K, in float64."""
    if not rotation:
        return x.double()
    size = int(rotation)
    if rotation is Rotation.SIGNS_128:
        x = x.double() * signs(x.shape[1], x.device).double()
    turn = matrix(rotation, x.device).double() / size**0.5
    groups: Tensor = x.double().unflatten(-1, (-1, size)) @ turn
    return groups.flatten(-2)
