"""`train`: flags to one call of the training course."""

import argparse
from pathlib import Path

EXAMPLE = """example:
  ltxlite train world --out world/        # about 3 hours on two CPU cores
  ltxlite train world --out world/ --resume"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("what", choices=("world",), help="the tiny model that `demo` runs")
    parser.add_argument("--out", default="world", help="folder of the run (default world)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        help="train this part alone: video_vae, audio_vae, vocoder, latents, upscaler, "
        "upscaler_time, transformer; may be repeated",
    )
    parser.add_argument("--steps", type=int, help="steps of each --part (default: the recipe's)")
    parser.add_argument(
        "--worker", metavar="N/COUNT", help="be one of several processes that share each --part"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")


def run(options: argparse.Namespace) -> int:
    """Train, then print where the files are."""
    from ltxlite.cli.show import Terminal
    from ltxlite.training.course import train_parts, train_world

    folder = Path(options.out)
    with Terminal(options.quiet) as terminal:
        if options.part:
            train_parts(folder, options.part, options.steps, terminal.note, options.worker)
            return 0
        files = train_world(folder, options.resume, terminal)
    for path in files:
        print(path)  # noqa: T201
    return 0
