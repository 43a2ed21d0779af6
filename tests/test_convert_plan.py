"""Sources that cannot be converted, each told in one line, and choices that do not exist."""

import json
import math
from pathlib import Path

import pytest
import torch
from convert_support import (
    GEMMA,
    GOLDEN,
    MODEL,
    PREFIX,
    QUERY,
    asked,
    beside,
    changed,
    converted,
    metadata_of,
    refused,
    with_value,
    without,
)
from safetensors.torch import load_file, save_file

from ltxlite.cli import main
from ltxlite.errors import RequestError
from ltxlite_quant.gguf import GgufFile

pytest_plugins = ("convert_fixtures",)


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
