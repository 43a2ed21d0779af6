"""`demo`: the same path as `generate`, on a tiny random checkpoint that ltxlite writes itself."""

import argparse

EXAMPLE = """example:
  ltxlite demo --prompt "a boat on a lake" -o boat.mp4"""
SIZE, FRAMES = "384x256", 25
PROMPT = "a small boat drifts over a quiet lake while rain begins to fall"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("--prompt", default=PROMPT, help="what to ask for; it changes the noise")
    parser.add_argument("-o", "--output", default="demo.mp4", help="the clip (default demo.mp4)")
    parser.add_argument("--size", default=SIZE, help=f"WIDTHxHEIGHT in pixels (default {SIZE})")
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"frames (default {FRAMES})")
    parser.add_argument("--seed", type=int, default=10, help="seed (default 10)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Write the demo checkpoint if need be, then run `generate` on it as on any other file."""
    from ltxlite.cache import cache_folder
    from ltxlite.cli import generate
    from ltxlite.cli.show import Terminal
    from ltxlite.demo import write_demo_model

    with Terminal(options.quiet) as terminal:
        model, upscaler, encoder = write_demo_model(cache_folder() / "demo", terminal.note)
        terminal.note(
            "the demo checkpoint is RANDOM, nothing was trained: the clip shows that every part "
            "runs, and coloured noise with a hum; README, 'Files', names the real checkpoints"
        )
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    arguments = ["--model", str(model), "--upscaler", str(upscaler), "--text-encoder", str(encoder)]
    for name in ("prompt", "output", "size", "frames", "seed", "device"):
        arguments += [f"--{name}", str(getattr(options, name))]
    arguments += [f"--{name}" for name in ("quiet", "json") if getattr(options, name)]
    return generate.run(parser.parse_args(arguments))
