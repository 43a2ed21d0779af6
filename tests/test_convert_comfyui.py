"""What ComfyUI-GGUF asks of a file, requirement by requirement: formats.md 4.1, by number."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from convert_support import MODEL, converted, field, metadata_of, source_tensors

from ltxlite.convert.layout import lay_out, shape_keys
from ltxlite_quant import FORMATS
from ltxlite_quant.gguf import GgufFile
from ltxlite_quant.policy import Decision

pytest_plugins = ("convert_fixtures",)

RAW_TABLES = ("scale_shift_table", "learnable_registers")

BF16_WORDS = ("adaln_single.", "patchify_proj.", "proj_out.", "to_gate_logits.")


def test_names_are_bare_since_with_one_prefixed_name_all_others_are_dropped(
    reader: gguf.GGUFReader,
) -> None:  # 1
    names = [tensor.name for tensor in reader.tensors]
    assert sorted(names) == sorted(source_tensors())
    assert not any(name.startswith(("model.", "diffusion_model.")) for name in names)


def test_the_architecture_is_the_one_word_it_knows_and_comes_first(
    reader: gguf.GGUFReader,
) -> None:  # 2
    assert field(reader, "general.architecture") == ("ltxv", [gguf.GGUFValueType.STRING])
    keys = [name for name in reader.fields if not name.startswith("GGUF.")]
    assert keys[:3] == [
        "general.architecture",
        "general.quantization_version",
        "general.file_type",
    ]
    assert field(reader, "general.quantization_version") == (2, [gguf.GGUFValueType.UINT32])
    assert field(reader, "general.file_type") == (7, [gguf.GGUFValueType.UINT32])


def test_shapes_are_those_of_the_source(reader: gguf.GGUFReader) -> None:  # 3
    source = source_tensors()
    for tensor in reader.tensors:
        assert tuple(tensor.shape[::-1]) == tuple(source[tensor.name].shape), tensor.name


def test_a_leading_one_and_a_fifth_dimension_survive_in_a_key(tmp_path: Path) -> None:  # 3
    shapes = {"keyframes_abs_pos_embedding": (1, 64), "conv.weight": (2, 3, 3, 3, 3), "x": (4, 5)}
    decisions = [Decision(name, shape, FORMATS["F32"], "") for name, shape in shapes.items()]
    keys = shape_keys(decisions)
    assert list(keys) == [f"comfy.gguf.orig_shape.{name}" for name in list(shapes)[:2]]
    layout = lay_out(decisions, keys)
    path = tmp_path / "x.gguf"
    path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    with GgufFile(path) as file:
        assert {name: entry.shape for name, entry in file.tensors.items()} == shapes
    theirs = gguf.GGUFReader(path)
    (element,) = {theirs.fields[name].types[-1] for name in keys}
    assert element == gguf.GGUFValueType.INT32
    assert [list(t.shape) for t in theirs.tensors] == [[64, 1], [81, 2], [5, 4]]


def test_what_no_layer_owns_is_f32_and_what_is_sensitive_bf16(reader: gguf.GGUFReader) -> None:  # 4
    for tensor in reader.tensors:
        raw = len(tensor.shape) == 1 or any(word in tensor.name for word in RAW_TABLES)
        sensitive = any(word in tensor.name for word in BF16_WORDS)
        wanted = "F32" if raw else "BF16" if sensitive else "Q8_0"
        assert tensor.tensor_type.name == wanted, tensor.name


def test_the_official_configuration_is_a_string_called_config(reader: gguf.GGUFReader) -> None:  # 5
    config, types = field(reader, "config")
    assert types == [gguf.GGUFValueType.STRING]
    assert json.loads(str(config)) == json.loads(metadata_of(MODEL)["config"])
    assert "\n" not in str(config)


def test_own_keys_are_strings_which_it_hands_on_and_tell_where_the_file_is_from(
    reader: gguf.GGUFReader,
) -> None:  # 5
    own = [name for name in reader.fields if name.startswith("ltxlite.")]
    assert all(field(reader, name)[1] == [gguf.GGUFValueType.STRING] for name in own)
    (source,) = json.loads(str(field(reader, "ltxlite.sources")[0]))
    assert (source["file"], source["bytes"]) == (MODEL.name, MODEL.stat().st_size)
    assert len(source["header_sha256"]) == 64
    assert json.loads(str(field(reader, "ltxlite.quant_recipe")[0]))["name"] == "Q8_0"
    assert field(reader, "ltxlite.variant")[0] == "distilled"
    assert field(reader, "ltxlite.family")[0] == "2.3"
    assert field(reader, "model_version")[0] == "2.3.0"


def test_no_linear_is_missing_since_it_fills_in_zeros(reader: gguf.GGUFReader) -> None:  # 6
    names = {tensor.name for tensor in reader.tensors}
    assert sum("_embeddings_connector." in name for name in names) == 2 * (2 * 16 + 1)
    weights = [name for name in source_tensors() if name.endswith(".weight")]
    assert names >= set(weights)


@pytest.mark.parametrize("recipe", ["Q4_0", "Q5_1", "Q8_0"])
def test_only_types_with_a_torch_decoder_there_are_used(tmp_path: Path, recipe: str) -> None:  # 7
    result = converted(tmp_path / "x.gguf", MODEL, recipe)
    fast = {"F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"}
    assert set(result.formats) <= fast | {"Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"}


def test_names_fit_its_limit_and_tensors_are_aligned(reader: gguf.GGUFReader) -> None:
    for tensor in reader.tensors:
        assert len(tensor.name.encode()) <= 127
        assert tensor.data_offset % 32 == 0


def test_the_bytes_are_those_of_gguf_py(reader: gguf.GGUFReader) -> None:
    source = source_tensors()
    for tensor in reader.tensors:
        values = source[tensor.name].float().numpy()
        wanted = gguf.quants.quantize(values, tensor.tensor_type)
        assert np.array_equal(tensor.data.view(np.uint8), wanted.view(np.uint8)), tensor.name
