"""Gemma as llama.cpp and ComfyUI-GGUF know it: names, norms with their +1, keys, vocabulary.

Source: formats.md 1.11.
"""

import re
from collections.abc import Iterable
from typing import Any

from ltxlite.checkpoint.files import ModelFiles, OpenModel
from ltxlite.convert.layout import Key, boolean, integer, number, text, texts, unsigned
from ltxlite.convert.vocabulary import CONTROL, UNUSED, metadata_of, pieces_beside
from ltxlite.errors import CheckpointError
from ltxlite.models.gemma_config import GemmaConfig

ARCHITECTURE = "gemma3"
_TOKENIZER = "tokenizer.ggml."
_CONTEXT = 131072
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
    pieces = pieces_beside(model)
    known = {piece for piece, _, _ in pieces}
    pieces += [(token, -1000.0, CONTROL) for token in _APPENDED if token not in known]
    if len(pieces) > config.vocabulary + len(_APPENDED):
        raise CheckpointError(
            f"{model.path}: {len(pieces)} tokens, but {config.vocabulary} embeddings; the "
            "tokenizer belongs to another model"
        )
    rows = range(len(pieces), config.vocabulary)
    pieces = [*pieces, *((f"[PAD{row}]", -1000.0, UNUSED) for row in rows)][: config.vocabulary]
    values = metadata_of(pieces)
    numbers = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
    found = {
        "model": text("llama"),
        "pre": text("default"),
        "tokens": texts(values[f"{_TOKENIZER}tokens"]),
        "scores": number(values[f"{_TOKENIZER}scores"]),
        "token_type": integer(values[f"{_TOKENIZER}token_type"]),
        **{f"{name}_token_id": unsigned(row) for name, row in numbers.items()},
        "add_bos_token": boolean(True),
        "add_eos_token": boolean(False),
        "add_space_prefix": boolean(False),
    }
    return {_TOKENIZER + name: key for name, key in found.items()}
