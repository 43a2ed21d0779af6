"""`train`: flags to one call of the training course."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ltxlite.errors import RequestError

EXAMPLE = """example:
  ltxlite train world --out world/        # about 95 minutes on two CPU cores
  ltxlite train world --out world/ --resume
  ltxlite train orange --colour 0.95,0.5,0.05 --out words/   # a LoRA, a minute; then
  ltxlite demo --lora words/word-orange.safetensors \
    --prompt "a orange ring moves up on a black background, a high steady tone" -o orange.mp4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "what", help="world: the tiny model that `demo` runs; or a word for it to learn: orange, "
        "purple"
    )  # fmt: skip
    parser.add_argument("--colour", metavar="R,G,B", help="what the word means, from 0 to 1 each")
    parser.add_argument("--world", metavar="FOLDER", help="the model that learns it (default ours)")
    parser.add_argument("--out", default="world", help="folder of the run (default world)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        help="train this part alone: video_encoder, audio_vae, vocoder, latents, transformer, "
        "video_vae, video_decoder, upscaler, upscaler_time; may be repeated",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    parser.add_argument("--steps", type=int, help="steps of each --part (default: the recipe's)")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")


def run(options: argparse.Namespace) -> int:
    """Train, then print where the files are."""
    from ltxlite.cli.show import Terminal
    from ltxlite.opening import choose_device
    from ltxlite.training.course import train_parts, train_world

    folder, device = Path(options.out), choose_device(options.device)
    with Terminal(options.quiet) as terminal:
        if options.what != "world":
            print(_word(options, folder, terminal.note))  # noqa: T201
            return 0
        if options.part:
            train_parts(folder, options.part, options.steps, device, terminal.note)
            return 0
        files = train_world(folder, options.resume, device, terminal)
    for path in files:
        print(path)  # noqa: T201
    return 0


def _word(options: argparse.Namespace, folder: Path, note: Callable[[str], None]) -> Path:
    """Train a LoRA that gives a word its colour; returns its path."""
    from ltxlite.opening import choose_device
    from ltxlite.training.new_word import WordTraining

    parts = (options.colour or "").split(",")
    try:
        red, green, blue = (float(part) for part in parts)
    except ValueError:
        raise RequestError(
            f"--colour {options.colour}: wanted what {options.what!r} is to look like, such as "
            "0.95,0.5,0.05"
        ) from None
    world = None if options.world is None else Path(options.world)
    device = choose_device(options.device)
    return WordTraining(folder, options.what, (red, green, blue), world, device=device).run(note)
