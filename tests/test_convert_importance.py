"""Conversion with importances: the blocks, what is told of them, what is not taken."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ltxlite.cli import main
from ltxlite.convert.run import Conversion, Converted, convert
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.importance import Importance, sha256_of, write_importance
from ltxlite.progress import Report
from ltxlite_quant import FORMATS
from ltxlite_quant.policy import recipe_named
from ltxlite_quant.search import quantize

GOLDEN = Path(__file__).parent / "golden" / "models"
MODEL = GOLDEN / "tiny-2.3-distilled.safetensors"
GEMMA = GOLDEN / "gemma3_tiny"
PREFIX = "model.diffusion_model."
# The searched format whose blocks of 32 fit the rows of the tiny models.
KIND = "IQ4_NL"


@cache
def model() -> dict[str, Tensor]:
    return load_file(MODEL)


def measured(names: dict[str, int], seed: int = 0) -> Importance:
    """Return importances of every matrix: some inputs count a hundred times as much as others."""
    random = torch.Generator().manual_seed(seed)
    moments = {
        name: (2 * torch.randn(columns, generator=random)).exp() for name, columns in names.items()
    }
    return Importance(moments, dict.fromkeys(names, 77), 3, ({"file": "x.safetensors"},))


def matrices() -> dict[str, int]:
    """Return the inputs of the transformer's matrices by release name."""
    return {
        name: tensor.shape[1]
        for name, tensor in model().items()
        if name.startswith(f"{PREFIX}transformer_blocks.") and name.endswith(".weight")
        if tensor.dim() == 2
    }


def asked(target: Path, importance: Path | None, recipe: str = KIND) -> Conversion:
    conversion = Conversion((MODEL,), target, recipe_named(recipe), "transformer", "full", "cpu")
    return replace(conversion, importance=importance)


def written(path: Path, importance: Importance) -> Path:
    write_importance(path, importance)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weighed")


@pytest.fixture(scope="module")
def importance(folder: Path) -> Path:
    return written(folder / "importance.safetensors", measured(matrices()))


@pytest.fixture(scope="module")
def weighed(folder: Path, importance: Path) -> Converted:
    return convert(asked(folder / "weighed-distilled.gguf", importance), Report())


@pytest.fixture(scope="module")
def plain(folder: Path) -> Converted:
    return convert(asked(folder / "plain-distilled.gguf", None), Report())


def searched(path: Path) -> dict[str, gguf.ReaderTensor]:
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: tensor for tensor in tensors if tensor.tensor_type.name == KIND}


def source(name: str) -> Tensor:
    return model()[PREFIX + name].float()


def test_blocks_are_those_of_the_search_with_the_importance_of_their_matrix(
    weighed: Converted,
) -> None:
    found, given = searched(weighed.path), measured(matrices()).moments
    assert len(found) > 50
    for name, tensor in list(found.items())[::7]:
        wanted = quantize(source(name), FORMATS[KIND], importance=given[PREFIX + name])
        assert np.array_equal(tensor.data.view(np.uint8), wanted.blocks.numpy()), name


def error(tensor: gguf.ReaderTensor, weights: np.ndarray) -> float:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    miss = np.square(values - source(tensor.name).double().numpy())
    return float((miss * weights).sum())


def test_weighted_errors_as_gguf_py_decodes_them_are_smaller_and_plain_ones_larger(
    weighed: Converted, plain: Converted
) -> None:
    given = {name: value.double().numpy() for name, value in measured(matrices()).moments.items()}
    one, two = searched(weighed.path), searched(plain.path)
    assert one.keys() == two.keys()
    sums = np.zeros((2, 2))
    for name in list(one)[::5]:
        weights = given[PREFIX + name]
        both = (weights, np.ones_like(weights))
        sums += [[error(tensor, w) for w in both] for tensor in (one[name], two[name])]
    assert sums[0, 0] < 0.8 * sums[1, 0]
    assert sums[0, 1] > sums[1, 1]


def test_the_report_has_weighted_errors_of_groups(weighed: Converted, plain: Converted) -> None:
    assert all(row.weighted_error is None for row in plain.errors)
    rows = {row.group: row for row in weighed.errors}
    row = rows["transformer_blocks.N.attn1.to_q.weight"]
    names = [f"transformer_blocks.{block}.attn1.to_q.weight" for block in range(4)]
    given, found = measured(matrices()).moments, searched(weighed.path)
    weights = {name: given[PREFIX + name].double().numpy() for name in names}
    errors = sum(error(found[name], weights[name]) for name in names)
    sizes = sum((np.square(source(name).double().numpy()) * weights[name]).sum() for name in names)
    # Both in fp64, of the same fp32 values.
    assert row.weighted_error == pytest.approx(np.sqrt(errors / sizes), rel=1e-9)
    assert rows["transformer_blocks.N.attn1.to_q.bias"].weighted_error is None


