"""`dub`: a clip whose people say something else, in their own voices."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ltxlite.cli import editing, generate
from ltxlite.cli.editing import Existing
from ltxlite.errors import RequestError
from ltxlite.hearing import VOICE_SECONDS

if TYPE_CHECKING:
    from ltxlite.hearing import Voice
    from ltxlite.request import Request

EXAMPLE = """example:
  ltxlite dub interview.mp4 --prompt "The woman says in French: 'Bonjour'" --model ... \\
      --upscaler ... --lora ltx-2.3-22b-ic-lora-dub-it.safetensors -o french.mp4

For distilled checkpoints. The prompt says what is spoken. Rate and frames are the clip's own; its
last frames are left out where it has not 8n + 1 of them."""
_MULTIPLE = 64  # pixels that sides must be multiples of, in two stages
_MOST_PIXELS = 1920 * 1088
_MOST_CROP = 63  # pixels that a delivered clip may be smaller than what is made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    editing.add_arguments(parser, EXAMPLE)


def run(options: argparse.Namespace) -> int:
    """Build the job, run it, print where the clip is.

    The clip is an IC-LoRA's reference in both stages; its sound is a voice in the first one, and
    what that made is held, and heard again, in the second.
    Source: LTX-2 400fd31, ltx_pipelines/dubit.py; features.md F6.
    """
    from ltxlite.cli.jobs import new_job
    from ltxlite.cli.show import Terminal
    from ltxlite.pipeline import generate as make

    _refuse_flags(options)
    with Terminal(options.quiet) as terminal:
        existing = editing.open_existing(options)
        _follow(existing, options)
        request, networks = new_job(options, terminal.note)
        request = dubbed(request, existing)
        if options.save_job:
            Path(options.save_job).write_text(request.to_json(), encoding="utf-8")
        result = make(request, networks, terminal, generate.means_of(options, networks, terminal))
    generate.show_result(request, result, options.json)
    return 0


def dubbed(request: "Request", existing: Existing) -> "Request":
    """Return the job with what flags cannot say of it.

    Raises RequestError for a guided first stage, which the LoRA was not made for.
    """
    from ltxlite.sampling.settings import Guidance

    first = request.stages[0]
    if (first.video, first.audio) != (Guidance(), Guidance()):
        raise RequestError(
            "dub is for distilled checkpoints, without guidance; with a dev one, give its "
            "distilled LoRA as --lora and say --variant distilled"
        )
    voice = request.conditions.voice
    assert voice is not None  # `_follow` names one
    conditions = replace(request.conditions, voice=_echoed(voice, existing, request))
    output = replace(request.output, crop=_crop(existing, request))
    target, path = Path(output.path), Path(existing.path)
    if target.exists() and target.samefile(path):
        raise RequestError(f"{path}: would be overwritten by its own dub; name another with -o")
    return replace(request, conditions=conditions, output=output)


def _refuse_flags(options: argparse.Namespace) -> None:
    editing.refuse_flags(options)
    if options.stages not in (None, 2) or options.quality == "draft":
        raise RequestError("dub has two stages, of half and of full size; leave --stages out")
    if not options.lora:
        raise RequestError("dub needs the Dub-It IC-LoRA; name it with --lora")
    for name in ("reference", "sound", "denoise", "mask"):
        if getattr(options, name):
            raise RequestError(f"--{name} goes with generate; here {options.source} says it")


def _follow(existing: Existing, options: argparse.Namespace) -> None:
    """Set the flags that the clip says: its frames and size, itself as reference and as voice."""
    options.stages, options.frames = 2, (existing.frames - 1) // 8 * 8 + 1
    options.size = options.size or _size(existing)
    options.reference, options.reference_stages = [existing.path], "1,2"
    options.sound = "freeze"
    if options.ref_audio is None and not existing.has_sound:
        raise RequestError(
            f"{existing.path}: has no sound to take voices from; name one with --ref-audio"
        )
    options.ref_audio = options.ref_audio or existing.path
    options.identity_guidance = options.identity_guidance or "0"


def _echoed(voice: "Voice", existing: Existing, request: "Request") -> "Voice":
    """Return the voice as later stages repeat it; the clip's own is heard for its whole length."""
    whole = voice.path == existing.path and voice.seconds == VOICE_SECONDS
    seconds = float(request.seconds) if whole else voice.seconds
    return replace(voice, seconds=seconds, echo=True)


def _size(existing: Existing) -> str:
    """Return the clip's size on the next grid lines, made smaller where it has too many pixels."""
    scale = min(1.0, math.sqrt(_MOST_PIXELS / (existing.width * existing.height)))
    sides = (existing.width * scale, existing.height * scale)
    width, height = (max(1, math.ceil(round(side) / _MULTIPLE)) * _MULTIPLE for side in sides)
    return f"{width}x{height}"


def _crop(existing: Existing, request: "Request") -> tuple[int, int] | None:
    """Return the clip's own size, even, where what is made is hardly larger."""
    own = existing.width // 2 * 2, existing.height // 2 * 2
    surplus = (request.width - own[0], request.height - own[1])
    return own if all(0 <= pixels <= _MOST_CROP for pixels in surplus) else None
