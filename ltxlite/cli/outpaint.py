"""`outpaint`: a clip on a larger canvas, what lies beyond it drawn by the outpainting LoRA."""

import argparse

from ltxlite.cli import editing
from ltxlite.cli.inpaint import run_filling

EXAMPLE = """example:
  ltxlite outpaint tall.mp4 --left 320 --right 320 --prompt "a market square" \\
      --lora outpaint.safetensors --model ... -o wide.mp4"""
_SIDES = ("left", "top", "right", "bottom")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    editing.add_arguments(parser, EXAMPLE)
    group = parser.add_argument_group("outpaint")
    for side in _SIDES:
        group.add_argument(
            f"--{side}", type=int, default=0, metavar="PIXELS", help="to add there (default 0)"
        )


def run(options: argparse.Namespace) -> int:
    """Plan, make, print where the clip is."""
    from ltxlite.errors import RequestError

    left, above, right, below = (getattr(options, side) for side in _SIDES)
    if not any((left, above, right, below)):
        raise RequestError("outpaint: say how many pixels to add, e.g. --left 320 --right 320")
    return run_filling(options, "outpaint", (left, above, right, below))
