"""ltxlite: film-like clips with sound from LTX-2.3 on one small GPU.

From Python:

    from ltxlite import Files, Output, Report, Request, Stage, generate, open_networks

    files = Files("ltx-2.3-22b-distilled.safetensors", text_encoder="gemma-3-12b/")
    request = Request("a steam train", files, Output("train.mp4"), stages=(Stage(),))
    generate(request, open_networks(files, "auto", "auto"), Report())

Names are imported when they are first used, so that `import ltxlite` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Files": "ltxlite.request",
    "Output": "ltxlite.request",
    "Request": "ltxlite.request",
    "Stage": "ltxlite.request",
    "Guidance": "ltxlite.sampling.settings",
    "Report": "ltxlite.progress",
    "LtxliteError": "ltxlite.errors",
    "open_networks": "ltxlite.opening",
    "generate": "ltxlite.pipeline",
    "stages_for": "ltxlite.presets",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ltxlite' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
