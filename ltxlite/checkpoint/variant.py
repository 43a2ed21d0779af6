"""Tells dev from distilled: no tensor differs in shape, so only words can say it."""

import re
from typing import Literal

from ltxlite.checkpoint.files import OpenModel

Variant = Literal["dev", "distilled"]
_WORDS: tuple[tuple[Variant, re.Pattern[str]], ...] = (
    ("distilled", re.compile(r"(?<![a-z])distill(?:ed)?(?![a-z])", re.IGNORECASE)),
    ("dev", re.compile(r"(?<![a-z])dev(?![a-z])", re.IGNORECASE)),
)


def variant_of(model: OpenModel) -> tuple[Variant, str] | None:
    """Return a checkpoint's variant and what it was read from, or None where nothing says it.

    The header's model_version goes before the file's name; a name with both words says nothing.
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
    sources = (
        (str(model.metadata.get("model_version", "")), "model_version in its header"),
        (model.path.name, "its file name"),
    )
    found: list[tuple[Variant, str]] = []
    for text, where in sources:
        words = [word for word, pattern in _WORDS if pattern.search(text)]
        if len(words) == 1:
            found.append((words[0], where))
    return found
