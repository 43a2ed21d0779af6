"""JSON inside of files, where its author chose the values: each one clear error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failure_files import MODEL, changed, networks
from flavour_files import bnb_4bit, convrot, normal, text
from safetensors.torch import save_file
from torch import Tensor

from ltxlite.checkpoint.config import LONGEST, embedded_config, model_version, parse_json
from ltxlite.checkpoint.files import INDEXES, open_models
from ltxlite.errors import CheckpointError
from ltxlite_quant.gguf import write_gguf

MARKER = "model.diffusion_model.audio_adaln_single.emb.timestep_embedder.linear_1.weight"
DEEP = "[" * 200_000
TEXTS = {
    "deep": ('{"transformer": ' + DEEP, "is not valid JSON"),
    "a number of 5000 digits": ('{"transformer": ' + "9" * 5000 + "}", "is not valid JSON"),
    "a list": ("[]", "holds list, wanted a JSON object"),
    "cut": ('{"transformer": {', "is not valid JSON"),
    "long": ("{" + " " * LONGEST + "}", f"characters, wanted at most {LONGEST}"),
}


@pytest.mark.parametrize("kind", list(TEXTS))
def test_a_configuration_that_is_none_is_refused_by_what_is_wrong(
    tmp_path: Path, kind: str
) -> None:
    config, message = TEXTS[kind]
    if len(config) < 10_000:
        path = changed(tmp_path / "m-distilled.safetensors", metadata={"config": config})
        with pytest.raises(CheckpointError, match=f"metadata key 'config'.*{message}"):
            networks(path).transformer_config()
    with pytest.raises(CheckpointError, match=message):
        parse_json(config, "somewhere")


@pytest.mark.parametrize("value", [["{}"], [1, 2], 7, 0.5, True])
def test_a_configuration_in_a_gguf_must_be_a_text(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"metadata key 'config' is a .*, wanted the text"):
        embedded_config({"config": value}, "x.gguf")


def test_a_base64_configuration_that_is_none_is_refused() -> None:
    for damaged in ("%%%", "ä" * 8, "/////w=="):
        with pytest.raises(CheckpointError, match="metadata key 'config_base64' is damaged"):
            embedded_config({"config_base64": damaged}, "x")
    assert embedded_config({"config_base64": ["e30="]}, "x") is None


@pytest.mark.parametrize("version", ["²", "2.³", "9" * 5000, ["2.3"], 2.3, None, "", "x", "-"])
def test_a_version_that_is_no_number_says_nothing(version: object) -> None:
    assert model_version({"model_version": version}) in ((), (2,))
    assert model_version({"model_version": "2.3.0-rc1"}) == (2, 3, 0)


def with_texts(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    save_file({MARKER: torch.ones(4, 4), **tensors}, path, metadata)
    return path


LAYERS: dict[str, tuple[object, str]] = {
    "no object": ([], "_quantization_metadata holds list"),
    "layers in a list": ({"layers": ["a"]}, r"_quantization_metadata has layers \['a'\]"),
    "a layer in a list": ({"layers": {"a": [1]}}, r"the declaration of a is \[1\]"),
    "groups in a list": (
        {"layers": {"a": {"convrot": True, "convrot_groupsize": [256]}}},
        r"rotated in groups of \[256\]; ltxlite reads groups of 256, 64, 16",
    ),
    "groups that are true": (
        {"layers": {"a": {"convrot": True, "convrot_groupsize": True}}},
        "rotated in groups of True",
    ),
    "groups of nothing": (
        {"layers": {"a": {"params": {"convrot": 1, "convrot_groupsize": 0}}}},
        "rotated in groups of 0",
    ),
}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_declarations_of_layers_are_checked(tmp_path: Path, kind: str) -> None:
    value, message = LAYERS[kind]
    weight = convrot("a", normal(16, 64))
    del weight["a.comfy_quant"]
    metadata = {"_quantization_metadata": json.dumps(value)}
    with pytest.raises(CheckpointError, match=message):
        open_models(with_texts(tmp_path / "x.safetensors", weight, metadata))


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no shape": (lambda s: s.pop("shape"), "wanted a shape of a matrix"),
    "a shape of three": (lambda s: s.update(shape=[2, 4, 8]), "wanted a shape of a matrix"),
    "a shape of words": (lambda s: s.update(shape=["8", "64"]), "wanted shape and block sizes"),
    "a shape below zero": (lambda s: s.update(shape=[-8, -64]), "wanted shape and block sizes"),
    "blocks of nothing": (lambda s: s.update(blocksize=0), "blocksize must be at least 1"),
    "true blocks": (lambda s: s.update(blocksize=True), "wanted shape and block sizes"),
    "nan": (lambda s: s.update(nested_offset=float("nan")), "wanted a nested_offset"),
    "a huge offset": (lambda s: s.update(nested_offset=10**400), "wanted a nested_offset"),
    "an offset of words": (lambda s: s.update(nested_offset="0.1"), "wanted a nested_offset"),
    "another shape": (lambda s: s.update(shape=[8, 128]), "which are not"),
}


@pytest.mark.parametrize("kind", list(STATES))
def test_the_state_of_bitsandbytes_is_checked(tmp_path: Path, kind: str) -> None:
    change, message = STATES[kind]
    packed = bnb_4bit("a", normal(8, 64), "nf4", nested=True)
    name = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(packed[name].numpy().tobytes())
    change(state)
    packed[name] = text(state)
    with pytest.raises(CheckpointError, match=message):
        open_models(with_texts(tmp_path / "x.safetensors", packed, {}))


INDEX: dict[str, tuple[object, str]] = {
    "no map": ({}, "no weight_map of tensor names to shards"),
    "a list": ({"weight_map": [1]}, "no weight_map"),
    "a number for a name": ({"weight_map": {"a": 1}}, "no weight_map"),
    "another folder": ({"weight_map": {"a": "../m.safetensors"}}, "leaves its folder"),
    "the folder itself": ({"weight_map": {"a": ".."}}, "this shard is missing"),
    "nothing": ({"weight_map": {"a": ""}}, "this shard is missing"),
    "no file": ({"weight_map": {"a": "a\0b"}}, "this shard is missing"),
    "an empty map": ({"weight_map": {}}, "no part of LTX-2"),
}


@pytest.mark.parametrize("kind", list(INDEX))
def test_the_index_of_shards_is_checked(tmp_path: Path, kind: str) -> None:
    value, message = INDEX[kind]
    (tmp_path / INDEXES[0]).write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        open_models(tmp_path)


def test_an_index_that_is_long_or_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / INDEXES[0]
    path.write_bytes(b"{" + b" " * LONGEST)
    with pytest.raises(CheckpointError, match=r"more than \d+ bytes, too many for a JSON file"):
        open_models(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="not a text file"):
        open_models(tmp_path)


def test_texts_of_a_header_that_gguf_cannot_hold_are_told(tmp_path: Path) -> None:
    from ltxlite.convert.layout import lay_out
    from ltxlite.convert.layout import text as key
    from ltxlite_quant.formats import FormatError

    with pytest.raises(FormatError, match=r"metadata 'license' is no Unicode text; leave it out"):
        lay_out([], {"license": key("\ud800")})


def test_a_sidecar_is_read_like_an_embedded_configuration(tmp_path: Path) -> None:
    path = changed(tmp_path / "m-distilled.safetensors", metadata={}, source=MODEL)
    (tmp_path / "m-distilled.safetensors.config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json holds list, wanted a JSON object"):
        networks(path).transformer_config()


def test_a_gguf_whose_texts_are_lists_is_opened_all_the_same(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {MARKER: torch.ones(4, 4)}, {"model_version": 7}, "ltxv")
    (model,) = open_models(tmp_path / "x.gguf")
    assert model_version(model.metadata) == ()
