"""`generate`: flags to one request, then one call."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ltxlite.cli.prompting import add_prompts
from ltxlite.cli.statistics import add_statistics
from ltxlite.cli.steering import add_steering
from ltxlite.cli.tuning import add_tuning

if TYPE_CHECKING:
    import torch

    from ltxlite.memory.budget import Budget
    from ltxlite.networks import Networks
    from ltxlite.pipeline import Means, Result
    from ltxlite.progress import Report
    from ltxlite.request import Request

SAMPLERS = (
    "euler, euler_gradient, euler_ancestral, euler_cfg_pp, euler_ancestral_cfg_pp, dpmpp_2m, "
    "er_sde, res_2s"
)
EXAMPLE = """example:
  ltxlite generate --model ltx-2.3-22b-distilled-1.1.safetensors --text-encoder gemma-3-12b/ \\
      --upscaler ltx-2.3-spatial-upscaler-x2-1.1.safetensors \\
      --prompt "A steam train crosses a stone bridge, whistle blowing" --size 720p -o train.mp4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; every help text gives unit and default."""
    parser.epilog = EXAMPLE
    _add_files(parser)
    _add_clip(parser)
    add_prompts(parser)
    add_steering(parser)
    _add_sampling(parser)
    add_statistics(parser)
    add_tuning(parser)
    _add_output(parser)
    _add_running(parser)
    parser.set_defaults(picture=True)


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files (README, 'Files', says where to get them)")
    files.add_argument("--model", help="checkpoint, or a folder that is searched for all parts")
    files.add_argument("--text-encoder", help="Gemma 3 12B: a folder or a single file")
    files.add_argument("--vae", help="video VAE, if not inside --model")
    files.add_argument("--audio-vae", help="audio VAE and vocoder, if not inside --model")
    files.add_argument("--connectors", help="embeddings connectors, if not inside --model")
    files.add_argument("--text-projection", help="text projection, if not inside --model")
    files.add_argument(
        "--upscaler", action="append", default=[], help="latent upscaler; may be repeated"
    )
    files.add_argument("--distilled-lora", help="distilled LoRA, for the stages of a dev model")
    files.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:S1[,S2]]",
        help="LoRA and its strength in each stage (default 1; the last serves the rest); or, "
        "stages apart by ;, video=0.8,audio=0,cross=1,blocks=0-23:0.5,steps=0-3,seconds=0-4,fade=1 "
        "or segments=2 of --segments",
    )


def _add_clip(parser: argparse.ArgumentParser) -> None:
    clip = parser.add_argument_group("clip")
    clip.add_argument("--prompt", help="what to see and hear")
    clip.add_argument(
        "--negative", help="what to avoid; used by guided stages (default: a built-in list)"
    )
    clip.add_argument(
        "--size",
        default="default",
        help="WIDTHxHEIGHT in pixels, or small, default (1536x1024), 720p, 1080p, portrait, square",
    )
    length = clip.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="length in seconds (default: 121 frames)")
    length.add_argument("--frames", type=int, help="length in frames, 8n+1 (default 121)")
    clip.add_argument("--fps", default="24", help="frames per second, 24000/1001 too (default 24)")
    clip.add_argument("--seed", type=int, default=10, help="seed; -1 draws one (default 10)")
    clip.add_argument("--strict", action="store_true", help="refuse sizes instead of snapping them")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (defaults come from the checkpoint's variant)")
    group.add_argument(
        "--variant",
        choices=("dev", "distilled"),
        help="kind of checkpoint (default: read from its header or name)",
    )
    group.add_argument(
        "--quality",
        choices=("draft", "balanced", "max"),
        default="balanced",
        help="draft: the first stage alone at half size; max: res_2s (default balanced)",
    )
    group.add_argument(
        "--stages", type=int, choices=(1, 2, 3), help="number of stages (default 2; 1 for draft)"
    )
    group.add_argument(
        "--upscale-by", choices=("x2", "x1.5"), default="x2", help="between stages (default x2)"
    )
    group.add_argument("--steps", type=int, help="steps of the first stage (default by variant)")
    group.add_argument(
        "--sigmas",
        action="append",
        help="schedule of a stage, in order: distilled, stage2, ltx:30, linq:8, simple:8, "
        "beta:8, or numbers such as 0.85,0.725,0.42,0; may be repeated",
    )
    group.add_argument(
        "--sampler",
        action="append",
        help=f"sampler of a stage, in order: {SAMPLERS}; may be repeated",
    )
    group.add_argument(
        "--cfg",
        metavar="V[:A]",
        help="guidance of stage 1, picture and sound; 2,2,1 gives one value a step",
    )
    group.add_argument("--stg", metavar="V[:A]", help="self-attention guidance of stage 1")
    group.add_argument("--modality", metavar="V[:A]", help="modality guidance of stage 1")
    group.add_argument("--rescale", metavar="V[:A]", help="guidance rescale of stage 1, 0 to 1")
    group.add_argument(
        "--skip-step", metavar="V[:A]", help="reuse stage 1's guided prediction for V steps"
    )
    group.add_argument(
        "--guidance-mode", choices=("cfg", "cfg_star", "apg"), help="of stage 1 (default cfg)"
    )
    group.add_argument(
        "--sound",
        choices=("refine", "keep", "freeze"),
        help="what later stages do with the first stage's sound (default by variant)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", help=".mp4, or a folder for PNG frames (default out.mp4)")
    group.add_argument("--crf", type=int, default=19, help="H.264 quality, 0 best (default 19)")
    group.add_argument(
        "--trim-head",
        type=int,
        default=0,
        metavar="N",
        help="leave the first N frames out, and their sound (default 0)",
    )
    group.add_argument(
        "--cut",
        metavar="L,T,R,B",
        help="leave out so many pixels at the left, above, at the right, below (default 0,0,0,0)",
    )
    group.add_argument(
        "--match-colors",
        metavar="IMAGE[:SHARE]",
        help="give each frame the colours of a picture, or a share of them, 0 to 1 (default 1)",
    )
    group.add_argument(
        "--tiled-decode",
        nargs="?",
        const="768,64",
        metavar="SIZE,OVERLAP[,FRAMES,OVERLAP]",
        help="decode in blended tiles, pixels of the long side and frames, as the official "
        "pipelines do (768,64,80,24); default: exactly, in one piece",
    )
    group.add_argument(
        "--tiled-encode",
        nargs="?",
        const="768,64",
        metavar="SIZE,OVERLAP[,FRAMES,OVERLAP]",
        help="the same for images and clips that are given",
    )
    group.add_argument("--wav", help="also write the sound to this WAV file")


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--job", help="run a saved job: a .json file, or a clip made by ltxlite")
    group.add_argument("--save-job", help="write the job as JSON here before running it")
    group.add_argument(
        "--fresh",
        action="store_true",
        help="start anew where an earlier run of the same job was stopped (default: continue it)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of activations (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    group.add_argument(
        "--quantize",
        metavar="TYPE",
        help="quantize large matrices while loading: Q8_0, Q4_0, ..., fp8, int8, nf4 (default: no)",
    )
    group.add_argument(
        "--math",
        choices=("auto", "int8", "fp16", "bf16", "fp8"),
        default="auto",
        help="what the transformer's products are computed in (default: by card and file; without "
        "a GPU the --dtype)",
    )
    group.add_argument(
        "--exact",
        metavar="FILE",
        help="leave layers in bf16 that int8 was measured to hurt (`calibrate --math-errors FILE`)",
    )
    group.add_argument(
        "--no-cache", action="store_true", help="encode prompts anew, keep no contexts on disk"
    )
    add_budget(group)
    group.add_argument("--quiet", action="store_true", help="no progress, no notes")
    group.add_argument("--json", action="store_true", help="print the result as JSON")


def add_budget(group: "argparse._ArgumentGroup") -> None:
    """Declare the flags that say how much memory a run may take."""
    group.add_argument("--vram", metavar="SIZE", help="of the GPU, as 8GiB (default: what is free)")
    group.add_argument("--ram", metavar="SIZE", help="of RAM, e.g. 16GiB (default: what is free)")
    group.add_argument(
        "--reserve-vram",
        metavar="SIZE",
        help="of --vram, what is left to CUDA's context and to other programs (default 1GiB)",
    )


def budget_of(options: argparse.Namespace, device: "torch.device") -> "Budget | None":
    """Return the budget that flags and free memory give; None on a CPU without flags."""
    from ltxlite.memory.budget import DEFAULT_RESERVE, free_budget, parse_bytes

    given = (options.vram, options.ram, options.reserve_vram)
    if device.type != "cuda" and not any(given):
        return None
    names = ("vram", "ram", "reserve")
    flags = ("--vram", "--ram", "--reserve-vram")
    said = {
        name: parse_bytes(text, flag)
        for name, flag, text in zip(names, flags, given, strict=True)
        if text is not None
    }
    if options.vram is not None and options.reserve_vram is None:
        said["reserve"] = DEFAULT_RESERVE if device.type == "cuda" else 0
    return replace(free_budget(device, said.get("ram")), **said)


def means_of(options: argparse.Namespace, networks: "Networks", report: "Report") -> "Means":
    """Return what the flags let a run use."""
    from ltxlite.cache import cache_folder
    from ltxlite.context_cache import ContextCache
    from ltxlite.pipeline import Means

    cache = ContextCache(cache_folder() / "contexts", report.note)
    budget = budget_of(options, networks.device)
    return Means(budget, None if options.no_cache else cache, options.fresh)


def run(options: argparse.Namespace) -> int:
    """Build the request, run it, print where the clip is."""
    from ltxlite.cli.jobs import load_job, new_job
    from ltxlite.cli.show import Terminal
    from ltxlite.pipeline import generate

    with Terminal(options.quiet) as terminal:
        request, networks = (load_job if options.job else new_job)(options, terminal.note)
        if options.save_job:
            Path(options.save_job).write_text(request.to_json(), encoding="utf-8")
        result = generate(request, networks, terminal, means_of(options, networks, terminal))
    show_result(request, result, options.json)
    return 0


def show_result(request: "Request", result: "Result", as_json: bool) -> None:
    """Print where the clip is and the seconds of each part."""
    from ltxlite.cli.show import print_result

    total = sum(result.seconds.values())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    made = f"{float(request.seconds):.2f} s of sound"
    if request.picture:
        width, height = result.size
        made = f"{width}x{height}, {result.frames} frames at {request.fps} fps"
    print_result(
        f"{result.path}  {made}, seed {request.seed}\n{total:.1f} s: {parts}",
        {
            "path": str(result.path),
            "frames": result.frames,
            "seconds": result.seconds,
            "seed": request.seed,
            "device": request.device,
        },
        as_json,
    )
