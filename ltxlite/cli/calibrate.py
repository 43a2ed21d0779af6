"""`calibrate`: the flags of `generate`, a run without its last step, an importance file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltxlite.calibrate import Calibrated, Calibration
    from ltxlite.networks import Networks
    from ltxlite.progress import Report

EXAMPLE = """example:
  ltxlite calibrate --model ltx-2.3-22b-distilled-1.1.safetensors --text-encoder gemma-3-12b/ \\
      --upscaler ltx-2.3-spatial-upscaler-x2-1.1.safetensors --prompts prompts.txt \\
      -o ltx-2.3-22b-distilled.importance.safetensors
  ltxlite convert ltx-2.3-22b-distilled-1.1.safetensors OUT.gguf --type Q4_K_M \\
      --importance ltx-2.3-22b-distilled.importance.safetensors"""
OUTPUT, SIZE, FRAMES = "importance.safetensors", "small", 33
_PROMPTS_LIMIT = 1 << 20  # bytes; a thousand long prompts
_CLIP_ONLY = (
    "--math",
    "--exact",
    "--crf",
    "--wav",
    "--job",
    "--save-job",
    "--fresh",
    "--no-cache",
    "--tiled-decode",
    "--tiled-encode",
    "--trim-head",
    "--cut",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags: those of `generate`, some with another meaning."""
    from ltxlite.cli import generate

    generate.add_arguments(parser)
    parser.epilog = EXAMPLE
    parser.conflict_handler = "resolve"  # a flag declared again takes the place of the first
    group = parser.add_argument_group("calibration")
    for flag in _CLIP_ONLY:
        default = parser.get_default(flag.strip("-").replace("-", "_"))
        group.add_argument(flag, help=argparse.SUPPRESS, default=default)
    _add_calibration(group)


def _add_calibration(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--prompt", action="append", help="what clip to make; may be repeated")
    group.add_argument("--prompts", metavar="FILE", help="text file with a prompt a line")
    group.add_argument("-o", "--output", default=OUTPUT, help=f"file to write (default {OUTPUT})")
    group.add_argument("--add", action="store_true", help="add to the output if it exists")
    group.add_argument(
        "--math-errors",
        metavar="FILE",
        help="also write what int8 arithmetic costs each layer, for `generate --exact FILE`",
    )
    group.add_argument(
        "--text",
        action="store_true",
        help="also measure text encoder, text projection and connectors (default: transformer)",
    )
    group.add_argument(
        "--size",
        default=SIZE,
        help="WIDTHxHEIGHT in pixels, or small (768x512), default, 720p, 1080p, portrait, square "
        "(default small)",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help=f"length in seconds (or {FRAMES} frames)")
    length.add_argument("--frames", type=int, help=f"length in frames, 8n+1 (default {FRAMES})")


def run(options: argparse.Namespace) -> int:
    """Run every prompt up to its latents, then print what was measured."""
    from contextlib import closing

    from ltxlite.calibrate import calibrate
    from ltxlite.cli.generate import budget_of
    from ltxlite.cli.show import Terminal
    from ltxlite.pipeline import Means, check, make_plan, run_stages
    from ltxlite.progress import Clock

    with Terminal(options.quiet) as terminal:
        asked, networks = _asked(options, terminal)
        check(asked.requests[0], networks)
        means = Means(budget_of(options, networks.device))
        make_plan(asked.requests[0], networks, means, Clock(terminal))
        with closing(networks):
            result = calibrate(asked, networks, run_stages, terminal)
    _show(result, options.json)
    return 0


def _asked(options: argparse.Namespace, terminal: "Report") -> tuple["Calibration", "Networks"]:
    from ltxlite.calibrate import Calibration, with_prompts
    from ltxlite.cli.jobs import new_job

    prompts = list(options.prompt or [])
    if options.prompts is not None:
        prompts += _read_prompts(Path(options.prompts))
    first = argparse.Namespace(**vars(options))
    first.prompt, first.output = prompts[0] if prompts else None, None
    if options.seconds is None and options.frames is None:
        first.frames = FRAMES
    request, networks = new_job(first, terminal.note)
    requests = with_prompts(request, prompts)
    errors = Path(options.math_errors) if options.math_errors else None
    asked = Calibration(requests, Path(options.output), options.text, options.add, errors)
    networks.math = "bf16"  # the plan is for what will be run
    return asked, networks


def _read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    from ltxlite.errors import RequestError

    if not path.is_file():
        raise RequestError(f"--prompts {path}: no such file; wanted a text file, a prompt a line")
    if path.stat().st_size > _PROMPTS_LIMIT:
        raise RequestError(
            f"--prompts {path}: {path.stat().st_size} bytes, wanted a text file of at most "
            f"{_PROMPTS_LIMIT}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"--prompts {path}: not a UTF-8 text file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise RequestError(f"--prompts {path}: holds no prompt; write one a line")
    return prompts


def _show(result: "Calibrated", as_json: bool) -> None:
    from ltxlite.cli.show import print_result

    total = sum(result.seconds.values())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    print_result(
        f"{result.path}  {result.matrices} matrices, {result.prompts} prompts, up to "
        f"{result.tokens} tokens each\n{total:.1f} s: {parts}",
        {
            "path": str(result.path),
            "matrices": result.matrices,
            "prompts": result.prompts,
            "tokens": result.tokens,
            "seconds": result.seconds,
        },
        as_json,
    )
