"""Tells dev from distilled: no tensor differs in shape, so only words can say it."""

import re
from typing import Literal

from ltxlite.checkpoint.config import version_text
from ltxlite.checkpoint.files import OpenModel

KEY = "ltxlite.variant"  # "dev", "distilled" or "unknown", in the GGUF files that we write
Variant = Literal["dev", "distilled"]
_WORDS: tuple[tuple[Variant, re.Pattern[str]], ...] = (
    ("distilled", re.compile(r"(?<![a-z])distill(?:ed)?(?![a-z])", re.IGNORECASE)),
    ("dev", re.compile(r"(?<![a-z])dev(?![a-z])", re.IGNORECASE)),
)


def variant_of(model: OpenModel) -> tuple[Variant, str] | None:
    """Return a checkpoint's variant and what it was read from, or None where nothing says it.

    The key that our converter writes goes before the header's model_version, and that before the
    file's name; a text with both words says nothing.
    """
    found = _said(model)
    return found[0] if found else None


def disagreement(model: OpenModel) -> str | None:
    """Return a warning where a checkpoint's header and file name name different variants."""
    found = _said(model)
    if len({variant for variant, _ in found}) < 2:
        return None
    said = " but ".join(f"{where} says {variant}" for variant, where in found)
    return f"{model.path.name}: {said}; noise is what the wrong one gives, see --variant"


def _said(model: OpenModel) -> list[tuple[Variant, str]]:
    written = model.metadata.get(KEY, "")
    sources = (
        (written if isinstance(written, str) else "", f"{KEY} in its header"),
        (version_text(model.metadata), "model_version in its header"),
        (model.path.name, "its file name"),
    )
    found: list[tuple[Variant, str]] = []
    for text, where in sources:
        words = [word for word, pattern in _WORDS if pattern.search(text)]
        if len(words) == 1:
            found.append((words[0], where))
    return found
