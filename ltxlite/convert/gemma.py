"""Gemma as llama.cpp and ComfyUI-GGUF know it: names, norms with their +1, keys, vocabulary.

Source: formats.md 1.11; google/sentencepiece sentencepiece_model.proto.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ltxlite.checkpoint.files import ModelFiles, OpenModel
from ltxlite.convert.layout import Key, boolean, integer, number, text, texts, unsigned
from ltxlite.errors import CheckpointError
from ltxlite.models.gemma_config import GemmaConfig

ARCHITECTURE = "gemma3"
_TOKENIZER = "tokenizer.ggml."
_CONTEXT = 131072
_MAX_TOKENIZER = 256 << 20
# Types of pieces; NORMAL 1, UNKNOWN 2, BYTE 6.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
# Tokens behind the SentencePiece model's own, in Hugging Face's order.
_APPENDED = ("<mask>", "<image_soft_token>")
_NAMES = (
    (r"^embed_tokens\.", "token_embd."),
    (r"^norm\.", "output_norm."),
    (r"^layers\.", "blk."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".post_attention_norm."),
    (r"\.pre_feedforward_layernorm\.", ".ffn_norm."),
    (r"\.post_feedforward_layernorm\.", ".post_ffw_norm."),
    (r"\.self_attn\.o_proj\.", ".attn_output."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn_\1."),
    (r"\.self_attn\.([qk])_norm\.", r".attn_\1_norm."),
    (r"\.mlp\.(gate|up|down)_proj\.", r".ffn_\1."),
)

Piece = tuple[str, float, int]


def llama_name(name: str) -> str:
    """Turn a module name of the text model into llama.cpp's."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def shifts(files: ModelFiles, names: Iterable[str]) -> dict[str, float]:
    """Return what is added to tensors: 1 to norms, unless the source is a GGUF, which has it."""
    model = files.find("text_encoder")
    if model is None or _is_gguf(model):
        return {}
    return {name: 1.0 for name in names if name.endswith("norm.weight")}


def keys(model: OpenModel, config: GemmaConfig) -> dict[str, Key]:
    """Return hyper-parameters and vocabulary; those of a GGUF are taken over.

    Raises CheckpointError if the source has no SentencePiece vocabulary.
    """
    if _is_gguf(model):
        prefixes = (f"{ARCHITECTURE}.", "tokenizer.")
        return {n: _typed(v) for n, v in model.metadata.items() if n.startswith(prefixes)}
    counts = {
        "context_length": _CONTEXT,
        "embedding_length": config.hidden,
        "block_count": config.layers,
        "feed_forward_length": config.inner,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.window,
    }
    numbers = {
        "attention.layer_norm_rms_epsilon": config.eps,
        "rope.freq_base": config.global_theta,
        "rope.scaling.factor": config.global_factor,
    }
    found = {name: unsigned(count) for name, count in counts.items()}
    found |= {name: number(value) for name, value in numbers.items()}
    found["rope.scaling.type"] = text("linear")
    return {f"{ARCHITECTURE}.{n}": key for n, key in found.items()} | _vocabulary(model, config)


def _is_gguf(model: OpenModel) -> bool:
    return "token_embd.weight" in model.tensors


def _typed(value: Any) -> Key:
    """Give a value that was read back the type that llama.cpp asks for."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, str):
        return text(value)
    if isinstance(first, bool):
        return boolean(value)
    if isinstance(first, float):
        return number(value)
    return integer(value) if isinstance(value, list) else unsigned(value)


def _vocabulary(model: OpenModel, config: GemmaConfig) -> dict[str, Key]:
    pieces = list(pieces_of(_tokenizer_bytes(model), str(model.path)))
    known = {piece for piece, _, _ in pieces}
    pieces += [(token, -1000.0, _CONTROL) for token in _APPENDED if token not in known]
    if len(pieces) > config.vocabulary + len(_APPENDED):
        raise CheckpointError(
            f"{model.path}: {len(pieces)} tokens, but {config.vocabulary} embeddings; the "
            "tokenizer belongs to another model"
        )
    rows = range(len(pieces), config.vocabulary)
    pieces = [*pieces, *((f"[PAD{row}]", -1000.0, _UNUSED) for row in rows)][: config.vocabulary]
    numbers = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
    found = {
        "model": text("llama"),
        "pre": text("default"),
        "tokens": texts([_spelled(piece, kind) for piece, _, kind in pieces]),
        "scores": number([score for _, score, _ in pieces]),
        "token_type": integer([kind for _, _, kind in pieces]),
        **{f"{name}_token_id": unsigned(row) for name, row in numbers.items()},
        "add_bos_token": boolean(True),
        "add_eos_token": boolean(False),
        "add_space_prefix": boolean(False),
    }
    return {_TOKENIZER + name: key for name, key in found.items()}


def _spelled(piece: str, kind: int) -> str:
    # llama.cpp compares user-defined tokens with the text as it is written.
    return piece.replace("▁", " ") if kind == _USER_DEFINED else piece


def _tokenizer_bytes(model: OpenModel) -> bytes:
    embedded = model.tensors.get("spiece_model")
    if embedded is not None:
        return embedded.values().numpy().tobytes()
    folder = model.path if model.path.is_dir() else model.path.parent
    searched = [folder / "tokenizer.model", folder / "tokenizer" / "tokenizer.model"]
    for path in searched:
        if path.is_file() and path.stat().st_size <= _MAX_TOKENIZER:
            return Path(path).read_bytes()
    raise CheckpointError(
        f"{model.path}: a GGUF carries its vocabulary, but there is no spiece_model in it and no "
        f"{' or '.join(map(str, searched))}; put tokenizer.model of google/gemma-3-12b-it there"
    )


def pieces_of(data: bytes, where: str) -> Iterator[Piece]:
    """Yield text, score and type of each piece of a serialized SentencePiece model.

    Raises CheckpointError if it is none.
    """
    try:
        for field, body in _fields(data):
            if field == 1 and isinstance(body, bytes):
                inner = dict(_fields(body))
                score = struct.unpack("<f", inner.get(2, bytes(4)))[0]
                yield inner[1].decode("utf-8"), score, int(inner.get(3, 1))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError, struct.error):
        raise CheckpointError(
            f"{where}: its tokenizer is no SentencePiece model; download it again"
        ) from None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Walk over a protobuf message: field numbers and raw values."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        else:
            size = {1: 8, 5: 4}[kind]
        if position + size > len(data):
            raise ValueError("a field ends behind the message")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
