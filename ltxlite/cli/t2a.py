"""`t2a`: sound from a prompt, without a picture."""

import argparse

from ltxlite.cli import generate

EXAMPLE = """example:
  ltxlite t2a "waves roll over pebbles, a gull cries twice" --seconds 10 --model ... --out sea.flac

Of the transformer only the sound's own layers are read, a sixth of it; no video VAE is needed.
Written as .wav, .flac, .m4a or .mp3; all but .wav hold their job."""
DEFAULT_SECONDS = 5.0
DEFAULT_OUTPUT = "out.wav"
LATENTS_PER_SECOND = 25
LONGEST = 600  # seconds; positions beyond 20 s were hardly seen in training
# Flags of `generate` that are about pictures, with what they are where nobody gave them.
_OF_PICTURES: dict[str, object] = {
    "size": "default",
    "stages": (None, 1),
    "upscaler": [],
    "upscale_by": "x2",
    "modality": None,
    "sound": None,
    "frames": None,
    "fps": "24",
    "tiled_decode": None,
    "tiled_encode": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("words", nargs="?", metavar="PROMPT", help="what to hear")
    generate.add_arguments(parser)
    parser.epilog = EXAMPLE
    parser.set_defaults(picture=False)


def run(options: argparse.Namespace) -> int:
    """Turn the flags into those of a job without a picture, and run it."""
    from ltxlite.errors import RequestError

    if options.job:
        raise RequestError("--job goes with `ltxlite generate --job FILE`, whatever made the job")
    if options.words is not None and options.prompt is not None:
        raise RequestError("the prompt is given twice, with and without --prompt; leave one out")
    for name, default in _OF_PICTURES.items():
        value = getattr(options, name)
        if value != default and not (isinstance(default, tuple) and value in default):
            flag = name.replace("_", "-")
            raise RequestError(f"sound alone is made without --{flag}; leave it out")
    seconds = DEFAULT_SECONDS if options.seconds is None else options.seconds
    if not 0 < seconds <= LONGEST:
        raise RequestError(f"--seconds {seconds:g}: wanted more than 0, at most {LONGEST}")
    # A frame for each latent of sound: any length to 40 ms.
    options.fps, options.seconds = str(LATENTS_PER_SECOND), None
    options.frames = max(1, round(seconds * LATENTS_PER_SECOND))
    options.prompt = options.words if options.prompt is None else options.prompt
    options.output = options.output or DEFAULT_OUTPUT
    options.stages = 1
    return generate.run(options)
