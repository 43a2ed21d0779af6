"""Conversion to GGUF: what ComfyUI-GGUF asks of a file, round trips, kills, disks, mistakes."""

import errno
import json
import math
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from flavour_files import bnb_4bit, normal, nvfp4, official_fp8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ltxlite.convert.file as convert_file
import ltxlite.convert.plan as convert_plan
import ltxlite.convert.rows as convert_rows
from ltxlite.checkpoint.files import ModelFiles
from ltxlite.cli import INTERRUPTED, main
from ltxlite.convert.file import PartialFile
from ltxlite.convert.gemma import pieces_of
from ltxlite.convert.layout import lay_out, shape_keys
from ltxlite.convert.run import Conversion, Converted, convert
from ltxlite.demo import CONFIG
from ltxlite.errors import BudgetError, CheckpointError, RequestError
from ltxlite.models.connector import Connector, ConnectorConfig
from ltxlite.models.settings import Settings
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.networks import Networks
from ltxlite.progress import Report
from ltxlite.release import release_name
from ltxlite_quant import FORMATS
from ltxlite_quant.gguf import GgufFile
from ltxlite_quant.policy import Decision, decide, recipe_named

GOLDEN = Path(__file__).parent / "golden" / "models"
MODEL = GOLDEN / "tiny-2.3-distilled.safetensors"
GEMMA = GOLDEN / "gemma3_tiny"
PREFIX = "model.diffusion_model."
RAW_TABLES = ("scale_shift_table", "learnable_registers")
Q8_0 = recipe_named("Q8_0")
SMALL = 264  # tensors of the fixture `small`
BF16_WORDS = ("adaln_single.", "patchify_proj.", "proj_out.", "to_gate_logits.")


def asked(
    target: Path, source: Path = MODEL, recipe: str = "Q8_0", part: str = "transformer"
) -> Conversion:
    return Conversion((source,), target, recipe_named(recipe), part, "full", "cpu")


