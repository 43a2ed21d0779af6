"""Decoders and quantizers of every format, against gguf-py and vectors made from integers."""

import hashlib

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from quant_blocks import FP16_FIELDS, random_blocks

from ltxlite_quant import decode, encode
from ltxlite_quant.encode import ENCODERS, quantize
from ltxlite_quant.formats import FORMATS, FormatError
from ltxlite_quant.measure import relative_rmse
from ltxlite_quant.tensor import QuantTensor

# One block of bytes (73 i + 41) mod 256 with the fp16 fields overwritten by 0.125 and 0.0625, and
# MXFP4's exponent by 125.  Then: sum of the values, some of them, start of the SHA-256 of the
# little-endian fp32 array.  Source: formats.md 7.5 (a).
GOLDEN_DECODE = {
    "Q4_0": (-4.125, {0: 0.375, 1: -0.5, 15: -0.75, 16: 0.375, 31: -1}, "19748385f7caa2a8"),
    "Q4_1": (30.125, {0: 1.6875, 1: 0.8125, 16: 0.5625, 31: 1.1875}, "7ebf7a593e873743"),
    "Q5_0": (-5.625, {0: 1.875, 1: 1, 15: -1.25, 16: 1.625, 31: 0.25}, "92b8fb9f84d73bbc"),
    "Q5_1": (64.625, {0: 2.1875, 1: 1.3125, 15: 3.0625, 31: 1.4375}, "0796be8524aa4aac"),
    "Q8_0": (-6, {0: -8.625, 1: 0.5, 15: 0.25, 16: 9.375, 31: -13.75}, "4a3080263b74b0f2"),
    "Q2_K": (255.375, {0: 1, 1: 2.125, 32: 2.0625, 100: 4.8125, 255: -0.4375}, "774f9c413c8245d6"),
    "Q3_K": (29.25, {0: -0.875, 32: -6.75, 63: 14, 100: -2.125, 255: -3}, "4ae91b3f3daadbbc"),
    "Q4_K": (6669, {0: 11.5625, 32: 26.625, 100: 74.25, 255: -1.4375}, "4cbc843055c9fb12"),
    "Q5_K": (13759, {0: 37.5625, 32: 32.125, 100: 84.25, 255: -1.4375}, "0d613ea846841767"),
    "Q6_K": (-1855.5, {0: 20.125, 16: -43.75, 63: 240, 100: -266.75, 255: 36}, "b4a7fd65d06c96b6"),
    "IQ4_NL": (-60.125, {0: 4.75, 1: -6.125, 16: 4.75, 31: -15.875}, "947979ad8980a858"),
    "IQ4_XS": (-806.25, {0: -377, 16: -36.25, 32: -52, 128: 221}, "19ccaeb4e06739e7"),
    "MXFP4": (3.125, {0: 0.25, 1: -0.375, 16: 1.5, 31: -0.375}, "ae5a10c3d07370df"),
    "NVFP4": (1510.4453125, {0: -0.84375, 16: 480, 17: -640, 32: -4.125}, "78311d909ebbe18f"),
}
# Of the 256 values below: relative RMSE, start of the SHA-256 of the blocks.
# Source: formats.md 7.5 (b).
GOLDEN_ENCODE = {
    "Q4_0": (0.065403, "6c176a678dd7fa5d"),
    "Q4_1": (0.061723, "2da7ccdcf539f67c"),
    "Q5_0": (0.029815, "4dd5655ee0b6feae"),
    "Q5_1": (0.029016, "a2da343558cc3146"),
    "Q8_0": (0.003629, "773d6a65fae44e0b"),
    "MXFP4": (0.102477, "a205fb28ee3d53e5"),
}
# Relative RMSE on Gaussian and Laplace weights: gguf-py's own, on 2^22 values of another generator.
LOSSES = {
    "Q4_0": (0.0859, 0.1067),
    "Q4_1": (0.0782, 0.0918),
    "Q5_0": (0.0427, 0.0535),
    "Q5_1": (0.0379, 0.0444),
    "Q8_0": (0.00535, 0.00674),
    "MXFP4": (0.1141, 0.1260),
}
# Formats whose scales lie in tensors of their own have decoders of their own.
QUANTIZED = [row.name for row in FORMATS.values() if row.is_quantized and row.ggml_type is not None]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def lcg_values() -> np.ndarray:
    """256 values of a linear congruential generator, uniform in (-0.1, 0.1)."""
    state, values = 12345, []
    for _ in range(256):
        state = (1103515245 * state + 12345) % (1 << 31)
        values.append((state / (1 << 31) - 0.5) * 0.2)
    return np.array(values).astype(np.float32)


def test_every_quantized_format_has_a_decoder_and_a_golden_block():
    assert set(QUANTIZED) == set(decode.DECODERS) == set(GOLDEN_DECODE) == set(FP16_FIELDS)
    assert set(ENCODERS) == set(GOLDEN_ENCODE) == set(LOSSES)


