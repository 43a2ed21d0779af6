"""The format table, against gguf-py's own tables."""

import gguf
import pytest
import torch
from gguf.quants import quant_shape_from_byte_shape, quant_shape_to_byte_shape

from ltxlite_quant.formats import (
    FORMATS,
    GGML_NAMES,
    GGML_RETIRED,
    FormatError,
    byte_shape,
    format_of_ggml_type,
    logical_shape,
    plain_format,
)

GGML_FORMATS = [row for row in FORMATS.values() if row.ggml_type is not None]


@pytest.mark.parametrize("row", GGML_FORMATS, ids=lambda row: row.name)
def test_a_format_has_the_number_and_block_of_gguf_py(row):
    kind = gguf.GGMLQuantizationType[row.name]
    assert row.ggml_type == kind.value
    assert (row.block_size, row.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


def test_every_type_that_gguf_py_knows_has_its_name_here():
    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    assert known.items() <= GGML_NAMES.items()
    assert not set(GGML_NAMES) & set(GGML_RETIRED)


@pytest.mark.parametrize("row", [f for f in FORMATS.values() if f.dtype], ids=lambda row: row.name)
def test_a_plain_format_has_the_element_size_of_its_dtype(row):
    assert row.dtype is not None
    assert (row.block_size, row.block_bytes) == (1, row.dtype.itemsize)
    assert plain_format(row.name, "x") is row


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (19, "f.gguf: 'x': IQ1_S tensors are not supported yet; use a file of .*Q4_K"),
        (35, "f.gguf: 'x': TQ2_0 tensors are not supported yet"),
        (4, "Q4_2 .* was retired"),
        (31, "Q4_0_4_4 .* was retired"),
        (77, "GGML type 77 is unknown"),
    ],
)
def test_a_type_we_cannot_read_is_refused_by_name(number, message):
    with pytest.raises(FormatError, match=message):
        format_of_ggml_type(number, "f.gguf: 'x'")


def test_a_quantized_format_is_no_safetensors_dtype():
    with pytest.raises(FormatError, match="w: unknown dtype 'Q8_0'"):
        plain_format("Q8_0", "w")


@pytest.mark.parametrize("row", GGML_FORMATS, ids=lambda row: row.name)
@pytest.mark.parametrize("rows", [(), (3,), (5, 7)])
def test_shapes_convert_both_ways_like_gguf_py(rows, row):
    shape, kind = (*rows, 3 * row.block_size), gguf.GGMLQuantizationType[row.name]
    stored = byte_shape(shape, row)
    assert stored == quant_shape_to_byte_shape(shape, kind)
    assert logical_shape(stored, row) == shape
    assert shape == quant_shape_from_byte_shape(stored, kind)


def test_uneven_rows_are_refused_with_what_to_do():
    with pytest.raises(FormatError, match=r"a\.w: Q8_0 needs .* multiple of 32 .* got 33 .* BF16"):
        byte_shape((2, 33), FORMATS["Q8_0"], "a.w")
    with pytest.raises(FormatError, match=r"Q4_K needs .* multiple of 256 .* got 4000"):
        byte_shape((2, 4000), FORMATS["Q4_K"], "a.w")
    with pytest.raises(FormatError, match="34 bytes, which does not divide rows of 35 bytes"):
        logical_shape((2, 35), FORMATS["Q8_0"], "a.w")


def test_a_scalar_takes_one_element():
    assert byte_shape((), FORMATS["F32"]) == (4,)
    assert FORMATS["Q8_0"].bits_per_element == 8.5
    assert FORMATS["BF16"].dtype is torch.bfloat16
