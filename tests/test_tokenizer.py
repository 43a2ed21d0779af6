"""The tokenizer: both file forms against the reference ids and against each other."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltxlite.errors import CheckpointError, RequestError
from ltxlite.models.tokenizer import MAX_TOKENS, Tokenizer, check_vocabulary, find_tokenizer

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "models" / "gemma3_tiny"
FORMS = ("tokenizer.model", "tokenizer.json")


@pytest.fixture(params=FORMS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.from_file(FOLDER / request.param)


def case_prompts() -> list[str]:
    cases = json.loads((GOLDEN / "MANIFEST.json").read_text(encoding="utf-8"))["cases"]
    prompts: list[str] = next(c for c in cases if c["name"] == "tokenizer")["params"]["prompts"]
    return prompts


@pytest.mark.parametrize(("length", "suffix"), [(256, ""), (1024, "_1024")])
def test_padded_ids_and_masks_equal_the_reference(
    tokenizer: Tokenizer, length: int, suffix: str
) -> None:
    case = load_file(GOLDEN / "golden" / "tokenizer.safetensors")
    pairs = [tokenizer.left_padded(tokenizer.encode(p).ids, length) for p in case_prompts()]
    assert torch.equal(torch.stack([ids for ids, _ in pairs]), case[f"input_ids{suffix}"])
    assert torch.equal(torch.stack([mask for _, mask in pairs]), case[f"attention_mask{suffix}"])


def test_the_tensor_of_a_single_file_is_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    tensor = load_file(GOLDEN / "models" / "gemma3_tiny_single.safetensors")["spiece_model"]
    other = Tokenizer.from_sentencepiece(bytes(tensor.numpy()), "spiece_model")
    for prompt in case_prompts():
        assert other.encode(prompt) == tokenizer.encode(prompt)


def test_both_forms_agree_on_random_mixtures_of_text_and_special_tokens() -> None:
    model, json_form = (Tokenizer.from_file(FOLDER / name) for name in FORMS)
    special = ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    special += ["<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_imag"]
    space = [" ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2581"]
    words = ["a golden", "retriever", "Bonjour", "35mm", "<0x41>", "x", "e\u0301", "日本", "🎬"]
    words += ["\x00", "\x7f", "<", ">", "\u200d", "\U0010ffff", "\ufeff", "\ufffd"]
    chooser = random.Random(5)
    for _ in range(3000):
        pieces = chooser.choices(special + 2 * space + 2 * words, k=chooser.randint(1, 9))
        text = "".join(pieces)
        assert model.encode(text).ids == json_form.encode(text).ids, repr(text)


def test_special_tokens_have_their_ids_and_text_has_not(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<start_of_image>x<eos><mask><image_soft_token>\n\n\nx").ids
    x = tokenizer.encode("x").ids[1]
    assert ids == (2, 6, x, 1, 640, 641, 9, 8, x)


def test_unknown_characters_become_their_bytes(tokenizer: Tokenizer) -> None:
    first_byte = 10  # of the tiny vocabulary: <0x00>
    wanted = tuple(first_byte + byte for byte in "ᚠ".encode())
    assert tokenizer.encode("ᚠ").ids == (2, *wanted)


@pytest.mark.parametrize("text", ["", "   \n\t ", "<bos>", "  <bos> "])
def test_there_is_exactly_one_bos(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text).ids == (2,)


def test_what_exceeds_the_limit_is_cut_at_the_end_and_counted(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("ab " * 900, max_tokens=10**6)
    assert whole.cut == 0
    for limit in (MAX_TOKENS, len(whole.ids), len(whole.ids) - 1):
        short = tokenizer.encode("ab " * 900, max_tokens=limit)
        assert short.ids == whole.ids[:limit]
        assert short.cut == len(whole.ids) - len(short.ids)


def test_a_prompt_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("caf\udce9")


def test_truncation_and_padding_written_in_the_json_are_switched_off() -> None:
    content = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    other = Tokenizer.from_json(json.dumps(content).encode(), "tokenizer.json")
    plain = Tokenizer.from_file(FOLDER / "tokenizer.json")
    prompt = case_prompts()[0]
    assert other.encode(prompt) == plain.encode(prompt)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-3],
        lambda data: b"\x00" * 100,
        lambda data: b"{}",
    ],
)
def test_a_damaged_file_is_one_line_of_error(tmp_path: Path, name: str, damage) -> None:
    path = tmp_path / name
    path.write_bytes(damage((FOLDER / name).read_bytes()))
    with pytest.raises(
        CheckpointError, match=f"{name}: not a readable .*download it again"
    ) as info:
        Tokenizer.from_file(path)
    assert "\n" not in str(info.value)


def test_a_tokenizer_of_another_family_is_refused() -> None:
    other = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1}, "merges": []},
    }
    with pytest.raises(CheckpointError, match="no <bos> or <pad> among 2 tokens, so not Gemma's"):
        Tokenizer.from_json(json.dumps(other).encode(), "tokenizer.json")


def test_the_search_takes_the_first_place_and_prefers_the_model(tmp_path: Path) -> None:
    inner = tmp_path / "pack" / "tokenizer"
    inner.mkdir(parents=True)
    shutil.copy(FOLDER / "tokenizer.json", inner)
    found = find_tokenizer(tmp_path / "gone", tmp_path / "pack")
    assert found.where == str(inner / "tokenizer.json")
    shutil.copy(FOLDER / "tokenizer.model", inner)
    assert find_tokenizer(tmp_path / "pack").where == str(inner / "tokenizer.model")
    assert find_tokenizer(inner / "tokenizer.json", FOLDER).where == str(inner / "tokenizer.json")


def test_a_search_in_vain_lists_what_was_searched(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer found; searched ") as info:
        find_tokenizer(tmp_path, tmp_path / "own.model")
    for name in ("tokenizer.model", "tokenizer.json", "own.model"):
        assert str(tmp_path / name) in str(info.value)


def test_a_vocabulary_that_does_not_fit_the_embeddings_is_refused(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, 704)
    check_vocabulary(tokenizer, 640)  # a GGUF table without the appended tokens
    for rows in (639, 262208):
        with pytest.raises(CheckpointError, match=f"642 tokens, but the text encoder has {rows}"):
            check_vocabulary(tokenizer, rows)


def test_a_tokenizer_that_knows_no_letters_is_refused() -> None:
    blind = {
        "version": "1.0",
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "vocab": {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3},
            "merges": [],
        },
    }
    tokenizer = Tokenizer.from_json(json.dumps(blind).encode(), "tokenizer.json")
    with pytest.raises(CheckpointError, match="different prompts give the same tokens"):
        check_vocabulary(tokenizer, 5)
