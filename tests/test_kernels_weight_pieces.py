"""Weights as the fp16, fp8 and int8 matmuls take them: within range, in pieces, as they lie."""

import pytest
import torch
from quant_blocks import random_blocks
from test_kernels_quantize import randoms
from torch import Tensor

from ltxlite_kernels import int8_weight
from ltxlite_kernels.matmul_fp8 import matmul_fp8
from ltxlite_kernels.matmul_fp16 import LARGEST_WEIGHT, matmul_fp16
from ltxlite_kernels.matmul_int8 import matmul_int8
from ltxlite_kernels.quantize import quantize_rows
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import ScaledRows
from ltxlite_kernels.weight_pieces import fp16_pieces, fp16_scales, stored_fp8, stored_int8
from ltxlite_quant import FORMATS, QuantTensor, decode
from ltxlite_quant.encode import quantize as encode
from ltxlite_quant.encode_scaled import quantize_scaled

Q8_0 = FORMATS["Q8_0"]


def values_of(piece: Tensor | ScaledRows) -> Tensor:
    if isinstance(piece, Tensor):
        return piece.double()
    return piece.codes.double() * piece.scales.double()[:, None]


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F32", "BF16", "F16"])
@pytest.mark.parametrize("scaled", [False, True])
def test_fp16_pieces_are_the_decoded_weight_in_one_scratch(monkeypatch, name, scaled):
    monkeypatch.setattr(int8_weight, "SCRATCH_BYTES", 3 * 2 * 256)
    block_format = FORMATS[name]
    if block_format.is_quantized:
        blocks = random_blocks(name, 7, 256 // block_format.block_size)
        wanted = decode.dequantize(blocks, block_format, (7, 256), torch.float64)
    else:
        blocks = randoms(7, 256).to(block_format.dtype)
        wanted = blocks.double()
    scales = 2.0 ** torch.arange(-3, 4) if scaled else None
    seen, places = [], set()
    for rows, piece in fp16_pieces(blocks, block_format, 256, scales):
        assert isinstance(piece, ScaledRows) is scaled
        # One rounding to fp16: 2^-11 of a value, or half its last step, times the scale.
        slack = 2.0**-25 * (1 if scales is None else scales[rows, None])
        error = (values_of(piece) - wanted[rows]).abs()
        assert (error <= 2.0**-11 * wanted[rows].abs() + slack).all()
        places.add((piece.codes if isinstance(piece, ScaledRows) else piece).data_ptr())
        seen += range(7)[rows]
    assert seen == list(range(7))
    assert len(places) == 1
    if name == "F16" and not scaled:
        assert places == {blocks.data_ptr()}


def test_fp16_pieces_hold_32_mib_and_whole_tiles():
    blocks = torch.empty(16384, 16 * 144, dtype=torch.uint8, device="meta")
    pieces = [rows for rows, _ in fp16_pieces(blocks, FORMATS["Q4_K"], 4096)]
    assert [rows.stop - rows.start for rows in pieces] == [4096] * 4


def test_rows_in_range_need_no_scales_and_others_get_powers_of_two():
    weight = randoms(5, 64) / 8
    weight[4] = 0
    assert fp16_scales(weight, FORMATS["F32"], 64) is None
    assert fp16_scales(encode(weight, Q8_0).blocks, Q8_0, 64) is None
    weight[1] *= 1000
    weight[2] *= 1e-3
    for given, block_format in (
        (weight, FORMATS["F32"]),
        (weight.bfloat16().view(torch.uint8), FORMATS["BF16"]),
        (encode(weight, FORMATS["Q8_0"]).blocks, Q8_0),
    ):
        scales = fp16_scales(given, block_format, 64)
        assert scales is not None
        assert torch.equal(scales.log2(), scales.log2().round())
        for rows, piece in fp16_pieces(given, block_format, 64, scales):
            assert isinstance(piece, ScaledRows)
            largest = piece.codes.abs().amax(dim=1)
            assert (largest <= LARGEST_WEIGHT).all()
            assert (largest[:4] > LARGEST_WEIGHT / 2).all()
            assert torch.equal(piece.scales, scales[rows])


def test_weights_beyond_fp16_multiply_as_exactly_as_others():
    weight, x = randoms(6, 64), randoms(3, 64, seed=2)
    weight *= torch.tensor([1e6, 1, 1e-6, 1e-9, 30, 1e4])[:, None]
    scales = fp16_scales(weight, FORMATS["F32"], 64)
    ((_, w),) = fp16_pieces(weight, FORMATS["F32"], 64, scales)
    a = ScaledRows((x * 8).half(), torch.full((3,), 0.125), Rotation.NONE)
    found = matmul_fp16(a, w, dtype=torch.float32)
    wanted = x.double() @ weight.double().T
    # 2^-11 of each factor, at random: 2^-11 / √3 √2 of a row of 64.
    error = (found - wanted).norm(dim=0) / wanted.norm(dim=0)
    assert (error < 2.0**-10).all()


def convrot(rows: int) -> tuple[Tensor, QuantTensor]:
    weight = randoms(rows, 512, seed=1)
    return weight, quantize_scaled(weight, FORMATS["INT8_CONVROT"])


def test_a_convrot_weight_is_multiplied_as_it_lies_in_its_file():
    _, quant = convrot(12)
    x = randoms(5, 512, seed=2)
    w = stored_int8(quant.blocks, quant.format, quant.parts)
    assert w is not None
    assert w.codes.data_ptr() == quant.blocks.data_ptr()
    found = matmul_int8(quantize_rows(x, Rotation.REGULAR_256), w, dtype=torch.float32)
    wanted = x.double() @ quant.dequantize().double().T
    # Rounding the activation alone: steps of 4 / 127 of a deviation, a 1 / √12 of it.
    assert (found - wanted).norm() < 1.2 * 4 / 127 / 12**0.5 * wanted.norm()


@pytest.mark.parametrize("scale", ["none", "tensor", "rows"])
def test_an_fp8_weight_is_multiplied_as_it_lies_in_its_file(scale):
    codes, x = randoms(9, 96).to(torch.float8_e4m3fn), randoms(4, 96, seed=2)
    name = "F8_E4M3" if scale == "none" else "F8_E4M3_SCALED"
    factor = {"none": None, "tensor": torch.full((1, 1), 0.5), "rows": randoms(9, 1).abs()}[scale]
    parts = {} if factor is None else {"scale": factor}
    quant = QuantTensor(codes.view(torch.uint8), FORMATS[name], (9, 96), parts)
    w = stored_fp8(quant.blocks, quant.format, quant.parts)
    assert w is not None
    assert w.codes.data_ptr() == codes.data_ptr()
    a = ScaledRows(x.to(torch.float8_e4m3fn), torch.ones(4), Rotation.NONE)
    found = matmul_fp8(a, w, dtype=torch.float32)
    wanted = a.codes.double() @ quant.dequantize().double().T
    # Codes and scales are exact; fp32 sums of 96 products.
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_weights_that_no_kernel_takes_as_they_lie_are_declined():
    _, quant = convrot(3)
    fp8 = randoms(3, 64).to(torch.float8_e4m3fn).view(torch.uint8)
    one, many = torch.ones(1, 1), torch.ones(1, 64)
    for name, parts in (
        ("F8_E5M2_SCALED", {"scale": one}),
        ("MXFP8", {"scale_tiles": one}),
        ("F8_E4M3_SCALED", {"scale": one, "column_scale": many}),
        ("F8_E4M3_SCALED", {"scale": many}),
        ("INT8_CONVROT", {"scale": one}),
    ):
        assert stored_fp8(fp8, FORMATS[name], parts) is None
    for name in ("INT8", "INT8_CONVROT_64", "INT8_CONVROT_16", "BNB_INT8", "Q8_0"):
        assert stored_int8(quant.blocks, FORMATS[name], quant.parts) is None
