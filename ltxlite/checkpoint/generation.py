"""What the words of a file say about the generation that it was made for: header first, then name.

Source: features.md N2.
"""

import re

from ltxlite.checkpoint.config import model_version
from ltxlite.checkpoint.files import OpenModel

Version = tuple[int, ...]
Told = tuple[Version, str]  # and what tells it

# In order; LTX-2.5 has 22B weights too.
_WORDS = (
    (re.compile(r"ltx[-_ ]?v?2[._]5", re.IGNORECASE), (2, 5)),
    (re.compile(r"ltx[-_ ]?v?2[._]3|(?<!\d)22b", re.IGNORECASE), (2, 3)),
    (re.compile(r"ltx[-_ ]?v?2[._]0|(?<!\d)19b", re.IGNORECASE), (2, 0)),
)
# Upscalers have no size in their names: 2.0's are ltx-2-spatial-upscaler-x2-1.0 and the like.
_FIRST = re.compile(r"ltx[-_ ]?v?2(?![._]?\d)", re.IGNORECASE)
# Keys of a header that may name the base model.
_SAYING = re.compile(r"base_?model|model_name|modelspec\.|ss_(base_model|sd_model)|checkpoint")


def stated(model: OpenModel) -> Told | None:
    """Return the generation that the header's model_version states."""
    version = model_version(model.metadata)
    return (version, "model_version in its header") if version else None


def spoken(model: OpenModel) -> list[Told]:
    """Return what other words of the header, and the name, say, the surest first."""
    said = {key: str(value) for key, value in model.metadata.items() if _SAYING.search(key)}
    said["its file name"] = model.path.name
    return [
        (version, key)
        for key, text in said.items()
        for pattern, version in _WORDS
        if pattern.search(text)
    ]


def upscaler_generation(model: OpenModel) -> Told | None:
    """Return the generation that a latent upscaler was made for; None where nothing tells.

    No shape differs between those of 2.0 and 2.3, but the statistics of latents do.
    """
    found = [told for told in (stated(model), *spoken(model)) if told is not None]
    if not found and _FIRST.search(model.path.name):
        found = [((2, 0), "its file name")]
    return found[0] if found else None
