"""The command line: one small file a verb, torch imported only when a verb runs."""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from ltxlite import __version__

VERBS = {
    "generate": "make a clip with sound from a prompt",
    "retake": "make a part of a clip anew: a time, a region, picture or sound alone",
    "extend": "make a clip longer, behind its end or before its beginning",
    "upscale": "make a clip larger, drawn by the model; its sound is kept",
    "inpaint": "fill a place in a clip with what an inpainting LoRA draws",
    "outpaint": "give a clip a larger canvas, drawn by an outpainting LoRA",
    "control": "draw the control video of an IC-LoRA: edges, tracks, a masked reference",
    "v2a": "make the sound of a clip; its picture is copied",
    "t2a": "make sound alone from a prompt",
    "dub": "have the people of a clip say something else, in their own voices",
    "join": "put clips one after another, their sound cross-faded",
    "demo": "make a clip with a tiny model: shows that the installation works",
    "train": "train the tiny world model of the demo",
    "inspect": "tell what model files are and what is missing to run them",
    "convert": "write a GGUF of a model, or of a part of it, quantized",
    "calibrate": "measure what each matrix reads, for convert --importance",
    "plan": "tell what would live where, and whether a job fits, before anything loads",
    "doctor": "print one pasteable report on this machine and on model files",
}
INTERRUPTED = 130  # what shells report for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 an error of the user's to mend, 2 usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in VERBS:
        module = importlib.import_module(f"ltxlite.cli.{arguments[0]}")
        return _run(module, arguments[0], arguments[1:])
    _overview().parse_args(arguments or ["--help"])
    return 2


def _overview() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {name:10} {text}" for name, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="ltxlite",
        description="LTX-2.3 audio-video generation on one small GPU.",
        epilog=f"verbs:\n{verbs}\n\n`ltxlite VERB --help` explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ltxlite {__version__}")
    parser.add_argument("verb", choices=tuple(VERBS), help="what to do")
    return parser


def _run(module: ModuleType, verb: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"ltxlite {verb}",
        description=VERBS[verb].capitalize() + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    try:
        return int(module.run(options))
    except KeyboardInterrupt as error:
        _tell("interrupted", error)
        return INTERRUPTED
    except _reported() as error:
        if options.debug:
            traceback.print_exc()
        _tell(f"ltxlite: {_one_message(error)}", error)
        return 1


def _tell(line: str, error: BaseException) -> None:
    """Print a line and what was noted on the error on its way: how to go on, for example."""
    for text in (line, *getattr(error, "__notes__", ())):
        print(text, file=sys.stderr)  # noqa: T201


def _reported() -> tuple[type[BaseException], ...]:
    """Errors that are told in one line; looked up only once something went wrong."""
    from ltxlite.errors import LtxliteError

    kinds: tuple[type[BaseException], ...] = (LtxliteError, OSError, MemoryError)
    if "torch" not in sys.modules:
        return kinds
    import torch

    from ltxlite_quant.formats import FormatError

    return (*kinds, FormatError, torch.OutOfMemoryError)


def _one_message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory; choose a smaller --size, fewer frames or close other programs"
    return str(error) or type(error).__name__
