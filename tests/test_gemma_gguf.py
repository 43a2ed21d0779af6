"""Gemma from a GGUF as llama.cpp writes it: norms, keys, quantized tables, rebuilt tokenizer."""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from test_networks import GGUF_NAMES, text_tensors
from torch import Tensor

from ltxlite.checkpoint.files import ModelFiles
from ltxlite.errors import CheckpointError
from ltxlite.linear import QuantEmbedding, QuantLinear
from ltxlite.memory.meter import ActivationMeter
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.spiece import serialized_pieces
from ltxlite.models.tokenizer import Tokenizer
from ltxlite.networks import Networks
from ltxlite_quant import FORMATS
from ltxlite_quant.encode import quantize
from ltxlite_quant.encode_scaled import quantize_scaled

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "models" / "gemma3_tiny"
IDS = torch.tensor([[2, 17, 300, 41, 5, 17]])
ROWS = 704
KEYS: dict[str, int | float | str] = {
    "block_count": 8,
    "embedding_length": 64,
    "context_length": 131072,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.sliding_window": 64,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1e6,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 8.0,
}

TEXT = [
    "A golden retriever runs along the beach at sunset, waves rolling in.",
    "Two dogs swim in the river; the camera follows slowly, 35mm film.",
    "Le chien court sur la plage dorée, au bord de l'eau, à l'aube.",
    "def f(x):\n    return x  # spaces   and\ttabs",
    "日本の電車が橋を渡る。 Rain falls on the old stone bridge.",
] * 40


@pytest.fixture(scope="session")
def trained() -> bytes:
    """A small vocabulary with everything Gemma's has: bytes, runs of spaces, marks, controls."""
    model = io.BytesIO()
    runs = ["▁" * count for count in range(2, 9)] + ["\n" * count for count in range(1, 5)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        control_symbols=["<image_soft_token>"],
        user_defined_symbols=["<mask>", "<start_of_turn>", "<unused1>", *runs],
        minloglevel=2,
    )
    return model.getvalue()


def vocabulary(data: bytes, rows: int = ROWS) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokens, scores, types = [], [], []
    for number in range(model.vocab_size()):
        text, score, kind = model.id_to_piece(number), model.get_score(number), 1
        if model.is_unknown(number):
            kind = 2
        elif model.is_control(number):
            kind = 3
        elif model.is_unused(number):
            kind = 5
        elif model.is_byte(number):
            kind = 6
        elif score == 0 and number > 3 and ("<" in text or "▁▁" in text or "\n" in text):
            kind, score, text = 4, -1000.0, text.replace("▁", " ")
        tokens.append(text)
        scores.append(score)
        types.append(kind)
    # added_tokens.json first, then rows without a token.
    for name in ("<mask>", "<image_soft_token>"):
        if name not in tokens:
            tokens.append(name)
            types.append(3)
    pads = range(len(tokens), rows)
    tokens += [f"[PAD{number}]" for number in pads]
    types += [5 for _ in pads]
    scores += [-1000.0] * (rows - len(scores))
    prefix = "tokenizer.ggml."
    listed = {"tokens": tokens, "scores": scores, "token_type": types}
    special = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
    named = {f"{prefix}{name}_token_id": number for name, number in special.items()}
    return (
        {f"{prefix}model": "llama", f"{prefix}pre": "default"}
        | named
        | {prefix + name: value for name, value in listed.items()}
    )


