"""Finds a checkpoint's JSON configuration, wherever its packager put it."""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from ltxlite.errors import CheckpointError

SECTIONS = ("transformer", "vae", "audio_vae", "vocoder", "scheduler")


def embedded_config(metadata: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Return the configuration object of a file's metadata, or None if it has none.

    Reads the official key `config`, Wan2GP's base64 spelling, and objects that hold the
    transformer's keys at top level. Raises CheckpointError on broken JSON.
    """
    text = metadata.get("config")
    if text is None and isinstance(encoded := metadata.get("config_base64"), str):
        text = _decode_base64(encoded, where)
    if text is None:
        return None
    parsed = parse_json(str(text), f"{where}: metadata key 'config'")
    if "num_attention_heads" in parsed and "transformer" not in parsed:
        return {"transformer": parsed}
    return parsed


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object; broken or other JSON is a CheckpointError."""
    try:
        parsed = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} holds {type(parsed).__name__}, wanted a JSON object")
    return parsed


def model_version(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the leading numbers of `model_version` ("2.3.0-rc1" is (2, 3, 0)); () if absent."""
    numbers: list[int] = []
    for part in str(metadata.get("model_version", "")).replace("-", ".").split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _decode_base64(encoded: str, where: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        raise CheckpointError(f"{where}: metadata key 'config_base64' is damaged") from None
