"""Raw GGUF blocks to values, one device function a format, for every kernel that reads weights.

Each takes pointers to the first byte of some blocks (B,) and a mask, and returns their values
(B, block_size) in fp32, in order. The bits are those of `ltxlite_quant.decode`: a product of scale
and code is exact in fp32, and a minimum is subtracted with one rounding, since fused multiply-add
is switched off at launch.
Source: formats.md 2, ggml d99724f.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

import triton
import triton.language as tl

# Sixteen values as bytes of two 64-bit numbers, raised by 128: a register each instead of a table
# in memory. IQ4's and, doubled, FP4's; see `ltxlite_quant.decode_codebook`.
_IQ4 = tl.constexpr((0x766A5D4F3F2D1801, 0xF1D9C5B5A6998D81))
_FP4 = tl.constexpr((0x8C88868483828180, 0x74787A7C7D7E7F80))


@triton.jit
def _half(start, first: tl.constexpr, mask):
    # fp16 at an even offset -> (B,) fp32
    at = (start + first).to(tl.pointer_type(tl.float16))
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _word(start, first: tl.constexpr, mask):
    # four bytes at an even offset -> (B,) int64, in two loads
    at = (start + first).to(tl.pointer_type(tl.uint16))
    low = tl.load(at, mask=mask, other=0).to(tl.int64)
    return low | (tl.load(at + 1, mask=mask, other=0).to(tl.int64) << 16)


@triton.jit
def _bytes(start, first: tl.constexpr, COUNT: tl.constexpr, mask, WIDE: tl.constexpr):  # noqa: N803
    # COUNT bytes in loads of WIDE bytes, which must divide the address -> (B, COUNT) int32
    if WIDE == 4:
        at = (start + first).to(tl.pointer_type(tl.uint32))[:, None]
        w = tl.load(at + tl.arange(0, COUNT // 4)[None, :], mask=mask[:, None], other=0)
        even = tl.join(w & 255, (w >> 16) & 255)
        out = tl.join(even, tl.join((w >> 8) & 255, w >> 24))  # (B, COUNT/4, 2, 2)
    elif WIDE == 2:
        at = (start + first).to(tl.pointer_type(tl.uint16))[:, None]
        w = tl.load(at + tl.arange(0, COUNT // 2)[None, :], mask=mask[:, None], other=0)
        out = tl.join(w & 255, w >> 8)
    else:
        at = (start + first)[:, None] + tl.arange(0, COUNT)[None, :]
        out = tl.load(at, mask=mask[:, None], other=0)
    return tl.reshape(out, (start.shape[0], COUNT)).to(tl.int32)


@triton.jit
def _nibbles(packed, GROUPS: tl.constexpr, BYTES: tl.constexpr):  # noqa: N803
    # (B, GROUPS * BYTES) -> (B, GROUPS, 2 * BYTES): a group's low nibbles, then its high ones
    both = tl.join(packed & 15, packed >> 4)
    both = tl.reshape(both, (packed.shape[0], GROUPS, BYTES, 2))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (packed.shape[0], GROUPS, 2 * BYTES))


@triton.jit
def _looked_up(codes, TABLE: tl.constexpr):  # noqa: N803
    # codes 0..15 -> values of a table, fp32
    words = tl.where(codes < 8, TABLE[0], TABLE[1] - (1 << 64) if TABLE[1] >> 63 else TABLE[1])
    return (((words >> ((codes & 7) * 8).to(tl.int64)) & 255).to(tl.int32) - 128).to(tl.float32)


@triton.jit
def _pairs(start, first: tl.constexpr, mask, WIDE: tl.constexpr):  # noqa: N803
    # 64 bytes of four 2-bit codes -> (B, 2, 4, 32): bits 2k of 32 bytes are neighbouring elements
    packed = tl.reshape(_bytes(start, first, 64, mask, WIDE), (start.shape[0], 2, 1, 32))
    shift = (2 * tl.arange(0, 4))[None, None, :, None]
    return (packed >> shift) & 3


@triton.jit
def _high_bits(start, first: tl.constexpr, mask):
    # 32 bits at an even offset -> (B, 32) of 0 and 16
    return ((_word(start, first, mask)[:, None] >> tl.arange(0, 32)[None, :].to(tl.int64)) & 1).to(
        tl.int32
    ) << 4


@triton.jit
def q4_0(start, mask):
    """18 bytes: d fp16 @0, 32 nibbles @2."""
    codes = tl.reshape(_nibbles(_bytes(start, 2, 16, mask, 2), 1, 16), (start.shape[0], 32))
    return (codes - 8).to(tl.float32) * _half(start, 0, mask)[:, None]


@triton.jit
def q4_1(start, mask):
    """20 bytes: d fp16 @0, m fp16 @2, 32 nibbles @4."""
    codes = tl.reshape(_nibbles(_bytes(start, 4, 16, mask, 4), 1, 16), (start.shape[0], 32))
    return codes.to(tl.float32) * _half(start, 0, mask)[:, None] + _half(start, 2, mask)[:, None]


@triton.jit
def q5_0(start, mask):
    """22 bytes: d fp16 @0, 32 high bits @2, 32 nibbles @6."""
    codes = tl.reshape(_nibbles(_bytes(start, 6, 16, mask, 2), 1, 16), (start.shape[0], 32))
    codes = codes | _high_bits(start, 2, mask)
    return (codes - 16).to(tl.float32) * _half(start, 0, mask)[:, None]


@triton.jit
def q5_1(start, mask):
    """24 bytes: d fp16 @0, m fp16 @2, 32 high bits @4, 32 nibbles @8."""
    codes = tl.reshape(_nibbles(_bytes(start, 8, 16, mask, 4), 1, 16), (start.shape[0], 32))
    codes = (codes | _high_bits(start, 4, mask)).to(tl.float32)
    return codes * _half(start, 0, mask)[:, None] + _half(start, 2, mask)[:, None]


@triton.jit
def q8_0(start, mask):
    """34 bytes: d fp16 @0, 32 int8 @2."""
    codes = _bytes(start, 2, 32, mask, 2)
    return ((codes ^ 128) - 128).to(tl.float32) * _half(start, 0, mask)[:, None]


@triton.jit
def iq4_nl(start, mask):
    """18 bytes: d fp16 @0, 32 nibbles @2."""
    codes = tl.reshape(_nibbles(_bytes(start, 2, 16, mask, 2), 1, 16), (start.shape[0], 32))
    return _looked_up(codes, _IQ4) * _half(start, 0, mask)[:, None]


@triton.jit
def mxfp4(start, mask):
    """17 bytes: exponent @0, 32 nibbles @1."""
    exponent = tl.load(start, mask=mask, other=0).to(tl.int32)
    subnormal = tl.where(exponent == 0, 0x200000, 0x400000)
    scale = tl.where(exponent < 2, subnormal, (exponent - 1) << 23).to(tl.float32, bitcast=True)
    codes = tl.reshape(_nibbles(_bytes(start, 1, 16, mask, 1), 1, 16), (start.shape[0], 32))
    return _looked_up(codes, _FP4) * scale[:, None]


@triton.jit
def nvfp4(start, mask):
    """36 bytes: 4 unsigned E4M3 scales @0, 64 nibbles @4 in groups of 16."""
    code = _bytes(start, 0, 4, mask, 4)
    bits = ((code & 0x7F) << 7).to(tl.int16)
    scale = bits.to(tl.float16, bitcast=True).to(tl.float32) * 128.0
    scale = tl.where(code == 0x7F, 0.0, scale)
    values = _looked_up(_nibbles(_bytes(start, 4, 32, mask, 4), 4, 8), _FP4) * scale[:, :, None]
    return tl.reshape(values, (start.shape[0], 64))


@triton.jit
def q2_k(start, mask):
    """84 bytes: 16 x (scale low, minimum high nibble) @0, 256 pairs @16, d @80, dmin @82."""
    both = _bytes(start, 0, 16, mask, 4)
    scales = (both & 15).to(tl.float32) * _half(start, 80, mask)[:, None]
    minimums = (both >> 4).to(tl.float32) * _half(start, 82, mask)[:, None]
    codes = tl.reshape(_pairs(start, 16, mask, 4), (start.shape[0], 16, 16)).to(tl.float32)
    return tl.reshape(codes * scales[:, :, None] - minimums[:, :, None], (start.shape[0], 256))


@triton.jit
def q3_k(start, mask):
    """110 bytes: 256 high bits @0, 256 pairs @32, 16 x 6-bit scale @96, d @108."""
    number = tl.arange(0, 16)[None, :]
    low = _word(start, 96, mask)[:, None] | (_word(start, 100, mask)[:, None] << 32)
    low = (low >> (8 * (number & 7) + 4 * (number >> 3)).to(tl.int64)) & 15
    high = (_word(start, 104, mask)[:, None] >> (8 * (number & 3) + 2 * (number >> 2))) & 3
    scales = (low | (high << 4)).to(tl.int32) - 32
    factors = scales.to(tl.float32) * _half(start, 108, mask)[:, None]
    bits = tl.reshape(_bytes(start, 0, 32, mask, 2), (start.shape[0], 1, 1, 32))
    place = 4 * tl.arange(0, 2)[None, :, None, None] + tl.arange(0, 4)[None, None, :, None]
    codes = _pairs(start, 32, mask, 2) + 4 * ((bits >> place) & 1) - 4
    codes = tl.reshape(codes, (start.shape[0], 16, 16)).to(tl.float32)
    return tl.reshape(codes * factors[:, :, None], (start.shape[0], 256))


@triton.jit
def _scales_minimums(start, mask):
    # Q4_K and Q5_K: d @0, dmin @2, 8 x 6-bit (scale, minimum) @4 -> (B, 8) fp32 each
    first, second, third = (
        tl.load((start + 4).to(tl.pointer_type(tl.uint32)), mask=mask, other=0)[:, None],
        tl.load((start + 8).to(tl.pointer_type(tl.uint32)), mask=mask, other=0)[:, None],
        tl.load((start + 12).to(tl.pointer_type(tl.uint32)), mask=mask, other=0)[:, None],
    )
    number = tl.arange(0, 8)[None, :]
    shift = (8 * (number & 3)).to(tl.uint32)
    a, b, c = (first >> shift) & 255, (second >> shift) & 255, (third >> shift) & 255
    scales = tl.where(number < 4, a & 63, (c & 15) | ((a >> 6) << 4))
    minimums = tl.where(number < 4, b & 63, (c >> 4) | ((b >> 6) << 4))
    d, dmin = _half(start, 0, mask)[:, None], _half(start, 2, mask)[:, None]
    return scales.to(tl.float32) * d, minimums.to(tl.float32) * dmin


@triton.jit
def q4_k(start, mask):
    """144 bytes: d @0, dmin @2, 8 x 6-bit (scale, minimum) @4, 256 nibbles @16."""
    scales, minimums = _scales_minimums(start, mask)
    codes = _nibbles(_bytes(start, 16, 128, mask, 4), 4, 32)
    codes = tl.reshape(codes, (start.shape[0], 8, 32)).to(tl.float32)
    return tl.reshape(codes * scales[:, :, None] - minimums[:, :, None], (start.shape[0], 256))


@triton.jit
def q5_k(start, mask):
    """176 bytes: as Q4_K to 16, then 256 high bits @16, 256 nibbles @48."""
    scales, minimums = _scales_minimums(start, mask)
    codes = _nibbles(_bytes(start, 48, 128, mask, 4), 4, 32)
    bits = _bytes(start, 16, 32, mask, 4)[:, None, :]
    high = ((bits >> tl.arange(0, 8)[None, :, None]) & 1) << 4
    codes = (tl.reshape(codes, (start.shape[0], 8, 32)) | high).to(tl.float32)
    return tl.reshape(codes * scales[:, :, None] - minimums[:, :, None], (start.shape[0], 256))


@triton.jit
def q6_k(start, mask):
    """210 bytes: 256 nibbles @0, 256 pairs @128, 16 x int8 scale @192, d @208."""
    packed = tl.reshape(_bytes(start, 0, 128, mask, 2), (start.shape[0], 2, 2, 32))
    both = tl.permute(tl.join(packed & 15, packed >> 4), (0, 1, 4, 2, 3))
    codes = tl.reshape(both, (start.shape[0], 2, 4, 32)) | (_pairs(start, 128, mask, 2) << 4)
    scales = (_bytes(start, 192, 16, mask, 2) ^ 128) - 128
    factors = scales.to(tl.float32) * _half(start, 208, mask)[:, None]
    values = (tl.reshape(codes, (start.shape[0], 16, 16)) - 32).to(tl.float32)
    return tl.reshape(values * factors[:, :, None], (start.shape[0], 256))


@triton.jit
def iq4_xs(start, mask):
    """136 bytes: d @0, 8 x 2 high @2 and 8 x 4 low bits @4 of the scales, 256 nibbles @8."""
    number = tl.arange(0, 8)[None, :]
    word = _word(start, 4, mask)[:, None]
    low = (word >> (4 * number).to(tl.int64)) & 15
    high = (_word(start, 2, mask)[:, None] >> (2 * number).to(tl.int64)) & 3
    scales = (low | (high << 4)).to(tl.int32) - 32
    factors = scales.to(tl.float32) * _half(start, 0, mask)[:, None]
    values = _looked_up(_nibbles(_bytes(start, 8, 128, mask, 4), 8, 16), _IQ4)
    return tl.reshape(values * factors[:, :, None], (start.shape[0], 256))
