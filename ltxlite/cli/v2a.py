"""`v2a`: sound for a clip; its picture is copied as it is stored."""

import argparse

from ltxlite.cli import editing
from ltxlite.cli.editing import Existing, Job

EXAMPLE = """example:
  ltxlite v2a silent.mp4 --prompt "rain on a tin roof, distant thunder" --model ... -o rain.mp4

The model sees the picture at up to 30 fps and half a megapixel; the copy loses nothing."""
_MOST_PIXELS = 768 * 512
_MOST_RATE = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    editing.add_arguments(parser, EXAMPLE)


def run(options: argparse.Namespace) -> int:
    """Plan, make, print where the clip is."""
    from ltxlite.media.timing import read_timing

    if options.fps is None:
        from pathlib import Path

        rate = read_timing(Path(options.source)).rate
        while rate > _MOST_RATE:
            rate /= 2
        options.fps = str(rate)
    return editing.run(options, plan, _MOST_PIXELS)


def plan(existing: Existing) -> Job:
    """Return the job: the whole picture kept, the whole sound made."""
    from ltxlite.conditions import Source
    from ltxlite.given.source_clip import EVERYTHING

    frames = editing.legal_above(existing.frames)
    return Job(Source(existing.path, audio=EVERYTHING, whole=True), frames)