def same_bits(ours: torch.Tensor, wanted: np.ndarray) -> bool:
    """Compare fp32 bits, so that the sign of a zero counts."""
    return np.array_equal(ours.numpy().view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_golden_block_decodes_to_its_values(name):
    total, elements, sha = GOLDEN_DECODE[name]
    row = FORMATS[name]
    raw = (73 * np.arange(row.block_bytes) + 41).astype(np.uint8)
    for offset, number in zip(FP16_FIELDS[name], (0.125, 0.0625), strict=False):
        raw[offset : offset + 2] = np.array([number], "<f2").view(np.uint8)
    if name == "MXFP4":
        raw[0] = 125
    quant = QuantTensor(torch.from_numpy(raw)[None], row, (1, row.block_size))
    values = quant.dequantize().flatten()
    assert values.double().sum().item() == total
    assert {i: values[i].item() for i in elements} == elements
    assert digest(values.numpy().astype("<f4").tobytes()) == sha


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 3), (63, 41)])
def test_decoding_has_the_bits_of_gguf_py(name, rows, blocks):
    raw = random_blocks(name, rows, blocks, extreme=True)
    wanted = gguf_dequantize(raw.numpy(), gguf.GGMLQuantizationType[name])
    assert np.isfinite(wanted).all()
    quant = QuantTensor(raw, FORMATS[name], wanted.shape)
    assert same_bits(quant.dequantize(), wanted)
    assert quant.nbytes == raw.numel()


def test_every_scale_of_the_fp4_formats_decodes_like_gguf_py():
    for name, largest in (("MXFP4", 252), ("NVFP4", 255)):
        row = FORMATS[name]
        raw = np.arange(largest + 1, dtype=np.uint8)[:, None].repeat(row.block_bytes, axis=1)
        raw[:, -row.block_size // 2 :] = np.arange(0, 256, 512 // row.block_size, dtype=np.uint8)
        wanted = gguf_dequantize(raw, gguf.GGMLQuantizationType[name])
        quant = QuantTensor(torch.from_numpy(raw), row, wanted.shape)
        assert same_bits(quant.dequantize(), wanted)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_result_is_the_fp32_one_rounded_once(name, dtype):
    quant = QuantTensor(random_blocks(name, 5, 3), FORMATS[name], (5, 3 * FORMATS[name].block_size))
    assert torch.equal(quant.dequantize(dtype), quant.dequantize().to(dtype))


@pytest.mark.parametrize("name", QUANTIZED)
def test_chunks_do_not_show(name, monkeypatch):
    raw, row = random_blocks(name, 7, 5), FORMATS[name]
    shape = (7, 5 * row.block_size)
    whole = decode.dequantize(raw, row, shape, torch.float32)
    # Three blocks: 35 = 11 * 3 + 2.
    monkeypatch.setattr(decode, "CPU_CHUNK_ELEMENTS", 3 * row.block_size)
    out = torch.full(shape, torch.nan)
    result = decode.dequantize(raw, row, shape, torch.float32, out)
    assert result is out
    assert torch.equal(out, whole)


@pytest.mark.parametrize("name", QUANTIZED)
def test_blocks_may_start_at_any_address(name):
    row = FORMATS[name]
    for count in (1, 3):  # a single row counts as contiguous whatever its stride
        raw = random_blocks(name, count, 1)
        odd = torch.cat([raw.flatten()[:1], raw.flatten()])[1:].view(count, -1)
        assert odd.data_ptr() % 2 == 1
        shape = (count, row.block_size)
        wanted = QuantTensor(raw, row, shape).dequantize()
        assert torch.equal(QuantTensor(odd, row, shape).dequantize(), wanted)


def test_a_tensor_of_three_dimensions_and_an_empty_one_decode():
    row = FORMATS["Q8_0"]
    raw = random_blocks("Q8_0", 6, 2)
    flat = QuantTensor(raw, row, (6, 64)).dequantize()
    assert torch.equal(QuantTensor(raw, row, (2, 3, 64)).dequantize(), flat.view(2, 3, 64))
    assert QuantTensor(raw[:0], row, (0, 64)).dequantize().shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (7, 64)}, r"uint8 \(7, 68\), got torch.uint8 \(6, 68\)"),
        ({"shape": (6, 65)}, "multiple of 32"),
        ({"block_format": FORMATS["F16"], "shape": (6, 34)}, "F16 is plain"),
        ({"dtype": torch.int8}, "floating point dtype"),
        ({"out": torch.empty(64, 6).T}, "contiguous"),
        ({"out": torch.empty(6, 64, dtype=torch.float16)}, "out must be"),
    ],
)
def test_what_disagrees_is_refused(change, message):
    call = {"block_format": FORMATS["Q8_0"], "shape": (6, 64), "dtype": torch.float32} | change
    with pytest.raises(FormatError, match=message):
        decode.dequantize(random_blocks("Q8_0", 6, 2), **call)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_the_golden_values_quantize_to_their_bytes(name):
    values = lcg_values()
    assert digest(values.tobytes()) == "2ea4f8e50bf24e56"  # the generator itself is right
    rmse, sha = GOLDEN_ENCODE[name]
    quant = quantize(torch.from_numpy(values)[None], FORMATS[name])
    assert digest(quant.blocks.numpy().tobytes()) == sha
    # The reference figure is printed with six digits.
    assert relative_rmse(quant, torch.from_numpy(values)[None]) == pytest.approx(rmse, abs=5e-7)


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-7, 1e-20, 1e-36, 1e4])
def test_quantizing_has_the_bytes_of_gguf_py(name, spread, monkeypatch):
    monkeypatch.setattr(encode, "CPU_CHUNK_ELEMENTS", 32 * 50)  # 111 blocks: 2 * 50 + 11
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((37, 96)) * spread).astype(np.float32)
    values[3] = 0  # all-zero blocks
    values[4, :32] = 127 * 0.5  # scale 0.5: quotients exactly between two codes
    values[4, 1:4] = (0.25, -0.25, 0.75)
    values[5] = spread  # constant
    values[6] = np.tile([-spread, spread], 48)  # two largest values: the first decides
    values[7] = -values[6]
    values[8] = -0.0
    values[9] = 0
    values[9, 40] = spread  # one outlier
    values[10] = rng.integers(-16, 17, 96) * spread / 8  # codes between two of every format
    wanted = gguf_quantize(values, gguf.GGMLQuantizationType[name])
    assert np.array_equal(quantize(torch.from_numpy(values), FORMATS[name]).blocks.numpy(), wanted)


