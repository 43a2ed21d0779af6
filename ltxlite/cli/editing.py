"""What `retake`, `extend` and `v2a` share: an existing clip, and a job that fits it."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ltxlite.cli import generate

if TYPE_CHECKING:
    from ltxlite.conditions import Reference, Source
    from ltxlite.media.timing import Timing
    from ltxlite.request import Stage

_MULTIPLES = {1: 32, 2: 64, 3: 128}  # pixels that sides must be multiples of, by stages
_MOST_PIXELS = 1536 * 1024  # made in one stage; larger sources are made smaller and scaled back
_STEP = 8  # frames in a latent frame


@dataclass(frozen=True, slots=True)
class Existing:
    """The clip that is edited: its timing, its size as shown, whether it has sound.

    magnify: how many times that size it shall have.
    """

    path: str
    timing: "Timing"
    rate: Fraction
    width: int
    height: int
    has_sound: bool
    magnify: Fraction = Fraction(1)

    @property
    def frames(self) -> int:
        """Frames at the job's rate."""
        return self.timing.count(self.rate)

    @property
    def seconds(self) -> float:
        """Length."""
        return self.frames / float(self.rate)


@dataclass(frozen=True, slots=True)
class Job:
    """What a verb makes of its flags.

    source: its record.  frames: of the clip, 8n + 1.  notes: told before anything begins.  stages:
    turns the preset's into the job's.  references: what is seen besides those of the flags.
    multiple: what sides must also be multiples of, in latent places.
    """

    source: "Source"
    frames: int
    notes: tuple[str, ...] = ()
    stages: Callable[[tuple["Stage", ...]], tuple["Stage", ...]] = tuple
    references: tuple["Reference", ...] = ()
    multiple: int = 1


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """Declare the source, and the flags of `generate` with defaults that follow it."""
    parser.add_argument("source", metavar="CLIP", help="the existing clip: any size, rate, codec")
    generate.add_arguments(parser)
    parser.epilog = example
    parser.set_defaults(size=None, fps=None)


def add_color_match(group: "argparse._ArgumentGroup") -> None:
    """Declare the flag that keeps colours from jumping where made frames follow kept ones."""
    group.add_argument(
        "--color-match",
        action="store_true",
        help="undo, in what is made, the change of colour that coding makes to the frames before",
    )


def run(options: argparse.Namespace, plan: Callable[[Existing], Job], most: int | None) -> int:
    """Build the job that `plan` makes of the clip, run it, print where the result is.

    most: pixels of a frame that the model makes; None for as many as the clip has, within reason.
    """
    from ltxlite.cli.jobs import new_job
    from ltxlite.cli.show import Terminal
    from ltxlite.errors import RequestError
    from ltxlite.partial import partial_stages
    from ltxlite.pipeline import generate as make

    refuse_flags(options)
    with Terminal(options.quiet) as terminal:
        existing = open_existing(options)
        job = plan(existing)
        for name in ("mask", "denoise"):
            if getattr(options, name) is not None and getattr(job.source, name) is None:
                raise RequestError(f"--{name} goes with retake, and with generate --init-video")
        for note in job.notes:
            terminal.note(note)
        options.stages = options.stages or 1
        options.frames = job.frames
        multiple = _MULTIPLES[options.stages] * job.multiple
        options.size = options.size or model_size(
            existing, job.source, multiple, most or _MOST_PIXELS
        )
        options.mask = options.denoise = None  # they are in the source's record
        request, networks = new_job(options, terminal.note)
        refuse_output(job.source, request.output.path)
        references = (*request.conditions.references, *job.references)
        conditions = replace(request.conditions, source=job.source, references=references)
        stages = request.stages if options.sigmas else partial_stages(request.stages, conditions)
        request = replace(
            request,
            conditions=conditions,
            stages=job.stages(stages),
            output=replace(request.output, crop=None),
        )
        if options.save_job:
            Path(options.save_job).write_text(request.to_json(), encoding="utf-8")
        means = generate.means_of(options, networks, terminal)
        result = make(request, networks, terminal, means)
    generate.show_result(request, result, options.json)
    return 0


def refuse_flags(options: argparse.Namespace) -> None:
    """Refuse flags of `generate` that say what the clip says already."""
    from ltxlite.errors import RequestError

    if options.job:
        raise RequestError("--job goes with `ltxlite generate --job FILE`, whatever made the job")
    for name in ("init_video", "audio", "frames", "seconds"):
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise RequestError(f"--{flag} goes with generate; here {options.source} says it")


def open_existing(options: argparse.Namespace) -> Existing:
    """Read what must be known of the clip; `--fps` says at which rate, its own is the default."""
    from ltxlite.media.timing import read_timing
    from ltxlite.media.video_reader import iter_frames, read_video_info
    from ltxlite.request import parse_fraction

    path = Path(options.source)
    timing = read_timing(path)
    rate = timing.rate if options.fps is None else parse_fraction(options.fps, "--fps")
    options.fps = str(rate)
    first = next(iter_frames(path, 0, 1))  # as shown: a header knows nothing of rotation
    info = read_video_info(path)
    size = first.shape[1], first.shape[0]
    magnify = Fraction(getattr(options, "magnify", None) or 1)
    return Existing(options.source, timing, rate, *size, info.audio_rate is not None, magnify)


def model_size(existing: Existing, source: "Source", multiple: int, most: int) -> str:
    """Return the size to make frames at: the clip's, on the next grid lines, of so many pixels."""
    left, above, right, below = source.pad
    canvas = existing.width + left + right, existing.height + above + below
    sides = [float(side * existing.magnify) for side in canvas]
    scale = min(1.0, math.sqrt(most / math.prod(sides)))
    width, height = (max(1, math.ceil(round(side * scale) / multiple)) * multiple for side in sides)
    return f"{width}x{height}"


def legal_above(frames: int) -> int:
    """Return the smallest legal frame count (8n + 1) that is not below `frames`."""
    return math.ceil(max(frames - 1, 0) / _STEP) * _STEP + 1


def refuse_output(source: "Source", output: str) -> None:
    """Refuse, before any work, a place that the edit cannot be written to.

    Raises RequestError for the clip itself, MediaError where its picture cannot be copied.
    """
    from ltxlite.errors import RequestError
    from ltxlite.given.source_clip import picture_interval
    from ltxlite.media.remux import check_copy

    target, path = Path(output), Path(source.path)
    if target.exists() and path.exists() and target.samefile(path):
        raise RequestError(f"{path}: would be overwritten by its own edit; name another with -o")
    if picture_interval(source) is None and target.suffix:
        check_copy(path, target)