def write(
    path: Path, keys: dict[str, Any], kind: str = "F32", architecture: str = "gemma3"
) -> Path:
    """Write the tiny Gemma as llama.cpp would, its matrices in a GGML type, through gguf-py."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in text_tensors().items():
        for pattern, replacement in GGUF_NAMES:
            name = re.sub(pattern, replacement, name)
        values = (tensor.float() + ("norm" in name)).numpy()
        wanted = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def keys_of(data: bytes, **changes: Any) -> dict[str, Any]:
    return {f"gemma3.{name}": value for name, value in (KEYS | changes).items()} | vocabulary(data)


def networks(path: Path) -> Networks:
    return Networks(ModelFiles.open([path]), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def own_model() -> bytes:
    return (FOLDER / "tokenizer.model").read_bytes()


def fuzzed(chooser: random.Random) -> str:
    words = [
        "a golden",
        "retriever",
        "Chien",
        "dorée",
        "橋",
        "🎬",
        "x",
        "e\u0301",
        "\x00",
        "<0x41>",
    ]
    marks = [
        "<image_soft_token>",
        "<bos>",
        "<eos>",
        "<pad>",
        "<unk>",
        "<mask>",
        "<start_of_turn>",
        "<start",
        "[PAD700]",
    ]
    space = [
        " ",
        "  ",
        "   ",
        " " * 11,
        "\n",
        "\n\n",
        "\n" * 6,
        "\t",
        "\u00a0",
        "\u2581",
        "\u2581\u2581",
    ]
    return "".join(chooser.choices(words + marks + 2 * space, k=chooser.randint(1, 12)))


@pytest.mark.parametrize("source", ["trained", "own_model"])
def test_the_rebuilt_tokenizer_equals_the_sentencepiece_one(
    source: str, request: pytest.FixtureRequest
) -> None:
    data: bytes = request.getfixturevalue(source)
    rebuilt = Tokenizer.from_sentencepiece(serialized_pieces(vocabulary(data), "x.gguf"), "x.gguf")
    original = Tokenizer.from_sentencepiece(data, "tokenizer.model")
    assert (rebuilt.bos, rebuilt.pad) == (2, 0)
    cases = json.loads((GOLDEN / "MANIFEST.json").read_text(encoding="utf-8"))["cases"]
    prompts = next(case for case in cases if case["name"] == "tokenizer")["params"]["prompts"]
    chooser = random.Random(11)
    for text in [*prompts, *TEXT[:5], *(fuzzed(chooser) for _ in range(3000))]:
        assert rebuilt.encode(text) == original.encode(text), repr(text)


def test_runs_of_spaces_are_tokens_of_their_own_again(trained: bytes) -> None:
    model = sentencepiece.SentencePieceProcessor(
        model_proto=serialized_pieces(vocabulary(trained), "x.gguf")
    )
    assert model.encode("x   y", out_type=str)[1] == "▁▁▁"


def test_token_3_is_the_unknown_one_whatever_its_type_says(trained: bytes) -> None:
    keys = vocabulary(trained)
    keys["tokenizer.ggml.token_type"][3] = 1
    keys["tokenizer.ggml.token_type"][5] = 2  # there can be only one
    model = sentencepiece.SentencePieceProcessor(model_proto=serialized_pieces(keys, "x.gguf"))
    assert model.unk_id() == 3
    assert model.get_score(3) == 0


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "gpt2": (lambda k: k.update({"tokenizer.ggml.model": "gpt2"}), "'gpt2', which cannot be"),
    "no scores": (lambda k: k.pop("tokenizer.ggml.scores"), "no list of tokenizer.ggml.scores"),
    "numbers": (lambda k: k.update({"tokenizer.ggml.tokens": [1, 2]}), "no list of .*tokens"),
    "short": (lambda k: k["tokenizer.ggml.scores"].pop(), "704 tokens, 703 scores and 704 types"),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_a_vocabulary_that_is_incomplete_or_of_another_kind_is_refused(
    trained: bytes, case: str
) -> None:
    damage, message = DAMAGE[case]
    keys = vocabulary(trained)
    damage(keys)
    with pytest.raises(CheckpointError, match=f"x.gguf: .*{message}.*gemma-3-12b-it"):
        serialized_pieces(keys, "x.gguf")


def test_pieces_that_sentencepiece_itself_refuses_are_one_line_of_error(trained: bytes) -> None:
    keys = vocabulary(trained)
    keys["tokenizer.ggml.tokens"][400] = keys["tokenizer.ggml.tokens"][401]
    with pytest.raises(CheckpointError, match="not a readable SentencePiece model"):
        Tokenizer.from_sentencepiece(serialized_pieces(keys, "x.gguf"), "x.gguf")


def test_a_gguf_alone_gives_configuration_tokenizer_and_states(
    tmp_path: Path, own_model: bytes
) -> None:
    path = write(tmp_path / "gemma.gguf", keys_of(own_model))
    ours, folder = networks(path), networks(FOLDER)
    config, wanted = ours.gemma_config(), folder.gemma_config()
    assert config.norm_offset == 0
    for field in ("window", "global_theta", "global_factor", "local_theta", "eps", "global_layers"):
        assert getattr(config, field) == pytest.approx(getattr(wanted, field), rel=1e-6), field
    assert ours.tokenizer().where == f"{path}: tokenizer.ggml.*"
    prompt = "A golden retriever,  at dawn"
    assert ours.tokenizer().encode(prompt) == folder.tokenizer().encode(prompt)
    ids = IDS.repeat(1, 14)  # 84 tokens: beyond the window of 64
    got, expected = (torch.stack(list(n.gemma().states(ids))) for n in (ours, folder))
    # w + 1 is rounded to fp32 once more than w: 6e-8 a norm, 33 of them.
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_keys_that_contradict_the_tensors_or_name_another_model_are_refused(
    tmp_path: Path, own_model: bytes
) -> None:
    path = write(tmp_path / "a.gguf", keys_of(own_model, block_count=9))
    with pytest.raises(CheckpointError, match=r"block_count is 9, but its tensors have 8"):
        networks(path).gemma_config()
    path = write(tmp_path / "b.gguf", keys_of(own_model), architecture="gemma2")
    with pytest.raises(CheckpointError, match=r"architecture 'gemma2'; .*Gemma 3 12B"):
        networks(path).gemma_config()
    changed = keys_of(own_model, **{"attention.sliding_window": 3, "rope.freq_base": 5e5})
    config = networks(write(tmp_path / "c.gguf", changed)).gemma_config()
    assert (config.window, config.global_theta) == (3, 5e5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_a_quantized_gguf_keeps_its_embeddings_quantized(
    tmp_path: Path, own_model: bytes, kind: str
) -> None:
    loaded = networks(write(tmp_path / "gemma.gguf", keys_of(own_model), kind))
    gemma = loaded.gemma()
    table = text_tensors()["embed_tokens.weight"].float().numpy()
    wanted_type = gguf.GGMLQuantizationType[kind]
    decoded = gguf.quants.dequantize(gguf.quants.quantize(table, wanted_type), wanted_type)
    assert isinstance(gemma.embed_tokens, QuantEmbedding) == (kind != "F16")
    assert torch.equal(gemma.embed_tokens(IDS), torch.from_numpy(decoded)[IDS])
    # 7 matrices a layer and the table; norms stay fp32
    assert loaded.loaded[-1].report.tensors == {kind: 8 * 7 + 1, "F32": 8 * 6 + 1}
    states = torch.stack(list(gemma.states(IDS)))
    exact = torch.stack(list(networks(FOLDER).gemma().states(IDS)))
    error = ((states - exact).norm() / exact.norm()).item()
    # Measured 0.006, 0.1 and 0.0002: one matrix's error (formats.md 7), grown by 8 layers.
    low, high = {"Q8_0": (0.002, 0.03), "Q4_0": (0.03, 0.4), "F16": (0, 0.002)}[kind]
    assert low < error < high


def table_of(name: str) -> tuple[QuantEmbedding, Tensor]:
    values = torch.randn(130, 64, generator=torch.Generator().manual_seed(3))
    encode = quantize if name == "Q5_1" else quantize_scaled
    table = encode(values, FORMATS[name])
    return QuantEmbedding(table, torch.bfloat16), table.dequantize(torch.bfloat16)


@pytest.mark.parametrize("name", ["Q5_1", "F8_E4M3_SCALED", "INT8", "NVFP4_TILED", "MXFP8"])
def test_an_embedding_gathers_the_rows_of_the_whole_table(name: str) -> None:
    embedding, whole = table_of(name)
    ids = torch.tensor([[129, 0, 64], [64, 64, 127]])
    got = embedding(ids)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, whole[ids])
    assert embedding.is_finite()


def test_an_embedding_decodes_no_more_than_it_is_asked_for() -> None:
    table = quantize(torch.randn(4096, 256), FORMATS["Q8_0"])
    embedding = QuantEmbedding(table, torch.float32)
    with ActivationMeter("cpu") as meter:
        embedding(torch.tensor([[5, 9, 5, 4000]]))
    assert meter.peak_bytes < 40 * 256  # three rows, and the decoder's temporaries of their size


def test_a_linear_and_an_embedding_hold_the_same_bytes() -> None:
    table = quantize(torch.randn(7, 64), FORMATS["Q4_0"])
    linear, embedding = QuantLinear(table), QuantEmbedding(table, torch.float32)
    assert torch.equal(linear.decoded(torch.float32), embedding(torch.arange(7)))
    assert linear.blocks.data_ptr() == embedding.blocks.data_ptr()


def test_the_released_text_encoder_is_what_the_defaults_say() -> None:
    shapes = {
        "embed_tokens.weight": (262144, 3840),
        "norm.weight": (3840,),
        **{
            f"layers.{n}.{name}": shape
            for n in range(48)
            for name, shape in (
                ("self_attn.q_norm.weight", (256,)),
                ("self_attn.q_proj.weight", (4096, 3840)),
                ("self_attn.k_proj.weight", (2048, 3840)),
                ("mlp.gate_proj.weight", (15360, 3840)),
            )
        },
    }
    found = GemmaConfig.from_shapes(shapes)
    assert found.vocabulary == 262144  # some GGUFs leave the padding rows out
    assert np.all([getattr(found, f) == getattr(GemmaConfig(), f) for f in ("heads", "kv_heads")])
    assert found.states * found.hidden == 188160
