"""`upscale`: a clip with more pixels, drawn by the model; its sound is kept."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ltxlite.cli import editing
from ltxlite.cli.editing import Existing, Job

if TYPE_CHECKING:
    from ltxlite.request import Stage

EXAMPLE = """example:
  ltxlite upscale small.mp4 --prompt "a harbour at dawn" --model ... --upscaler ... -o large.mp4

The prompt should say what the clip shows. All of it is held in memory as latents: long clips
are to be cut first."""
_MOST_PIXELS = 3840 * 2176
_FACTORS = {"x2": "2", "x1.5": "3/2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; --upscale-by says by how much."""
    editing.add_arguments(parser, EXAMPLE)


def run(options: argparse.Namespace) -> int:
    """Plan, make, print where the clip is."""
    from ltxlite.errors import RequestError

    if options.stages not in (None, 2) or options.quality == "draft":
        raise RequestError("upscale has one stage that holds the clip and one that refines it")
    if options.denoise is not None or options.mask is not None:
        raise RequestError("upscale: --sigmas says how much of the clip is drawn anew")
    options.stages, options.magnify = 2, _FACTORS[options.upscale_by]
    sigmas = options.sigmas
    options.sigmas = None
    return editing.run(options, lambda existing: plan(existing, sigmas), _MOST_PIXELS)


def plan(existing: Existing, sigmas: list[str] | None) -> Job:
    """Return the job: the clip held in a first stage, enlarged, and refined in a second."""
    from ltxlite.conditions import Source

    source = Source(
        existing.path,
        video=(0.0, existing.seconds),
        held=(1,),
        magnify=str(existing.magnify),
        whole=True,
    )

    def stages(preset: tuple["Stage", ...]) -> tuple["Stage", ...]:
        # A held stage gives what it is given, whatever its schedule: one step, without guidance.
        held = replace(preset[0], sigmas="0.1,0", sampler="euler", video=preset[1].video)
        held = replace(held, audio=preset[1].audio, sampler_options={}, loras=preset[1].loras)
        refined = replace(preset[1], sound="freeze")
        return held, refined if sigmas is None else replace(refined, sigmas=sigmas[-1])

    return Job(source, editing.legal_above(existing.frames), (), stages)
