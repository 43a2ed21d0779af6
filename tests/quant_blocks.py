"""Random blocks of every GGML format, for the tests of decoders, containers and Linears."""

import numpy as np
import torch

from ltxlite_quant.formats import FORMATS

# Offsets of the fp16 fields of a block: the scale, then the minimum.
FP16_FIELDS = {
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
    "MXFP4": (),  # a power of two in a byte
    "NVFP4": (),  # E4M3 scales, of which all bytes are finite
}


def random_blocks(
    name: str, rows: int, blocks: int, seed: int = 0, extreme: bool = False
) -> torch.Tensor:
    """Random bytes with finite scales: (rows, blocks * block_bytes) uint8.

    extreme: scales of either sign from all of fp16, zeros and subnormal numbers among them, and of
    MXFP4 all exponents whose values are finite; otherwise scales around 2^-6.
    """
    count, rng = rows * blocks, np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, FORMATS[name].block_bytes), dtype=np.uint8)
    for offset in FP16_FIELDS[name]:
        bits = rng.integers(0, 1 << 16, count).astype("<u2")
        # Exponent 31 means infinity or NaN; the exponents 8 and 9 are 2^-7 and 2^-6.
        bits = np.where(bits >> 10 & 31 == 31, bits & 0x83FF, bits) if extreme else bits & 0x87FF
        bits = bits if extreme else bits | 8 << 10
        raw[:, offset : offset + 2] = bits.astype("<u2")[:, None].view(np.uint8)
    if name == "MXFP4":
        # 252: 12 * 2^(252 - 128) is the last power that fits fp32.
        raw[:, 0] = rng.integers(0, 253, count) if extreme else rng.integers(119, 123, count)
    return torch.from_numpy(raw).view(rows, -1)