def test_the_file_tells_where_its_importances_come_from(
    weighed: Converted, plain: Converted, importance: Path
) -> None:
    said = gguf.GGUFReader(weighed.path).fields["ltxlite.importance"]
    assert said.types == [gguf.GGUFValueType.STRING]
    assert json.loads(said.contents()) == {
        "file": importance.name,
        "sha256": sha256_of(importance),
        "prompts": 3,
        "models": [{"file": "x.safetensors"}],
    }
    assert "ltxlite.importance" not in gguf.GGUFReader(plain.path).fields
    assert any(note.startswith("importance.safetensors: importances of") for note in weighed.notes)


def test_matrices_without_importances_are_counted_and_all_inputs_of_theirs_count_alike(
    tmp_path: Path, plain: Converted
) -> None:
    names = matrices()
    left_out = [name for name in names if ".attn2." in name]
    some = {name: columns for name, columns in names.items() if name not in left_out}
    path = written(tmp_path / "some.safetensors", measured(some))
    result = convert(asked(tmp_path / "x-distilled.gguf", path), Report())
    found, unweighed = searched(result.path), searched(plain.path)
    missing = [name for name in found if PREFIX + name in left_out]
    assert missing
    (note,) = [note for note in result.notes if note.startswith("some.safetensors")]
    assert f"importances of {len(found) - len(missing)} of {len(found)} matrices" in note
    assert f"none of {missing[0]}" in note
    for name in missing:
        assert np.array_equal(found[name].data, unweighed[name].data), name


def test_a_recipe_without_a_search_is_told_that_importances_change_nothing(
    tmp_path: Path, importance: Path
) -> None:
    result = convert(asked(tmp_path / "x-distilled.gguf", importance, "Q8_0"), Report())
    assert any("it changes nothing" in note for note in result.notes)
    assert all(row.weighted_error is None for row in result.errors)


def test_a_text_encoder_finds_its_importances_under_names_of_llama_cpp(tmp_path: Path) -> None:
    matrix, columns = "model.layers.1.mlp.down_proj.weight", 128
    given = measured({matrix: columns})
    path = written(tmp_path / "x.safetensors", given)
    conversion = replace(asked(tmp_path / "x.gguf", path), sources=(GEMMA,), part="text_encoder")
    result = convert(conversion, Report())
    found = searched(result.path)["blk.1.ffn_down.weight"]
    shards = [load_file(shard) for shard in sorted(GEMMA.glob("*.safetensors"))]
    (weight,) = [
        value.float()
        for shard in shards
        for name, value in shard.items()
        if name.endswith(matrix.removeprefix("model."))
    ]
    wanted = quantize(weight, FORMATS[KIND], importance=given.moments[matrix])
    assert np.array_equal(found.data.view(np.uint8), wanted.blocks.numpy())


# Going on after a kill.


class Killed(Report):
    """Stops a conversion after some progress."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, done: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_killed_conversion_goes_on_with_the_same_importances_alone(
    tmp_path: Path, importance: Path, weighed: Converted
) -> None:
    target = tmp_path / "x-distilled.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(asked(target, importance), Killed(300))
    other = written(tmp_path / "importance.safetensors", measured(matrices(), seed=1))
    for changed in (other, None):
        with pytest.raises(RequestError, match="unfinished file of another conversion"):
            convert(asked(target, changed), Report())
    result = convert(asked(target, importance), Report())
    assert result.resumed > 10
    assert target.read_bytes() == weighed.path.read_bytes()


# Mistakes.


def test_importances_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    given = measured(matrices() | {f"{PREFIX}transformer_blocks.2.ff.net.2.weight": 255})
    path = written(tmp_path / "wrong.safetensors", given)
    with pytest.raises(
        CheckpointError, match=r"blocks\.2\.ff\.net\.2\.weight has 255 importances.* reads 256"
    ):
        convert(asked(tmp_path / "x-distilled.gguf", path), Report())
    assert not (tmp_path / "x-distilled.gguf").exists()


def test_importances_of_another_part_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", measured({"model.layers.0.mlp.up_proj.weight": 64}))
    with pytest.raises(CheckpointError, match="measured on another part or model"):
        convert(asked(tmp_path / "x-distilled.gguf", path), Report())


def test_the_command_line_prints_weighted_errors_and_refuses_other_files_in_one_line(
    tmp_path: Path, importance: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(MODEL), str(tmp_path / "x-distilled.gguf"), "--type", KIND, "--quiet"]
    words += ["--device", "cpu", "--importance"]
    assert main([*words, str(importance)]) == 0
    told = capsys.readouterr().out
    assert "relative error, and weighted by importance:" in told
    (line,) = [
        line for line in told.splitlines() if " transformer_blocks.N.attn1.to_q.weight" in line
    ]
    plain, weighted = map(float, line.split()[-2:])
    assert weighted < plain
    assert main([*words, str(MODEL), "--overwrite"]) == 1
    error_line = capsys.readouterr().err
    assert "no importance file of version 1" in error_line and error_line.count("\n") == 1
