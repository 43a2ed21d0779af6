"""`inpaint`: a place in a clip filled by the inpainting LoRA, and blended in."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ltxlite.cli import editing
from ltxlite.cli.editing import Existing, Job

if TYPE_CHECKING:
    from ltxlite.request import Stage

EXAMPLE = """example:
  ltxlite inpaint street.mp4 --mask car.mp4 --prompt "an empty street" --lora inpaint.safetensors \\
      --model ... -o empty.mp4

The mask is a still or a video of the clip's size, white where it is filled. Without a LoRA,
`ltxlite retake --mask` fills small places."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    editing.add_arguments(parser, EXAMPLE)


def run(options: argparse.Namespace) -> int:
    """Plan, make, print where the clip is."""
    from ltxlite.errors import RequestError

    if options.mask is None:
        raise RequestError("inpaint: say with --mask what is to be filled (white)")
    return run_filling(options, "inpaint", (0, 0, 0, 0))


def run_filling(options: argparse.Namespace, verb: str, pad: tuple[int, int, int, int]) -> int:
    """Plan and make a job in which a LoRA fills a mask, or a canvas that is larger by `pad`.

    Raises RequestError for flags that do not go with it.
    """
    from ltxlite.errors import RequestError

    if not options.lora:
        raise RequestError(f"{verb} needs its LoRA; name it with --lora")
    if options.stages not in (None, 2) or options.denoise is not None:
        raise RequestError(f"{verb} has two stages, and fills all of a place anew")
    options.stages = 1  # the second one needs no upscaler: it is made from the first
    return editing.run(options, lambda existing: plan(existing, options.mask, pad), None)


def plan(existing: Existing, mask: str | None, pad: tuple[int, int, int, int]) -> Job:
    """Return the job: half size with the painted clip as reference, blended, then full size.

    Source: Lightricks' in- and outpainting graphs (features.md F9).
    """
    from ltxlite.conditions import Reference, Source

    source = Source(
        existing.path, video=(0.0, existing.seconds), mask=mask, whole=True, fill=True, pad=pad
    )
    reference = Reference(existing.path, downscale=1, temporal=1, kind="filled")
    return Job(source, editing.legal_above(existing.frames), (), two_stages, (reference,), 2)


def two_stages(preset: tuple["Stage", ...]) -> tuple["Stage", ...]:
    """Return a preset's first stage at half size, and what refines it after the blend."""
    from ltxlite.sampling.settings import Guidance

    first = replace(preset[0], scale="1/2")
    second = replace(
        preset[0],
        sigmas="stage2-inpaint",
        sampler="euler_cfg_pp",
        sampler_options={},
        video=Guidance(),
        audio=Guidance(),
        upscaler="pixels",
        sound="freeze",
    )
    return first, second
