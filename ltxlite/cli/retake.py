"""`retake`: a part of a clip made anew; everything else stays as it is."""

import argparse
from typing import TYPE_CHECKING

from ltxlite.cli import editing
from ltxlite.cli.editing import Existing, Job

if TYPE_CHECKING:
    from ltxlite.conditions import Source

EXAMPLE = """example:
  ltxlite retake take1.mp4 --from 2 --to 3.5 --prompt "she drops the glass" --model ... -o take2.mp4

The model sees --window frames around the part; all others are copied from the clip."""
WINDOW, CONTEXT = 121, 24  # frames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    editing.add_arguments(parser, EXAMPLE)
    group = parser.add_argument_group("retake")
    group.add_argument(
        "--from", dest="begin", type=float, default=0.0, help="second (default: the beginning)"
    )
    group.add_argument("--to", dest="end", type=float, help="second (default: the end)")
    group.add_argument("--only", choices=("video", "audio"), help="keep the other as it is")
    group.add_argument(
        "--edge",
        choices=("outward", "inward"),
        default="outward",
        help="the model makes 8 frames at once: all that the part touches (default), or only "
        "those inside of it",
    )
    group.add_argument(
        "--window", type=int, help=f"frames that the model sees, 8n+1 (default {WINDOW} or more)"
    )
    editing.add_color_match(group)


def run(options: argparse.Namespace) -> int:
    """Plan, make, print where the clip is."""
    return editing.run(options, lambda existing: plan(options, existing), None)


def plan(options: argparse.Namespace, existing: Existing) -> Job:
    """Return the job: a window of the clip, and the part of it that is made anew.

    Raises RequestError for a part that does not lie in the clip.
    """
    from ltxlite.conditions import Source

    begin, end = _part(options, existing)
    frames, offset = _window(options, existing, begin, end)
    shift = offset / float(existing.rate)
    interval = (max(0.0, begin - shift), end - shift)
    wants_picture = options.only != "audio"
    wants_sound = options.only != "video" and existing.has_sound and options.mask is None
    source = Source(
        existing.path,
        video=interval if wants_picture else None,
        audio=interval if wants_sound or options.only == "audio" else None,
        mask=options.mask,
        denoise=options.denoise,
        offset=offset,
        edge=options.edge,
        whole=True,
        match=options.color_match,
    )
    return Job(source, frames, (_told(source, frames, existing),))


def _part(options: argparse.Namespace, existing: Existing) -> tuple[float, float]:
    from ltxlite.errors import RequestError

    end = existing.seconds if options.end is None else options.end
    if not 0 <= options.begin < end:
        raise RequestError(f"--from {options.begin:g} --to {end:g}: nothing lies between")
    if end > existing.seconds + 1 / existing.rate:
        raise RequestError(
            f"--to {end:g}: {existing.path} ends at {existing.seconds:.3f} s; `ltxlite extend` "
            "makes it longer"
        )
    if options.only == "audio" and options.mask is not None:
        raise RequestError("--only audio keeps the picture; leave --mask out")
    return options.begin, min(end, existing.seconds)


def _window(
    options: argparse.Namespace, existing: Existing, begin: float, end: float
) -> tuple[int, int]:
    """Return how many frames the model sees and the first of them."""
    from ltxlite.errors import RequestError

    rate = float(existing.rate)
    needed = round((end - begin) * rate)
    asked = options.window
    window = editing.legal_above(max(WINDOW, needed + 2 * CONTEXT) if asked is None else asked)
    window = min(window, editing.legal_above(existing.frames))
    if window < needed:
        raise RequestError(f"--window {asked}: the part has {needed} frames; give {needed} or more")
    first = round((begin + end) / 2 * rate - window / 2)
    return window, max(0, min(first, existing.frames - window))


def _told(source: "Source", frames: int, existing: Existing) -> str:
    from ltxlite.geometry import LatentGrid
    from ltxlite.given.source_clip import picture_frames

    made = picture_frames(source, frames, existing.rate, LatentGrid())
    if made.is_empty:
        return f"{existing.path}: all of its picture is kept"
    first, last = source.offset + made.start, min(source.offset + made.stop, existing.frames) - 1
    return (
        f"{existing.path}: frames {first} to {last} of {existing.frames} are made anew, seen by "
        f"the model with frames {source.offset} to {source.offset + frames - 1}"
    )
