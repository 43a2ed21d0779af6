"""Finds a checkpoint's JSON configuration, wherever its packager put it."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from ltxlite.errors import CheckpointError

_MOST_DIGITS = 9
SECTIONS = ("transformer", "vae", "audio_vae", "vocoder", "scheduler")
# The index of a diffusers transformer has 0.5 MB, the official configuration 20 kB. Parsed, hostile
# JSON takes thirty times as much memory.
LONGEST = 2 << 20


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
    parsed = parse_json(text, f"{where}: metadata key 'config'")
    if "num_attention_heads" in parsed and "transformer" not in parsed:
        return {"transformer": parsed}
    return parsed


def parse_json(text: object, where: str) -> dict[str, Any]:
    """Parse the text of a JSON object; broken, long or other JSON is a CheckpointError."""
    if not isinstance(text, str):
        raise CheckpointError(f"{where} is a {type(text).__name__}, wanted the text of an object")
    if len(text) > LONGEST:
        raise CheckpointError(f"{where} has {len(text)} characters, wanted at most {LONGEST}")
    parsed, problem = None, ""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError alone: numbers of 5000 digits
        problem = str(error)
    if problem:
        raise CheckpointError(f"{where} is not valid JSON ({problem}); the file is damaged")
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} holds {type(parsed).__name__}, wanted a JSON object")
    return parsed


def model_version(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the leading numbers of `model_version` ("2.3.0-rc1" is (2, 3, 0)); () if absent."""
    numbers: list[int] = []
    for part in version_text(metadata).replace("-", ".").split("."):
        if not part.isdecimal() or len(part) > _MOST_DIGITS:
            break
        numbers.append(int(part))
    return tuple(numbers)


def version_text(metadata: Mapping[str, Any]) -> str:
    """Return `model_version` as the file spells it, "" if it is no text."""
    found = metadata.get("model_version", "")
    return found if isinstance(found, str) else ""


def _decode_base64(encoded: str, where: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode("utf-8")
    except ValueError:  # of base64, of text outside ASCII, of UTF-8
        raise CheckpointError(f"{where}: metadata key 'config_base64' is damaged") from None