def converted(target: Path, *rest: object) -> Converted:
    return convert(asked(target, *rest), Report())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def changed(folder: Path, source: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Write a checkpoint with its tensors changed; the name keeps its words."""
    tensors = load_file(source)
    change(tensors)
    path = folder / "changed-distilled.safetensors"
    save_file(tensors, path, metadata_of(source))
    return path


def source_tensors() -> dict[str, Tensor]:
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in load_file(MODEL).items()
        if name.startswith(PREFIX)
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of the tiny transformer and one layer of its connectors."""
    metadata = metadata_of(MODEL)
    config = json.loads(metadata["config"])
    config["transformer"] |= {"num_layers": 2, "connector_num_layers": 1}
    dropped = re.compile(r"transformer_blocks\.[23]\.|transformer_1d_blocks\.1\.")
    tensors = {PREFIX + n: t for n, t in source_tensors().items() if not dropped.search(n)}
    path = tmp_path_factory.mktemp("small") / "small-2.3-distilled.safetensors"
    save_file(tensors, path, metadata | {"config": json.dumps(config)})
    return path


@pytest.fixture(scope="module")
def small_written(small: Path) -> Path:
    """The same in Q8_0, beside it."""
    target = small.with_name("small-distilled-Q8_0.gguf")
    converted(target, small)
    return target


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny transformer in Q8_0."""
    target = tmp_path_factory.mktemp("gguf") / "tiny-distilled-Q8_0.gguf"
    converted(target)
    return target


@pytest.fixture(scope="module")
def reader(written: Path) -> gguf.GGUFReader:
    """The same, as ComfyUI-GGUF sees it."""
    return gguf.GGUFReader(written)


def field(reader: gguf.GGUFReader, name: str) -> tuple[object, list[gguf.GGUFValueType]]:
    found = reader.fields[name]
    return found.contents(), found.types


# What ComfyUI-GGUF asks of a file: formats.md 4.1, by number.


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


# Round trips.


def test_a_converted_model_makes_a_clip(tmp_path: Path, written: Path) -> None:
    clip = tmp_path / "clip.mp4"
    parts = ("--text-projection", "--vae", "--audio-vae")
    files = [word for flag in parts for word in (flag, str(MODEL))]
    arguments = ["generate", "--model", str(written), *files, "--text-encoder", str(GEMMA)]
    arguments += ["--prompt", "rain", "--size", "128x64", "--frames", "9", "--quality", "draft"]
    assert main([*arguments, "--quiet", "-o", str(clip)]) == 0
    assert clip.stat().st_size > 1000


def test_the_command_line_reports_errors_by_group_and_companions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a-distilled.gguf"
    arguments = ["convert", str(MODEL), str(target), "--type", "Q4_0", "--device", "cpu"]
    assert main([*arguments, "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    errors = {row["group"]: row for row in told["errors"]}
    found = errors["transformer_blocks.N.attn1.to_q.weight"]
    assert (found["format"], found["tensors"]) == ("Q4_0", 4)
    # formats.md 2.0: 0.0859 for gaussian weights; a sample of four rows varies by a few percent.
    assert abs(found["relative_error"] - 0.0859) < 0.02
    assert errors["transformer_blocks.N.ff.net.2.weight"]["format"] == "Q4_1"
    assert told["nbytes"] == target.stat().st_size
    assert any("text projection" in line for line in told["companions"])
    assert main([*arguments, "--overwrite"]) == 0
    output = capsys.readouterr()
    assert "relative error:" in output.out
    assert "ComfyUI-GGUF of January 2026" in output.out
    assert "verify" in output.err


def test_a_gguf_source_of_the_same_type_is_copied_without_loss(
    tmp_path: Path, written: Path
) -> None:
    again = tmp_path / "again-distilled.gguf"
    result = converted(again, written, "Q8_0")
    assert any("what they lost stays lost" in note for note in result.notes)
    first, second = gguf.GGUFReader(written), gguf.GGUFReader(again)
    for one, two in zip(first.tensors, second.tensors, strict=True):
        assert one.name == two.name
        assert np.array_equal(one.data, two.data), one.name
    assert {row.relative_error for row in result.errors} == {0.0}


WRITERS = {
    "fp8": official_fp8,
    "nvfp4": nvfp4,  # stored padded
    "nf4": lambda layer, weight: bnb_4bit(layer, weight, "nf4", nested=True),
}


@pytest.mark.parametrize("flavour", sorted(WRITERS))
def test_quantized_sources_are_decoded_row_by_row(
    tmp_path: Path, small: Path, flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_rows, "CHUNK_VALUES", 64 * 7)  # rows in pieces of seven

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("attn1.to_q.weight")]:
            layer = name.removesuffix(".weight")
            tensors |= WRITERS[flavour](layer, tensors.pop(name).float())

    source = changed(tmp_path, small, quantize)
    result = converted(tmp_path / "x.gguf", source, "BF16")
    assert any("stays lost" in note for note in result.notes)
    loader = ModelFiles.open([source]).models[0].named("transformer")
    with GgufFile(tmp_path / "x.gguf") as file:
        for block in range(2):
            name = f"transformer_blocks.{block}.attn1.to_q.weight"
            loaded = loader[name].load()
            shape = file.tensors[name].shape
            assert shape == (64, 64)
            values = loaded.dequantize()[: shape[0], : shape[1]]  # type: ignore[union-attr]
            assert torch.equal(file.load(name), values.bfloat16())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer whose rows are whole blocks of 256, one block and one connector layer."""
    width = {"attention_head_dim": 128, "cross_attention_dim": 256}
    shared = CONFIG["transformer"] | {"num_layers": 1, "connector_num_learnable_registers": 3}
    settings = shared | width | {f"audio_{name}": size for name, size in width.items()}
    heads = ("connector_attention_head_dim", "audio_connector_attention_head_dim")
    settings |= dict.fromkeys(heads, 128)
    read = Settings(settings, "wide")
    with torch.device("meta"):
        networks: dict[str, torch.nn.Module] = {
            "transformer": Transformer(TransformerConfig.from_settings(read)),
            "video_connector": Connector(ConnectorConfig.from_settings(read)),
            "audio_connector": Connector(ConnectorConfig.from_settings(read, sound=True)),
        }
    tensors = {
        release_name(part, name): normal(*value.shape).bfloat16()
        for part, network in networks.items()
        for name, value in network.state_dict().items()
    }
    path = tmp_path_factory.mktemp("wide") / "wide-dev.safetensors"
    save_file(tensors, path, {"config": json.dumps({"transformer": settings})})
    return path


# formats.md 2.0, gaussian weights with the reference quantizer; ours may not be worse, and a
# matrix of 65536 weights varies by a percent.
K_ERRORS = {"Q2_K": 0.2965, "Q3_K": 0.1508, "Q4_K": 0.0714, "Q5_K": 0.0361, "Q6_K": 0.0178}


@pytest.mark.parametrize("recipe", ["Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_k_recipes_write_what_gguf_py_decodes_within_the_errors_of_their_formats(
    tmp_path: Path, wide: Path, recipe: str
) -> None:
    quick = Conversion((wide,), tmp_path / "x.gguf", recipe_named(recipe), verify="none")
    convert(quick, Report())
    source = {name.removeprefix(PREFIX): value for name, value in load_file(wide).items()}
    decisions = decide(recipe_named(recipe), {name: tuple(v.shape) for name, v in source.items()})
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(quick.target).tensors}
    assert theirs.keys() == source.keys()
    seen = set()
    for name, tensor in theirs.items():
        kind = tensor.tensor_type.name
        if kind not in K_ERRORS:
            continue
        seen.add(kind)
        exact = source[name].float().numpy()
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        error = np.linalg.norm(decoded - exact) / np.linalg.norm(exact)
        assert 0.5 * K_ERRORS[kind] < error < 1.02 * K_ERRORS[kind], name
    assert seen == {item.format.name for item in decisions} & K_ERRORS.keys()


def states(path: Path) -> Tensor:
    loaded = Networks(ModelFiles.open([path]), torch.device("cpu"), torch.float32)
    return torch.stack(list(loaded.gemma().states(torch.tensor([[2, 17, 300, 41, 5, 17]]))))


def test_a_text_encoder_becomes_what_llama_cpp_would_write(tmp_path: Path) -> None:
    target = tmp_path / "gemma.gguf"
    result = converted(target, GEMMA, "BF16", "text_encoder")
    theirs = gguf.GGUFReader(target)
    assert field(theirs, "general.architecture")[0] == "gemma3"
    assert field(theirs, "gemma3.block_count") == (8, [gguf.GGUFValueType.UINT32])
    assert field(theirs, "gemma3.attention.sliding_window")[0] == 64
    names = {tensor.name for tensor in theirs.tensors}
    assert len(names) == 8 * 13 + 2
    assert {"token_embd.weight", "output_norm.weight", "blk.7.ffn_down.weight"} <= names
    assert any("what reads pictures stays out" in note for note in result.notes)
    ours, wanted = states(target), states(GEMMA)
    # The source is bf16, so only w + 1 rounds once more: 6e-8 a norm, 33 of them.
    assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()
    tokenizers = [
        Networks(ModelFiles.open([path]), torch.device("cpu"), torch.float32).tokenizer()
        for path in (target, GEMMA)
    ]
    assert tokenizers[0].where == f"{target}: tokenizer.ggml.*"
    for prompt in ("A golden retriever,  at dawn", "x\n\n  y <image_soft_token>", "日本 dorée"):
        assert tokenizers[0].encode(prompt) == tokenizers[1].encode(prompt)


def test_a_gguf_text_encoder_keeps_norms_keys_and_vocabulary(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    converted(first, GEMMA, "F16", "text_encoder")
    converted(second, first, "Q8_0", "text_encoder")
    one, two = gguf.GGUFReader(first), gguf.GGUFReader(second)
    kept = [name for name in one.fields if name.startswith(("gemma3.", "tokenizer."))]
    assert len(kept) == 13 + 12
    for name in kept:
        assert one.fields[name].types == two.fields[name].types, name
        assert one.fields[name].contents() == two.fields[name].contents(), name
    norms = [{t.name: t.data for t in f.tensors if "norm" in t.name} for f in (one, two)]
    assert norms[0].keys() == norms[1].keys()
    assert all(np.array_equal(norms[0][name], norms[1][name]) for name in norms[0])


@pytest.mark.parametrize("part", ["text_projection", "vae", "audio_vae"])
def test_other_parts_lose_no_tensor_and_load_as_the_same_network(tmp_path: Path, part: str) -> None:
    target = tmp_path / f"{part}.gguf"
    converted(target, MODEL, "BF16", part)
    ours, source = ModelFiles.open([target]).models[0], ModelFiles.open([MODEL]).models[0]
    for component in ours.components:
        assert ours.named(component).keys() == source.named(component).keys()
    assert set(ours.components) >= set(convert_plan.PARTS[part].needed)
    both = [
        Networks(ModelFiles([model]), torch.device("cpu"), torch.float32)
        for model in (ours, source)
    ]
    loaders = {
        "text_projection": (),
        "vae": ("video_decoder", "video_encoder"),
        "audio_vae": ("audio_decoder", "audio_encoder", "vocoder"),
    }
    for name in loaders[part]:
        first, second = (getattr(networks, name)().state_dict() for networks in both)
        assert first.keys() == second.keys()
        for key in first:
            # bf16 in the source, but for the mel filters and statistics, which are fp32 vectors
            # or matrices: a bf16 has 8 bits.
            assert torch.allclose(first[key], second[key], rtol=2**-8, atol=0), key


# Kills and resumption.


class Killed(Report):
    """Stops the work like Ctrl-C, after so many reports of progress."""

    def __init__(self, after: int, stop: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.stop = after, stop

    def advance(self, done: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.stop


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def killed(target: Path, small: Path, after: int = 100) -> tuple[Path, Path]:
    with pytest.raises(KeyboardInterrupt):
        convert(asked(target, small), Killed(after))
    part = target.with_name(f"{target.name}.ltxlite-part")
    journal = target.with_name(f"{target.name}.ltxlite-journal")
    assert beside(target) == [journal.name, part.name]
    return part, journal


@pytest.mark.parametrize(
    "after", [2, 101, 2 * SMALL, 2 * SMALL + 4]
)  # half-way, at the end, while verified
def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, small_written: Path, after: int, small: Path
) -> None:
    target = tmp_path / small_written.name
    killed(target, small, after)
    result = converted(target, small)
    assert result.resumed == min(SMALL, after // 2)
    assert target.read_bytes() == small_written.read_bytes()
    assert beside(target) == [target.name]


def test_a_conversion_killed_before_its_first_tensor_leaves_nothing(
    tmp_path: Path, small: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(asked(tmp_path / "x.gguf", small), Killed(1))
    assert beside(tmp_path / "x.gguf") == []


def test_ctrl_c_is_told_with_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    monkeypatch.setattr("ltxlite.cli.show.Terminal.advance", Killed(40).advance.__func__)
    monkeypatch.setattr("ltxlite.cli.show.Terminal.left", 40, raising=False)
    monkeypatch.setattr("ltxlite.cli.show.Terminal.stop", KeyboardInterrupt, raising=False)
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "--type", "Q8_0"]) == INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "file cut": lambda part, _: part.write_bytes(part.read_bytes()[:400_000]),
    "file empty": lambda part, _: part.write_bytes(b""),
    "bytes flipped": lambda part, _: flip(part, 300_000),
    "header flipped": lambda part, _: flip(part, 100),
    "journal cut in a line": lambda _, journal: journal.write_bytes(journal.read_bytes()[:-9]),
    "journal of one line": lambda _, journal: journal.write_bytes(
        journal.read_bytes().split(b"\n")[0]
    ),
}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + 64] = bytes(byte ^ 0xFF for byte in data[offset : offset + 64])
    path.write_bytes(data)


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_what_is_damaged_in_a_partial_file_is_written_anew(
    tmp_path: Path, small_written: Path, case: str, small: Path
) -> None:
    target = tmp_path / small_written.name
    part, journal = killed(target, small, 300)
    DAMAGE[case](part, journal)
    result = converted(target, small)
    assert result.resumed < 150 or case == "header flipped"
    assert target.read_bytes() == small_written.read_bytes()


def test_a_conversion_killed_twice_still_remembers_the_first_run(
    tmp_path: Path, small_written: Path, small: Path
) -> None:
    target = tmp_path / small_written.name
    _, journal = killed(target, small, 150)
    journal.write_bytes(journal.read_bytes()[:-5])  # the kill came in the middle of a line
    killed(target, small, 200)
    assert converted(target, small).resumed > 80
    assert target.read_bytes() == small_written.read_bytes()


def test_a_partial_file_of_another_recipe_or_source_is_not_touched(
    tmp_path: Path, small: Path
) -> None:
    target = tmp_path / "x.gguf"
    part, journal = killed(target, small)
    before = part.read_bytes(), journal.read_bytes()
    with pytest.raises(RequestError, match="unfinished file of another conversion"):
        converted(target, small, "Q4_0")

    def finetune(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}proj_out.bias"] += 1  # the header stays what it was

    other = changed(tmp_path, small, finetune)
    with pytest.raises(RequestError, match="unfinished file of another conversion"):
        converted(target, other, "Q8_0")
    assert (part.read_bytes(), journal.read_bytes()) == before
    assert converted(target, small).resumed == 50


def test_a_part_file_without_a_journal_is_somebody_elses(tmp_path: Path, small: Path) -> None:
    part = tmp_path / "x.gguf.ltxlite-part"
    part.write_bytes(b"mine")
    with pytest.raises(RequestError, match="of another conversion"):
        converted(tmp_path / "x.gguf", small)
    assert part.read_bytes() == b"mine"


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    layout = lay_out([Decision("a", (3,), FORMATS["F32"], "")], {})
    with (
        PartialFile(tmp_path / "x.gguf", layout, "same"),
        pytest.raises(RequestError, match=r"x\.gguf: another process is writing"),
        PartialFile(tmp_path / "x.gguf", layout, "same"),
    ):
        pass
    assert beside(tmp_path / "x.gguf") == []


# Disks.


def full(after: int) -> Callable[..., None]:
    calls = iter(range(after))

    def write(file, data) -> None:  # type: ignore[no-untyped-def]
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(data)

    return write


def test_a_disk_that_fills_up_keeps_what_is_done(
    tmp_path: Path, small_written: Path, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    target = tmp_path / small_written.name
    with monkeypatch.context() as patch:
        patch.setattr(convert_file, "_write_all", full(after=100))
        with pytest.raises(BudgetError, match=r"the disk is full; .* the same command again"):
            converted(target, small)
    assert not target.exists()
    assert converted(target, small).resumed == 99  # and the header
    assert target.read_bytes() == small_written.read_bytes()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert_file.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BudgetError, match=r"x\.gguf: needs 0\.00 GB more on a disk with 0\.00 GB"):
        converted(tmp_path / "x.gguf", small)
    assert beside(tmp_path / "x.gguf") == []


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run, expect exit 1 and one line; returns it."""
    assert main(["convert", *map(str, arguments), "--quiet"]) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("ltxlite: ")
    assert "\n" not in message
    return message


def test_targets_that_cannot_be_written_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    (tmp_path / "file").write_text("x")
    assert "file is no folder" in refused(capsys, small, tmp_path / "file" / "sub" / "x.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert "is a folder" in refused(capsys, small, tmp_path / "folder.gguf")
    assert "must be called .gguf" in refused(capsys, small, tmp_path / "x.safetensors")


def test_an_input_is_never_overwritten(
    tmp_path: Path, small_written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.gguf"
    source.write_bytes(small_written.read_bytes())
    before = source.read_bytes()
    assert "is one of the inputs" in refused(capsys, source, source, "--overwrite")
    link = tmp_path / "b.gguf"
    link.hardlink_to(source)
    assert "is one of the inputs" in refused(capsys, source, link, "--overwrite")
    assert source.read_bytes() == before


def test_a_file_that_exists_is_replaced_only_if_asked_and_only_at_the_end(
    tmp_path: Path, small_written: Path, capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"older")
    assert "exists already" in refused(capsys, small, target)
    replacing = Conversion((small,), target, recipe_named("Q8_0"), overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        convert(replacing, Killed(2 * SMALL + 9))
    assert target.read_bytes() == b"older"
    convert(replacing, Report())
    assert target.read_bytes() == small_written.read_bytes()


# Mistakes.


@pytest.mark.parametrize(
    ("source", "part", "words"),
    [
        (GOLDEN / "tiny-2.3-spatial-upscaler-x2.safetensors", "transformer", "hold upscaler"),
        (GEMMA, "transformer", "no transformer to convert"),
        (MODEL, "text_encoder", "no text encoder to convert"),
        (GOLDEN / "nothing.safetensors", "transformer", "no such file"),
    ],
)
def test_inputs_without_the_part_are_told_by_what_they_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: Path, part: str, words: str
) -> None:
    target = tmp_path / "x.gguf"
    assert words in refused(capsys, source, target, "--component", part, "--type", "Q8_0")
    assert beside(target) == []


def without(*words: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if any(word in n for word in words)]:
            del tensors[name]

    return change


def with_value(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[PREFIX + name] = value(tensors[PREFIX + name])

    return change


QUERY = "transformer_blocks.1.attn1.to_q.weight"
MISTAKES = {
    "no connectors": (without("_connector."), "no video connector to convert"),
    "a weight missing": (without("blocks.1.attn2.to_v.weight"), "1 tensors are missing"),
    "a surplus": (
        lambda t: t.update({f"{PREFIX}transformer_blocks.0.extra.weight": torch.ones(2, 2)}),
        "1 are not part of the network",
    ),
    "a shape": (with_value(QUERY, lambda v: v[:, :32].contiguous()), "have another shape"),
    "a nan": (with_value(QUERY, lambda v: v.fill_(math.nan)), "attn1.to_q.weight holds NaN"),
    "integers": (with_value("proj_out.bias", lambda v: v.int()), "I32 without scales"),
}


@pytest.mark.parametrize("case", sorted(MISTAKES))
def test_incomplete_and_damaged_models_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, small: Path
) -> None:
    change, words = MISTAKES[case]
    source = changed(tmp_path, small, change)
    assert words in refused(capsys, source, tmp_path / "x.gguf", "--type", "Q8_0")
    assert not (tmp_path / "x.gguf").exists()


def test_values_beyond_a_format_name_tensor_and_value(tmp_path: Path, small: Path) -> None:
    source = changed(tmp_path, small, with_value(QUERY, lambda v: v.fill_(1e8)))
    with pytest.raises(CheckpointError, match=rf"{QUERY}: F16 holds no 1e\+08"):
        converted(tmp_path / "x.gguf", source, "F16")
    with pytest.raises(CheckpointError, match=rf"{QUERY}: Q8_0 holds finite values up to"):
        converted(tmp_path / "y.gguf", source, "Q8_0")


def test_types_without_an_encoder_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    monkeypatch.setattr(convert_plan, "ENCODERS", {"Q8_0": None})
    monkeypatch.setattr(convert_plan, "PLANS", {"Q4_K": None})
    with pytest.raises(CheckpointError, match="would become Q5_1, which ltxlite cannot write"):
        converted(tmp_path / "x.gguf", small, "Q5_1")
    assert beside(tmp_path / "x.gguf") == []


def test_unknown_recipes_parts_and_devices_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    target = tmp_path / "x.gguf"
    assert "choose Q2_K" in refused(capsys, small, target, "--type", "Q7")
    assert "unknown" in refused(capsys, small, target, "--type", "Q8_0", "--device", "tpu9")
    with pytest.raises(RequestError, match="no part is called 'dit'"):
        asked(target, small, "Q8_0", "dit")
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "Q8_0"\n[[rules]]\nmatch = "to_q"\nformat = "Q5_0"')
    assert main(["convert", str(small), str(target), "--recipe", str(recipe), "--quiet"]) == 0
    with GgufFile(target) as file:
        assert file.tensors[QUERY].format.name == "Q5_0"
        assert json.loads(file.metadata["ltxlite.quant_recipe"])["name"] == "mine"


def test_a_model_without_configuration_is_converted_with_a_warning(
    tmp_path: Path, small: Path
) -> None:
    source = tmp_path / "bare-distilled.safetensors"
    save_file(load_file(small), source)
    notes = converted(tmp_path / "x.gguf", source, "Q8_0").notes
    assert any("no configuration in the source" in note for note in notes)
    sidecar = tmp_path / f"{source.name}.config.json"
    sidecar.write_text(metadata_of(small)["config"], encoding="utf-8")
    assert converted(tmp_path / "y.gguf", source, "Q8_0").notes == []


def test_connectors_of_another_file_come_along(tmp_path: Path, small: Path) -> None:
    alone = changed(tmp_path, small, without("_connector."))
    both = Conversion((alone, small), tmp_path / "x.gguf", recipe_named("Q8_0"))
    convert(both, Report())
    with GgufFile(tmp_path / "x.gguf") as file:
        assert len(file.tensors) == SMALL
        files = [source["file"] for source in json.loads(file.metadata["ltxlite.sources"])]
        assert sorted(files) == sorted([alone.name, small.name])


def test_a_2_0_transformer_leaves_the_connectors_in_their_own_file(tmp_path: Path) -> None:
    from test_family_20 import SETTINGS, random_transformer

    source = tmp_path / "ltx-2-19b-dev.safetensors"
    weights = {
        release_name("transformer", n): v for n, v in random_transformer().state_dict().items()
    }
    config = json.dumps({"transformer": SETTINGS})
    save_file({n: v.contiguous() for n, v in weights.items()}, source, {"config": config})
    result = converted(tmp_path / "x.gguf", source, "Q8_0")
    assert result.family == "2.0"
    assert any("connectors stay in their own file" in note for note in result.notes)
    with GgufFile(tmp_path / "x.gguf") as file:
        assert len(file.tensors) == len(weights)
        assert file.tensors["caption_projection.linear_1.weight"].format.name == "BF16"


# Verification.


def test_bytes_that_change_on_the_disk_are_found_before_the_file_gets_its_name(
    tmp_path: Path, small_written: Path, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    target = tmp_path / small_written.name
    with GgufFile(small_written) as file:
        entry = file.tensors[QUERY]

    def rot(partial: PartialFile) -> None:
        flip(partial.path, entry.offset + 40)

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "sync", rot)
        with pytest.raises(CheckpointError, match=f"{QUERY} does not read back as it was written"):
            converted(target, small)
    assert not target.exists()
    assert converted(target, small).resumed == SMALL - 1  # the checksum gave it away
    assert target.read_bytes() == small_written.read_bytes()


def test_a_format_that_fits_a_tensor_badly_is_noted_and_no_error(
    tmp_path: Path, small: Path
) -> None:
    def spiky(values: Tensor) -> Tensor:
        values.fill_(1e-3)
        values[:, ::32] = 1.0  # one value of each block takes all the levels
        values[:, 5::32] = -0.03
        return values

    source = changed(tmp_path, small, with_value(QUERY, spiky))
    result = converted(tmp_path / "x.gguf", source, "Q4_0")
    assert not [note for note in result.notes if QUERY in note]  # the large values hold
    flat = with_value(QUERY, lambda v: v.copy_(torch.randint(-1, 2, v.shape) * 1e-8))
    result = converted(tmp_path / "y.gguf", changed(tmp_path, small, flat), "Q4_0")
    assert [note for note in result.notes if f"{QUERY}: 1.000 of relative error" in note]


def test_without_verification_there_is_no_report_of_errors(
    tmp_path: Path, small_written: Path, small: Path
) -> None:
    quick = Conversion((small,), tmp_path / small_written.name, recipe_named("Q8_0"), verify="none")
    assert convert(quick, Report()).errors == []
    assert quick.target.read_bytes() == small_written.read_bytes()


def test_a_sample_covers_every_tensor_and_all_of_it_with_full(tmp_path: Path, small: Path) -> None:
    sample = Conversion((small,), tmp_path / "x.gguf", recipe_named("Q8_0"))
    few = convert(sample, Report()).errors
    every = converted(tmp_path / "y.gguf", small).errors
    assert sum(row.tensors for row in few) == sum(row.tensors for row in every) == SMALL
    assert sum(row.weights for row in every) == sum(t.numel() for t in load_file(small).values())
    assert sum(row.weights for row in few) < sum(row.weights for row in every)


# Memory and progress.


class Listener(Report):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, int]] = []
        self.steps: list[int] = []

    def begin(self, part: str, steps: int) -> None:
        self.parts.append((part, steps))
        self.steps = []

    def advance(self, done: int) -> None:
        assert done >= (self.steps[-1] if self.steps else 0)
        self.steps.append(done)


def sparse_projection(path: Path, rows: int, columns: int) -> Path:
    """Write a text projection of which no block is on the disk."""
    header: dict[str, object] = {}
    offset = 0
    for name in ("video", "audio"):
        for leaf, shape in (("weight", [rows, columns]), ("bias", [rows])):
            nbytes = 2 * math.prod(shape)
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
            header[f"text_embedding_projection.{name}_aggregate_embed.{leaf}"] = entry
            offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


STATUS = Path("/proc/self/status")


class Watch(threading.Thread):
    """Follows the anonymous memory of this process, every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.peak = self.anonymous()
        self.stopped = threading.Event()

    @staticmethod
    def anonymous() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
        assert found
        return int(found[1]) << 10

    def run(self) -> None:
        while not self.stopped.wait(0.001):
            self.peak = max(self.peak, self.anonymous())


@pytest.mark.skipif(not STATUS.exists(), reason="anonymous memory is read from /proc")
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_rows, "CHUNK_VALUES", 1 << 18)
    # Two matrices of 16 Mi weights: 34 MB each in bf16, 67 MB as fp32, 36 MB together as Q8_0.
    source = sparse_projection(tmp_path / "x.safetensors", 3277, 5120)
    watch = Watch()
    watch.start()
    convert(Conversion((source,), tmp_path / "x.gguf", Q8_0, "text_projection"), Report())
    watch.stopped.set()
    watch.join()
    # A chunk is 1 MiB of fp32; with the encoder's temporaries and the sample's fp64 values 10 MiB.
    assert watch.peak - watch.base < 24 << 20


def test_progress_ends_at_the_number_of_steps_announced(tmp_path: Path) -> None:
    listener = Listener()
    source = sparse_projection(tmp_path / "x.safetensors", 130, 10240)
    convert(asked(tmp_path / "x.gguf", source, "Q8_0", "text_projection"), listener)
    assert listener.parts == [("convert, M", 2), ("verify", 4)]
    assert listener.steps[-1] == 4


def test_a_damaged_tokenizer_is_refused() -> None:
    for data in (b"\x0a\x05ab", b"\x0a\x02\x10\x01", b"\xff" * 12, b"\x0a\x04\x0a\x02\xff\xfe"):
        with pytest.raises(CheckpointError, match=r"x: its tokenizer is no SentencePiece model"):
            list(pieces_of(data, "x"))
