"""`extend`: a clip made longer, behind its end or before its beginning."""

import argparse

from ltxlite.cli import editing
from ltxlite.cli.editing import Existing, Job

EXAMPLE = """example:
  ltxlite extend take1.mp4 --by 3 --prompt "she walks out of the picture" --model ... -o longer.mp4

The last --overlap frames are shown to the model; every frame of the clip stays as it is."""
OVERLAP = 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    editing.add_arguments(parser, EXAMPLE)
    group = parser.add_argument_group("extend")
    group.add_argument("--by", type=float, required=True, help="seconds to add")
    group.add_argument("--backward", action="store_true", help="before the beginning")
    group.add_argument(
        "--overlap",
        type=int,
        default=OVERLAP,
        help=f"frames of the clip that the model sees (default {OVERLAP}); more of them keep its "
        "motion better",
    )
    editing.add_color_match(group)


def run(options: argparse.Namespace) -> int:
    """Plan, make, print where the clip is."""
    return editing.run(options, lambda existing: plan(options, existing), None)


def plan(options: argparse.Namespace, existing: Existing) -> Job:
    """Return the job: the end of the clip (or its beginning), kept, and what comes beyond it.

    Raises RequestError for nothing to add or nothing to see.
    """
    from ltxlite.conditions import Source

    overlap = _overlap(options, existing)
    added = _added(options, existing)
    frames = overlap + added
    rate = float(existing.rate)
    if options.backward:
        offset, interval = -added, (0.0, added / rate)
    else:
        offset, interval = existing.frames - overlap, (overlap / rate, frames / rate)
    source = Source(
        existing.path,
        video=interval,
        audio=interval if existing.has_sound else None,
        offset=offset,
        whole=True,
        match=options.color_match,
    )
    where = "before its beginning" if options.backward else "behind its end"
    told = (
        f"{existing.path}: {added} frames ({added / rate:.2f} s) {where}, from {overlap} of its "
        f"{existing.frames}"
    )
    return Job(source, frames, (told,))


def _overlap(options: argparse.Namespace, existing: Existing) -> int:
    """Return how many frames are shown: 8n + 1 at the clip's end, 8n at its beginning.

    So the cut lies between latent frames: the first of a clip holds one frame, all others eight.
    """
    from ltxlite.errors import RequestError

    wanted: int = options.overlap
    if wanted < 1:
        raise RequestError(f"--overlap {wanted}: wanted 1 frame or more; 25 is usual")
    most = min(wanted, existing.frames)
    if not options.backward:
        return (most - 1) // 8 * 8 + 1
    if most < 8:
        raise RequestError(
            f"--overlap {most}: backward the model must see 8 frames or more of "
            f"{existing.path}, which has {existing.frames}"
        )
    return most // 8 * 8


def _added(options: argparse.Namespace, existing: Existing) -> int:
    """Return how many frames are made: the legal number nearest to what was asked."""
    from ltxlite.errors import RequestError

    if not 0 < options.by <= 3600:
        raise RequestError(f"--by {options.by:g}: wanted more than 0 seconds, at most 3600")
    groups: int = max(1, round(options.by * float(existing.rate) / 8))
    return groups * 8 + (1 if options.backward else 0)
