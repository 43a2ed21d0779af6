"""Weights as int8 rows: from blocks of every format, from plain rows, in pieces."""

import pytest
import torch
from kernel_device import kernel_device
from quant_blocks import random_blocks
from test_kernels_quantize import ROTATED_STEPS, poisoned, randoms, steps_off, turned

from ltxlite_kernels import int8_weight, reference
from ltxlite_kernels.configs import DEQUANT
from ltxlite_kernels.int8_weight import int8_codes, int8_pieces, int8_rows, row_scales
from ltxlite_kernels.quantize import quantize_rows
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import ScaledRows
from ltxlite_quant import FORMATS, FormatError, decode


@pytest.fixture
def device() -> str:
    return kernel_device()


def empty_rows(rows: int, columns: int, rotation: Rotation, device: str = "cpu") -> ScaledRows:
    codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
    return ScaledRows(codes, torch.empty(rows, device=device), rotation)


@pytest.mark.parametrize("name", sorted(DEQUANT))
def test_kernel_decodes_to_int8_with_the_bits_of_its_twin(device, name):
    block_format, rows = FORMATS[name], 7
    columns = 3 * block_format.block_size
    blocks = random_blocks(name, rows, 3).to(device)
    codes, scales = poisoned(rows, columns, device)
    part = codes[: rows * columns].view(rows, columns)
    torch.ops.ltxlite.row_scales(blocks, name, columns, 0, scales[:rows])
    torch.ops.ltxlite.int8_codes(blocks, name, scales[:rows], 0, part)
    # The decoder's bits, then the same product, division and rounding: equal bits.
    wanted = reference.row_scales(blocks.cpu(), block_format, columns)
    assert torch.equal(scales[:rows].cpu(), wanted)
    out = empty_rows(rows, columns, Rotation.NONE)
    assert torch.equal(
        part.cpu(), reference.int8_codes(blocks.cpu(), block_format, wanted, out).codes
    )
    assert (codes[rows * columns :] == 0x7F).all()
    assert scales[rows:].isnan().all()


@pytest.mark.parametrize("rotation", [Rotation.SIGNS_128, Rotation.REGULAR_256])
@pytest.mark.parametrize("name", ["Q8_0", "NVFP4", "Q4_K", "Q6_K"])
def test_kernel_rotates_weights_before_it_rounds_them(device, name, rotation):
    block_format, rows = FORMATS[name], 5
    odd = rotation == 128 and block_format.block_size < 128  # then groups of 256 cross rows
    columns = 384 if odd else 1280
    blocks = random_blocks(name, rows, columns // block_format.block_size)
    found = int8_rows(blocks.to(device), block_format, columns, rotation)
    values = decode.dequantize(blocks, block_format, (rows, columns), torch.float32)
    assert steps_off(found, turned(values, rotation)) <= ROTATED_STEPS
    wanted = reference.row_scales(blocks, block_format, columns, rotation)
    assert torch.allclose(found.scales.cpu(), wanted, rtol=8 * 0.01 / 127, atol=0)


def test_kernel_holds_values_beyond_the_scale_at_the_ends(device):
    blocks = random_blocks("Q8_0", 3, 4)
    scales = row_scales(blocks, FORMATS["Q8_0"], 128) / 4
    out = empty_rows(3, 128, Rotation.NONE, device)
    found = int8_codes(blocks.to(device), FORMATS["Q8_0"], scales.to(device), out).codes.cpu()
    values = decode.dequantize(blocks, FORMATS["Q8_0"], (3, 128), torch.float64)
    beyond = values.abs() > 127.5 * scales[:, None]
    assert beyond.any()
    assert torch.equal(found[beyond].double(), 127 * values[beyond].sign())


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_kernel_takes_plain_rows_too(device, name):
    rows = randoms(5, 256).to(FORMATS[name].dtype).to(device)
    wanted = quantize_rows(rows, Rotation.SIGNS_128)
    for given in (rows, rows.view(torch.uint8)):
        found = int8_rows(given, FORMATS[name], 256, Rotation.SIGNS_128)
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.scales, wanted.scales)


@pytest.mark.parametrize("name", ["Q4_K", "BF16"])
@pytest.mark.parametrize("known", [False, True])
def test_pieces_are_the_whole_in_one_scratch(monkeypatch, name, known):
    monkeypatch.setattr(int8_weight, "SCRATCH_BYTES", 3 * 256)
    block_format = FORMATS[name]
    blocks = randoms(7, 256).bfloat16()
    if block_format.is_quantized:
        blocks = random_blocks(name, 7, 1)
    whole = int8_rows(blocks, block_format, 256)  # rotated, BLAS sums pieces in another order
    scales = whole.scales if known and block_format.is_quantized else None
    places = set()
    seen = []
    for rows, piece in int8_pieces(blocks, block_format, 256, Rotation.NONE, scales):
        assert torch.equal(piece.codes, whole.codes[rows])
        assert torch.equal(piece.scales, whole.scales[rows])
        places.add(piece.codes.data_ptr())
        seen += range(7)[rows]
    assert seen == list(range(7))
    assert len(places) == 1 or not block_format.is_quantized


def test_pieces_hold_32_mib_and_whole_tiles():
    blocks = torch.empty(16384, 16 * 144, dtype=torch.uint8, device="meta")
    pieces = list(int8_pieces(blocks, FORMATS["Q4_K"], 4096))
    assert [rows.stop - rows.start for rows, _ in pieces] == [8192, 8192]
    assert all(piece.codes.numel() == 32 << 20 for _, piece in pieces)


def test_weights_that_do_not_fit_are_refused():
    q8, q4 = FORMATS["Q8_0"], FORMATS["Q4_K"]
    blocks = random_blocks("Q8_0", 4, 4)
    odd = torch.cat([blocks.flatten()[:1], blocks.flatten()])[1:].view(4, -1)
    for given, block_format, columns, rotation, message in (
        (blocks, q8, 128, Rotation.REGULAR_256, "K % 256"),
        (blocks, q8, 96, Rotation.NONE, "uint8"),
        (blocks, q4, 256, Rotation.NONE, "uint8"),
        (odd, q8, 128, Rotation.NONE, "multiple of 2 bytes"),
        (torch.zeros(3, 8), FORMATS["F16"], 8, Rotation.NONE, "rows of F16"),
    ):
        with pytest.raises(FormatError, match=message):
            int8_rows(given, block_format, columns, rotation)
    with pytest.raises(FormatError, match="of 4 rows"):
        int8_codes(blocks, q8, torch.ones(3), empty_rows(4, 128, Rotation.NONE))
