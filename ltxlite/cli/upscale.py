"""`upscale`: a clip with more pixels, drawn by the model; its sound is kept."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ltxlite.cli import editing
from ltxlite.cli.editing import Existing, Job

if TYPE_CHECKING:
    from ltxlite.conditions import Source
    from ltxlite.request import Stage

EXAMPLE = """examples:
  ltxlite upscale small.mp4 --prompt "a harbour at dawn" --model ... --upscaler ... -o large.mp4
  ltxlite upscale small.mp4 --mode iclora --lora upscaler.safetensors --model ... -o large.mp4
  ltxlite upscale soft.mp4 --mode detailer --times 1 --lora detailer.safetensors --model ...

The prompt should say what the clip shows. --sigmas and --sampler, repeated, refine the enlarged
clip so many times. All of it is held in memory as latents: long clips are to be cut first."""
_MOST_PIXELS = 3840 * 2176
_FACTORS = {"x2": "2", "x1.5": "3/2"}
_DETAILER = "0.909375,0.725,0.421875,0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; --upscale-by says by how much."""
    editing.add_arguments(parser, EXAMPLE)
    group = parser.add_argument_group("upscale")
    group.add_argument(
        "--mode",
        choices=("latent", "iclora", "detailer"),
        default="latent",
        help="the latent upscaler and a refining stage (default); an IC-LoRA that enlarges "
        "pixels; the detailer IC-LoRA, on a dev model",
    )
    group.add_argument(
        "--times",
        choices=("1", "3/2", "2", "4"),
        help="how large the clip gets with iclora (default: as its file says, else 2) or detailer "
        "(default: as --upscale-by)",
    )
    group.add_argument(
        "--free-first-frame",
        action="store_true",
        help="latent: let the first frame be drawn anew, too (default: it stays as it was, "
        "enlarged, and the others follow it)",
    )


def run(options: argparse.Namespace) -> int:
    """Plan, make, print where the clip is."""
    from ltxlite.errors import RequestError

    if options.denoise is not None or options.mask is not None:
        raise RequestError("upscale: --sigmas says how much of the clip is drawn anew")
    if options.mode != "latent":
        return _run_with_lora(options)
    if options.stages not in (None, 2) or options.quality == "draft":
        raise RequestError("upscale has one stage that holds the clip and one that refines it")
    if options.times is not None:
        raise RequestError("--times goes with --mode iclora and detailer; here --upscale-by")
    options.stages, options.magnify = 2, _FACTORS[options.upscale_by]
    refining = options.sigmas, options.sampler
    options.sigmas = options.sampler = None
    first = not options.free_first_frame
    return editing.run(options, lambda existing: plan(existing, refining, first), _MOST_PIXELS)


def plan(
    existing: Existing,
    refining: tuple[list[str] | None, list[str] | None] = (None, None),
    first: bool = True,
) -> Job:
    """Return the job: the clip held in a first stage, enlarged, and refined in further ones.

    refining: sigmas and samplers of the refining stages; of each, the last one serves the rest.
    """
    source = replace(_source(existing), held=(1,), first=first)
    sigmas, samplers = (list(given or ()) for given in refining)

    def stages(preset: tuple["Stage", ...]) -> tuple["Stage", ...]:
        # A held stage gives what it is given, whatever its schedule: one step, without guidance.
        held = replace(preset[0], sigmas="0.1,0", sampler="euler", video=preset[1].video)
        held = replace(held, audio=preset[1].audio, sampler_options={}, loras=preset[1].loras)
        found = [held]
        for number in range(max(1, len(sigmas), len(samplers))):
            stage = replace(preset[1], sound="freeze")
            if number:
                stage = replace(stage, upscaler=None)
            if sigmas:
                stage = replace(stage, sigmas=sigmas[min(number, len(sigmas) - 1)])
            if samplers:
                sampler = samplers[min(number, len(samplers) - 1)]
                stage = replace(stage, sampler=sampler, sampler_options={})
            found.append(stage)
        return tuple(found)

    return Job(source, editing.legal_above(existing.frames), (), stages)


def plan_pixels(options: argparse.Namespace, existing: Existing, factor: int) -> Job:
    """Return the job of the upscaling IC-LoRA: one stage from noise, the clip as its reference.

    factor: how many times smaller the reference is.  Source: features.md F11.
    """
    from ltxlite.conditions import Reference

    def stages(preset: tuple["Stage", ...]) -> tuple["Stage", ...]:
        return (_unguided(preset[0], options, "euler_cfg_pp", preset[0].sigmas),)

    reference = Reference(existing.path, downscale=factor, temporal=1, kind="source")
    frames = editing.legal_above(existing.frames)
    return Job(_source(existing), frames, (), stages, (reference,), factor)


def plan_details(options: argparse.Namespace, existing: Existing) -> Job:
    """Return the job of the detailer: begun from the clip, with the clip as its reference, too.

    Source: features.md F4.
    """
    from ltxlite.conditions import Reference

    def stages(preset: tuple["Stage", ...]) -> tuple["Stage", ...]:
        return (_unguided(preset[0], options, "euler", _DETAILER),)

    reference = Reference(existing.path, downscale=1, temporal=1, kind="source")
    frames = editing.legal_above(existing.frames)
    return Job(_source(existing), frames, (), stages, (reference,))


def _run_with_lora(options: argparse.Namespace) -> int:
    from ltxlite.errors import RequestError
    from ltxlite.given.reference_factors import stated_factor
    from ltxlite.strength import parse_lora

    if not options.lora:
        raise RequestError(f"--mode {options.mode} needs its IC-LoRA; name it with --lora")
    if options.stages not in (None, 1) or options.free_first_frame:
        raise RequestError(f"--mode {options.mode} has one stage, which draws every frame")
    options.stages, options.prompt = 1, options.prompt or ""
    if options.mode == "detailer":
        options.magnify = options.times or _FACTORS[options.upscale_by]
        return editing.run(options, lambda clip: plan_details(options, clip), _MOST_PIXELS)
    stated = stated_factor("downscale", [parse_lora(text)[0] for text in options.lora])
    factor = stated or {"4": 4}.get(options.times, 2)
    if options.times not in (None, str(factor)) or factor not in (2, 4):
        raise RequestError(
            f"--mode iclora: the LoRA enlarges {factor} times, which is to be 2 or 4, and --times "
            "the same"
        )
    options.magnify = str(factor)
    return editing.run(options, lambda clip: plan_pixels(options, clip, factor), _MOST_PIXELS)


def _source(existing: Existing) -> "Source":
    from ltxlite.conditions import Source

    everything = (0.0, existing.seconds)
    return Source(existing.path, video=everything, magnify=str(existing.magnify), whole=True)


def _unguided(stage: "Stage", options: argparse.Namespace, sampler: str, sigmas: str) -> "Stage":
    """Return a stage without guidance, with these defaults where no flag says otherwise."""
    from ltxlite.sampling.settings import Guidance

    if options.cfg is None:
        stage = replace(stage, video=Guidance(), audio=Guidance())
    if not options.sampler:
        stage = replace(stage, sampler=sampler, sampler_options={})
    return stage if options.sigmas or options.steps else replace(stage, sigmas=sigmas)