def test_mxfp4_takes_the_exponents_of_gguf_py_beside_powers_of_two():
    powers = np.float32(2) ** np.arange(-100, 100, dtype=np.float32)
    values = np.zeros((3, 200, 32), np.float32)
    values[0, :, 5] = np.nextafter(powers, np.float32(0))
    values[1, :, 5] = -powers
    values[2, :, 5] = np.nextafter(powers, np.float32(np.inf))
    wanted = gguf_quantize(values, gguf.GGMLQuantizationType.MXFP4).reshape(-1, 17)
    quant = quantize(torch.from_numpy(values), FORMATS["MXFP4"])
    assert np.array_equal(quant.blocks.numpy(), wanted)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_subnormal_weights_become_small_or_nothing(name):
    # gguf-py divides by zero here, or wraps MXFP4's exponent: there are no bytes to compare.
    values = torch.linspace(-1e-38, 1e-38, 96)[None] * 0.1
    decoded = quantize(values, FORMATS[name]).dequantize()
    assert (decoded - values).abs().max() <= values.abs().max()


@pytest.mark.parametrize("name", list(ENCODERS))
def test_weights_lose_what_the_table_says(name):
    random = torch.Generator().manual_seed(0)
    gaussian = torch.randn(512, 1024, generator=random) * 0.02
    uniform = torch.rand(512, 1024, generator=random, dtype=torch.float64) - 0.5
    laplace = (-uniform.sign() * (1 - 2 * uniform.abs()).log()).float() * 0.02
    for weights, wanted in zip((gaussian, laplace), LOSSES[name], strict=True):
        loss = relative_rmse(quantize(weights, FORMATS[name]), weights)
        # 2^19 samples leave the figure within half a percent.
        assert loss == pytest.approx(wanted, rel=0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantized_as_fp32(dtype):
    values = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name in ENCODERS:
        wanted = quantize(values.float(), FORMATS[name]).blocks
        assert torch.equal(quantize(values, FORMATS[name]).blocks, wanted)
        assert quantize(values[:0], FORMATS[name]).shape == (0, 96)


# MXFP4 holds all of fp32: its largest scale is 2^127.
@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name in ENCODERS for bad in (torch.nan, torch.inf, -torch.inf)]
    + [(name, bad) for name in ENCODERS if name != "MXFP4" for bad in (1e7, -1e7)],
)
def test_values_that_a_format_cannot_hold_are_refused(name, bad):
    values = torch.zeros(2, 64)
    values[1, 40] = bad
    with pytest.raises(FormatError, match=f"{name} holds finite"):
        quantize(values, FORMATS[name])


def test_unknown_targets_and_meaningless_measures_are_refused():
    with pytest.raises(FormatError, match="cannot quantize to BF16"):
        quantize(torch.zeros(1, 32), FORMATS["BF16"])
    zero = quantize(torch.zeros(1, 32), FORMATS["Q8_0"])
    with pytest.raises(FormatError, match="all zero"):
        relative_rmse(zero, torch.zeros(1, 32))
    with pytest.raises(FormatError, match="cannot compare"):
        relative_rmse(zero, torch.ones(32))
