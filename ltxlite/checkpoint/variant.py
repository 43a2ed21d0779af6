"""Tells dev from distilled: no tensor differs in shape, so only words can say it."""

import re
from typing import Literal

from ltxlite.checkpoint.files import OpenModel

_WORDS = (
    ("distilled", re.compile(r"(?<![a-z])distill(?:ed)?(?![a-z])", re.IGNORECASE)),
    ("dev", re.compile(r"(?<![a-z])dev(?![a-z])", re.IGNORECASE)),
)


def variant_of(model: OpenModel) -> tuple[Literal["dev", "distilled"], str] | None:
    """Return a checkpoint's variant and what it was read from, or None where nothing says it.

    The header's model_version goes before the file's name; a name with both words says nothing.
    """
    sources = (
        (str(model.metadata.get("model_version", "")), "model_version in its header"),
        (model.path.name, "its file name"),
    )
    for text, where in sources:
        found = [word for word, pattern in _WORDS if pattern.search(text)]
        if len(found) == 1:
            return ("dev" if found[0] == "dev" else "distilled"), where
    return None
