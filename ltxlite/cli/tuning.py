"""Flags that depart from the official way of computing: weights of branches, ComfyUI's masks."""

import argparse
import re
from typing import TYPE_CHECKING

from ltxlite.errors import RequestError

if TYPE_CHECKING:
    from ltxlite.tuning import Tuning

_SCALES = {
    "video": "video",
    "audio": "audio",
    "a2v": "audio_to_video",
    "v2a": "video_to_audio",
}
_NUMBER = r"\d*\.?\d+"
_BLOCKS = r"(\d{1,4})(?:-(\d{1,4}))?"
_FORMS = "wanted items such as video=1.03, audio=1, a2v=1.5, v2a=1, blocks=10-20"


def add_tuning(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--attn-scale",
        metavar="NAME=X[,...]",
        help="multiply what layers add to their stream: video, audio, a2v (what the picture hears "
        "of the sound), v2a; blocks=10-20 does so in these only (default 1 each)",
    )
    group.add_argument(
        "--mask-mode",
        choices=("official", "comfy"),
        default="official",
        help="what strengths between 0 and 1 mean; comfy: as in ComfyUI, about twice as strong "
        "(default official)",
    )


def tuning_of(options: argparse.Namespace) -> "Tuning":
    """Return what the flags say. Raises RequestError for what cannot be read."""
    from ltxlite.tuning import Tuning

    scales: dict[str, float] = {}
    blocks: list[tuple[int, int]] = []
    text = options.attn_scale
    for item in () if text is None else text.split(","):
        name, _, value = item.strip().partition("=")
        if name in _SCALES and _SCALES[name] not in scales and re.fullmatch(_NUMBER, value):
            scales[_SCALES[name]] = float(value)
        elif name == "blocks" and (match := re.fullmatch(_BLOCKS, value)):
            blocks.append((int(match[1]), int(match[2] or match[1])))
        else:
            raise RequestError(f"--attn-scale {text!r}: {item.strip()!r} is amiss; {_FORMS}")
    if blocks and not scales:
        raise RequestError(f"--attn-scale {text!r}: blocks without a scale; {_FORMS}")
    return Tuning(**scales, blocks=tuple(sorted(blocks)), masks=options.mask_mode)
