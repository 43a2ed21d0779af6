"""Gemma's hyper-parameters and tokenizer, out of whichever packaging the text encoder came in.

A Hugging Face folder has config.json and tokenizer files, a single file a `spiece_model` tensor, a
GGUF keeps both in its metadata.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ltxlite.checkpoint.assemble import Naming
from ltxlite.checkpoint.config import parse_json
from ltxlite.checkpoint.files import OpenModel, read_json
from ltxlite.checkpoint.stored import StoredTensor
from ltxlite.errors import CheckpointError
from ltxlite.models import gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.settings import Settings
from ltxlite.models.spiece import KEYS as TOKENIZER_KEYS
from ltxlite.models.spiece import serialized_pieces
from ltxlite.models.tokenizer import Tokenizer, check_vocabulary, find_tokenizer

NAMING = Naming(gemma.RENAMES + gemma.GGUF_RENAMES, gemma.IGNORED, gemma.FLOAT32)
ARCHITECTURE = "gemma3"  # as llama.cpp names it; the prefix of a GGUF's keys
_GEMMA_4 = (".layer_scalar", ".layer_output_scale.weight")


def read_config(model: OpenModel) -> GemmaConfig:
    """Return a text encoder's hyper-parameters.

    Raises CheckpointError for Gemma 4, for other sizes of Gemma 3 and for damaged files.
    """
    shapes = {NAMING.rename(name): s.shape for name, s in model.named("text_encoder").items()}
    _refuse_gemma_4(model, shapes)
    if _is_gguf(model):
        config = GemmaConfig.from_shapes(shapes, norm_offset=0.0)  # llama.cpp stores w + 1
        return _with_keys(config, model.metadata, str(model.path))
    settings, _ = json_settings(model)
    return (
        GemmaConfig.from_shapes(shapes) if settings is None else GemmaConfig.from_settings(settings)
    )


def config_source(model: OpenModel) -> str:
    """Tell where `read_config` finds what shapes do not show."""
    if _is_gguf(model):
        return f"GGUF keys {ARCHITECTURE}.*"
    return json_settings(model)[1]


def json_settings(model: OpenModel) -> tuple[Settings | None, str]:
    """Return the JSON configuration of a text encoder, if it has one, and its place."""
    if (text := model.metadata.get("gemma_config")) is not None:
        where = f"{model.path}: metadata key 'gemma_config'"
        return Settings(parse_json(text, where), where), where
    folder = model.path if model.path.is_dir() else model.path.parent
    file = folder / "config.json"
    if file.is_file():
        config = read_json(file)
        # Beside a single file, in a mixed folder, it may describe something else.
        if model.path.is_dir() or "gemma" in str(config.get("model_type")):
            return Settings(config, str(file)), str(file)
    return None, "tensor shapes"


def read_tokenizer(model: OpenModel, rows: int) -> Tokenizer:
    """Return the tokenizer of a text encoder with `rows` embeddings.

    It is looked for in the tensor `spiece_model`, then beside the file, then in a GGUF's keys.
    Raises CheckpointError if there is none, or if it belongs to another model.
    """
    embedded = model.tensors.get("spiece_model")
    if embedded is not None:
        tokenizer = Tokenizer.from_sentencepiece(_bytes(embedded), str(model.path))
    else:
        tokenizer = _tokenizer_beside(model)
    check_vocabulary(tokenizer, rows)
    return tokenizer


def tokenizer_places(model: OpenModel) -> list[Path]:
    """Return the folders in which a text encoder's tokenizer may lie, nearest first."""
    folder = model.path if model.path.is_dir() else model.path.parent
    beside = [folder.parent / "tokenizer"] if folder.name == "text_encoder" else []  # diffusers
    return [folder, *beside]


def _tokenizer_beside(model: OpenModel) -> Tokenizer:
    try:
        return find_tokenizer(*tokenizer_places(model))
    except CheckpointError:
        if f"{TOKENIZER_KEYS}model" not in model.metadata:
            raise
    where = f"{model.path}: {TOKENIZER_KEYS}*"
    return Tokenizer.from_sentencepiece(serialized_pieces(model.metadata, where), where)


def _is_gguf(model: OpenModel) -> bool:
    return "token_embd.weight" in model.tensors


def _with_keys(config: GemmaConfig, keys: Mapping[str, Any], where: str) -> GemmaConfig:
    """Return the configuration with what a GGUF says beyond shapes; shapes decide structure."""
    found = keys.get("general.architecture")
    if found != ARCHITECTURE:
        raise CheckpointError(
            f"{where}: a text encoder of architecture {found!r}; LTX-2.0 and 2.3 need Gemma 3 12B "
            f"({ARCHITECTURE!r}), such as unsloth/gemma-3-12b-it-qat-GGUF"
        )
    prefix = f"{ARCHITECTURE}."
    values = {name.removeprefix(prefix): v for name, v in keys.items() if name.startswith(prefix)}
    settings = Settings(values, f"{where}: {ARCHITECTURE}")
    for key, size in (("block_count", config.layers), ("embedding_length", config.hidden)):
        if settings.integer(key, size) != size:
            raise CheckpointError(
                f"{where}: {prefix}{key} is {values[key]}, but its tensors have {size}; the file "
                "is incomplete, download it again"
            )
    settings.expect("rope.scaling.type", "linear", "none")
    return replace(
        config,
        window=settings.integer("attention.sliding_window", config.window),
        eps=settings.number("attention.layer_norm_rms_epsilon", config.eps),
        global_theta=settings.number("rope.freq_base", config.global_theta),
        global_factor=settings.number("rope.scaling.factor", config.global_factor),
    )


def _refuse_gemma_4(model: OpenModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    # Its global layers take their keys as values; layer 5 is the first of them in both.
    shared = "layers.5.self_attn.v_proj.weight" not in shapes
    shared &= "layers.5.self_attn.k_proj.weight" in shapes
    if shared or any(name.endswith(_GEMMA_4) for name in shapes):
        raise CheckpointError(
            f"{model.path}: this is Gemma 4, the text encoder of LTX-2.5; LTX-2.0 and 2.3 need "
            "Gemma 3 12B: google/gemma-3-12b-it-qat-q4_0-unquantized"
        )


def _bytes(stored: StoredTensor) -> bytes:
    if stored.format.dtype != torch.uint8:
        raise CheckpointError(f"{stored.entry.name}: stored as {stored.format.name}, wanted U8")
    return stored.values().numpy().tobytes()
