"""Values to blocks, by the reference quantizers: their bytes equal gguf-py's."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite_quant.decode_codebook import FP4_DOUBLED, half_power_of_two
from ltxlite_quant.formats import BlockFormat, FormatError, byte_shape
from ltxlite_quant.tensor import QuantTensor

# Elements quantized at a time on a CPU: 512 KiB of fp32 and a few temporaries of the same size stay
# near the core, which makes it twice as fast as whole tensors, Q8_0 four times.
CPU_CHUNK_ELEMENTS = 1 << 17
FP16_MAX = 65504


def quantize(values: Tensor, block_format: BlockFormat) -> QuantTensor:
    """Quantize a tensor.

    values: (..., K) of any floating dtype, computed on in fp32.  Blocks stay on its device.
    Raises FormatError if K is not a whole number of blocks, if a value is not finite, or if a
    block's scale or minimum exceeds fp16.
    """
    encode = ENCODERS.get(block_format.name)
    if encode is None:
        raise FormatError(
            f"ltxlite cannot quantize to {block_format.name}; choose {', '.join(ENCODERS)}"
        )
    row_bytes = byte_shape(values.shape, block_format)[-1]
    sources = values.detach().reshape(-1, block_format.block_size)
    blocks = sources.new_empty(len(sources), block_format.block_bytes, dtype=torch.uint8)
    step = max(1, len(sources))
    if values.device.type == "cpu":
        step = CPU_CHUNK_ELEMENTS // block_format.block_size
    for start in range(0, len(sources), step):
        blocks[start : start + step] = encode(sources[start : start + step].float())
    return QuantTensor(blocks.view(-1, row_bytes), block_format, tuple(values.shape))


def _encode_signed(values: Tensor, levels: int, name: str) -> Tensor:
    # Q4_0 and Q5_0: the largest value, with its sign, takes the code 0, which means -levels.
    scale = _signed_largest(values) / -levels  # (n, 1)
    stored = _fp16_bytes([scale], name, FP16_MAX * levels)
    # The codes use the scale as it was before rounding to fp16, like the reference.
    codes = (values * _inverse(scale)).add_(levels + 0.5)
    return torch.cat([*stored, *_packed_codes(codes, levels)], dim=1)


def _encode_affine(values: Tensor, levels: int, name: str) -> Tensor:
    # Q4_1 and Q5_1: codes 0 to 2 * levels - 1 from the smallest value to the largest.
    largest, smallest = values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True)  # (n, 1)
    scale = _divided(largest - smallest, 2 * levels - 1)
    stored = _fp16_bytes([scale, smallest], name, FP16_MAX)
    codes = (values - smallest).mul_(_inverse(scale)).add_(0.5)
    return torch.cat([*stored, *_packed_codes(codes, levels)], dim=1)


def _encode_q8_0(values: Tensor) -> Tensor:
    scale = _divided(values.abs().amax(dim=1, keepdim=True), 127)  # (n, 1)
    stored = _fp16_bytes([scale], "Q8_0", FP16_MAX * 127)
    codes = _round_half_away(values * _inverse(scale)).to(torch.int8)
    return torch.cat([*stored, codes.view(torch.uint8)], dim=1)  # (n, 34)


def _encode_mxfp4(values: Tensor) -> Tensor:
    magnitudes = values.abs()
    largest = magnitudes.amax(dim=1, keepdim=True)  # (n, 1)
    if not largest.isfinite().all():
        raise FormatError("MXFP4 holds finite values; got a NaN or an infinity")
    # The reference's logarithm in fp32: just below a power of two it may round up to it.
    exponent = largest.double().log2().float().floor().add_(127 - 2).clamp_(min=0).to(torch.uint8)
    scale = half_power_of_two(exponent)
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for low, high in pairwise(FP4_DOUBLED[:8]):
        codes += magnitudes > scale * ((low + high) / 2)  # exact; a tie takes the smaller value
    codes |= ((values < 0) & (codes > 0)).to(torch.uint8) << 3
    return torch.cat([exponent, _packed_nibbles(codes)], dim=1)  # (n, 17)


def _divided(numerator: Tensor, divisor: int) -> Tensor:
    # A tensor as divisor: CUDA turns division by a Python number into a product, one ULP off.
    return numerator / numerator.new_full((), divisor)


def _inverse(scale: Tensor) -> Tensor:
    # 0 for all-zero blocks, and for scales so small that fp16 stores 0 anyway
    inverse = scale.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0)


def _fp16_bytes(numbers: list[Tensor], name: str, limit: int) -> list[Tensor]:
    stored = [number.half() for number in numbers]
    if not all(number.isfinite().all() for number in stored):
        raise FormatError(
            f"{name} holds finite values up to {limit:.3g}; got a NaN, an infinity or more"
        )
    return [number.view(torch.uint8) for number in stored]


def _signed_largest(values: Tensor) -> Tensor:
    # (n, 1): the value of largest magnitude, the first one of equals.  argmax takes ten times as
    # long as amax and amin together, so it decides only where they tie.
    high, low = values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    rows = (high == -low).flatten().nonzero().flatten()
    tied = values[rows]
    largest[rows] = tied.gather(1, tied.abs().argmax(dim=1, keepdim=True))
    return largest


def _packed_codes(codes: Tensor, levels: int) -> list[Tensor]:
    # codes (n, 32) fp32, rounded down -> fifth bits (n, 4), where there are any, nibbles (n, 16)
    whole = codes.clamp_(max=2 * levels - 1).to(torch.uint8)
    if levels == 8:
        return [_packed_nibbles(whole)]
    # Eight lanes: the product moves bit 0 of byte i to bit i of the last byte, without a carry.
    bits = (whole.view(torch.int64) >> 4) & 0x0101010101010101
    gathered = (bits * 0x0102040810204080) >> 56
    return [gathered.to(torch.uint8), _packed_nibbles(whole & 15)]


def _packed_nibbles(codes: Tensor) -> Tensor:
    # (n, 32) uint8, 0 to 15 -> (n, 16): element j low, element j + 16 high, eight lanes at a time
    lanes = codes.view(torch.int64)
    return (lanes[:, :2] | lanes[:, 2:] << 4).view(torch.uint8)


def _round_half_away(values: Tensor) -> Tensor:
    whole = values.trunc()
    return whole + (2 * (values - whole)).trunc()


ENCODERS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "Q4_0": partial(_encode_signed, levels=8, name="Q4_0"),
        "Q4_1": partial(_encode_affine, levels=8, name="Q4_1"),
        "Q5_0": partial(_encode_signed, levels=16, name="Q5_0"),
        "Q5_1": partial(_encode_affine, levels=16, name="Q5_1"),
        "Q8_0": _encode_q8_0,
        "MXFP4": _encode_mxfp4,
    }
)
