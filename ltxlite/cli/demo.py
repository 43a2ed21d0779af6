"""`demo`: the same path as `generate`, on a tiny model: of a small world, or of random weights."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltxlite.progress import Report
    from ltxlite.training.world import Facts

EXAMPLE = """example:
  ltxlite demo --prompt "a green ring moves up on a white background, a high pulsing tone" -o r.mp4

A word that the model does not know makes it list those that it does."""
PROMPT = "a red circle moves right on a black background, a low pulsing tone"
SIZE, FRAMES, FPS = "128x128", 17, "16"
RANDOM_SIZE, RANDOM_FRAMES, RANDOM_FPS = "384x256", 25, "24"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "--prompt", default=PROMPT, help=f"what to see and hear (default: {PROMPT})"
    )
    parser.add_argument("-o", "--output", default="demo.mp4", help="the clip (default demo.mp4)")
    parser.add_argument("--size", help=f"WIDTHxHEIGHT in pixels (default {SIZE})")
    parser.add_argument("--frames", type=int, help=f"frames (default {FRAMES})")
    parser.add_argument("--fps", help=f"frames per second (default {FPS})")
    parser.add_argument("--seed", type=int, default=10, help="seed (default 10)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    parser.add_argument(
        "--random",
        action="store_true",
        help="a checkpoint of random weights, written anew: noise, larger and longer (default "
        "where no trained one is)",
    )
    parser.add_argument("--world", metavar="FOLDER", help="a model that `train world` made")
    parser.add_argument("--lora", metavar="FILE", help="what `train orange` made, for example")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace) -> int:
    """Run `generate` on the demo's files as on any other, then tell what the clip shows."""
    from ltxlite.cli import generate
    from ltxlite.cli.show import Terminal
    from ltxlite.demo import packaged_world

    options.random |= options.world is None and packaged_world() is None
    with Terminal(options.quiet) as terminal:
        files = _random_files(terminal) if options.random else _world_files(options, terminal)
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    defaults = (SIZE, FRAMES, FPS)
    if options.random:
        defaults = (RANDOM_SIZE, RANDOM_FRAMES, RANDOM_FPS)
    arguments = list(files)
    for name, default in zip(("size", "frames", "fps"), defaults, strict=True):
        given = getattr(options, name)
        arguments += [f"--{name}", str(default if given is None else given)]
    for name in ("prompt", "output", "seed", "device"):
        arguments += [f"--{name}", str(getattr(options, name))]
    if options.lora:
        arguments += ["--lora", options.lora]
    arguments += [f"--{name}" for name in ("quiet", "json") if getattr(options, name)]
    code = generate.run(parser.parse_args(arguments))
    if code == 0 and not options.random:
        _tell(options)
    return code


def _random_files(report: "Report") -> list[str]:
    from ltxlite.cache import cache_folder
    from ltxlite.demo import write_demo_model

    model, upscaler, encoder = write_demo_model(cache_folder() / "demo", report.note)
    report.note(
        "this checkpoint is RANDOM, nothing was trained: the clip shows that every part runs, and "
        "coloured noise with a hum"
    )
    return ["--model", str(model), "--upscaler", str(upscaler), "--text-encoder", str(encoder)]


def _world_files(options: argparse.Namespace, report: "Report") -> list[str]:
    from ltxlite.demo import world_files
    from ltxlite.training.world import CHOICES, PHRASES, unknown_words

    files = world_files(None if options.world is None else Path(options.world))
    if unknown := unknown_words(options.prompt):
        report.note(f"the tiny model does not know: {', '.join(unknown)}. It knows")
        report.note(f"  {PHRASES[0]}")
        for name, choice in CHOICES.items():
            report.note(f"  {name}: {', '.join(choice)}")
    report.note("a tiny model of a small world; README, 'Files', names the real checkpoints")
    return ["--model", str(files.model.parent)]


def _tell(options: argparse.Namespace) -> None:
    """Print what the clip shows, beside what it was to show."""
    from dataclasses import asdict

    from ltxlite.cli.show import print_result
    from ltxlite.training.world import read_caption, unknown_words

    seen = measured(Path(options.output))
    asked = read_caption(options.prompt, seen)
    assert asked is not None
    wrong = [name for name, right in asked.agreement(seen).items() if not right]
    verdict = f"not as asked: {', '.join(wrong)}" if wrong else "as asked"
    if unknown := unknown_words(options.prompt):
        verdict += f", but for {', '.join(unknown)}, which measuring has no word for"
    print_result(
        f"measured: {seen.caption()} ({verdict})",
        {"measured": asdict(seen), "not_as_asked": wrong},
        options.json,
    )


def measured(path: Path) -> "Facts":
    """Return what a clip of the world shows and sounds like: an mp4, or a folder of frames."""
    from ltxlite.errors import MediaError
    from ltxlite.media.video_reader import read_video
    from ltxlite.training.measure import facts_of, listen_to, look

    clip = read_video(path)
    if clip.waveform is None or clip.audio_rate is None:
        raise MediaError(f"{path}: has no sound to measure")
    frames = clip.frames.movedim(-1, 1).float() / 127.5 - 1
    return facts_of(look(frames, float(clip.fps)), listen_to(clip.waveform, clip.audio_rate))
