"""The vocabulary of a converted text encoder, out of tokenizer.model or of tokenizer.json."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import GEMMA, converted

from ltxlite.checkpoint.files import ModelFiles
from ltxlite.convert.vocabulary import CONTROL, metadata_of, pieces_of, pieces_of_json
from ltxlite.errors import CheckpointError
from ltxlite.models.spiece import serialized_pieces
from ltxlite.models.tokenizer import Tokenizer
from ltxlite.networks import Networks
from ltxlite_quant.gguf import GgufFile

JSON = GEMMA / "tokenizer.json"
LETTERS = "aeinorst ,.\n\n  ▁_éß日本🐕0123'\"<>\t"


def texts(count: int) -> list[str]:
    chooser = random.Random(0)
    words = (GEMMA / "tokenizer_config.json").read_text("utf-8").split()
    return [
        "".join(
            chooser.choice(LETTERS) if chooser.random() < 0.5 else f" {chooser.choice(words)}"
            for _ in range(chooser.randrange(1, 40))
        )
        for _ in range(count)
    ]


def rebuilt(path: Path) -> Tokenizer:
    data = serialized_pieces(metadata_of(pieces_of_json(path.read_bytes(), path)), str(path))
    return Tokenizer.from_sentencepiece(data, "rebuilt")


def test_merges_become_scores_that_split_a_thousand_texts_alike() -> None:
    ours, theirs = rebuilt(JSON), Tokenizer.from_file(JSON)
    original = Tokenizer.from_file(GEMMA / "tokenizer.model")
    for text in texts(1000):
        assert ours.encode(text) == theirs.encode(text) == original.encode(text), text


def test_pieces_of_both_files_are_the_same_words_with_the_same_control_tokens() -> None:
    from_json = pieces_of_json(JSON.read_bytes(), JSON)
    from_model = list(pieces_of((GEMMA / "tokenizer.model").read_bytes(), "x"))
    assert [text for text, _, _ in from_json][: len(from_model)] == [t for t, _, _ in from_model]
    controls = [{text for text, _, kind in p if kind == CONTROL} for p in (from_json, from_model)]
    assert controls[0] >= controls[1] > set()


def test_a_text_encoder_with_nothing_but_tokenizer_json_is_converted(tmp_path: Path) -> None:
    folder = tmp_path / "gemma"
    shutil.copytree(GEMMA, folder)
    (folder / "tokenizer.model").unlink()
    target = tmp_path / "gemma.gguf"
    converted(target, folder, "Q8_0", "text_encoder")
    with GgufFile(target) as file:
        assert (
            len(file.metadata["tokenizer.ggml.tokens"])
            == file.tensors["token_embd.weight"].shape[0]
        )
    found, wanted = (
        Networks(ModelFiles.open([path]), torch.device("cpu"), torch.float32).tokenizer()
        for path in (target, GEMMA)
    )
    assert found.where == f"{target}: tokenizer.ggml.*"
    for text in ("A golden retriever,  at dawn", "x\n\n  y <image_soft_token>", "日本 dorée"):
        assert found.encode(text) == wanted.encode(text)


def test_a_text_encoder_without_any_tokenizer_is_told_what_was_searched(tmp_path: Path) -> None:
    folder = tmp_path / "gemma"
    shutil.copytree(GEMMA, folder)
    for path in folder.glob("tokenizer.*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"carries its vocabulary, .*tokenizer\.json; put"):
        converted(tmp_path / "gemma.gguf", folder, "Q8_0", "text_encoder")


def moved(data: dict[str, Any]) -> None:
    """Make two merges trade places: a later one now gives longer tokens away."""
    merges = data["model"]["merges"]
    merges[3:60] = merges[59:2:-1]


def tripled(data: dict[str, Any]) -> None:
    data["model"]["merges"].append(["▁", "a", "b"])


def unknown(data: dict[str, Any]) -> None:
    data["model"]["merges"].append(["▁a", "▁zzz"])


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another kind": (lambda d: d["model"].update(type="Unigram"), "no vocabulary of byte pairs"),
    "no bytes": (lambda d: d["model"].update(byte_fallback=False), "no vocabulary of byte pairs"),
    "no merges": (lambda d: d["model"].pop("merges"), "no vocabulary of byte pairs"),
    "three parts": (tripled, "no vocabulary of byte pairs"),
    "ids with a hole": (lambda d: d["model"]["vocab"].pop("<0x41>"), "no vocabulary of byte pairs"),
    "a number for a name": (lambda d: d["model"]["vocab"].update(x=None), "no vocabulary"),
    "a merge of nothing known": (unknown, "its merges make '▁a▁zzz', which is no token"),
    "lower case first": (
        lambda d: d.update(normalizer={"type": "Lowercase"}),
        "it would split .* in another way; put tokenizer.model",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGED))
def test_a_tokenizer_json_that_pieces_cannot_express_is_refused(tmp_path: Path, kind: str) -> None:
    change, message = DAMAGED[kind]
    data = json.loads(JSON.read_bytes())
    change(data)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        pieces_of_json(path.read_bytes(), path)


def test_the_order_of_merges_counts(tmp_path: Path) -> None:
    data = json.loads(JSON.read_bytes())
    moved(data)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    ours, theirs, before = rebuilt(path), Tokenizer.from_file(path), Tokenizer.from_file(JSON)
    sample = texts(200)
    assert all(ours.encode(text) == theirs.encode(text) for text in sample)
    assert any(ours.encode(text) != before.encode(text) for text in sample)
