"""`convert`: flags to one record, then one call."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltxlite.convert.run import Conversion, Converted
    from ltxlite.strength import Strength

TYPES = (
    "Q2_K, Q3_K_S, Q3_K_M, Q3_K_L, IQ4_XS, IQ4_NL, MXFP4, Q4_0, Q4_1, Q4_K_S, Q4_K_M, Q5_0, Q5_1, "
    "Q5_K_S, Q5_K_M, Q6_K, Q8_0, F16, BF16"
)
EXAMPLE = """example:
  ltxlite convert ltx-2.3-22b-distilled-1.1.safetensors ltx-2.3-22b-distilled-Q4_K_M.gguf \\
      --type Q4_K_M

A recipe of your own is a TOML file; the first rule that matches a tensor's name holds:
  base = "Q4_K_M"
  [[rules]]
  match = 'transformer_blocks\\.(0|46|47)\\.'
  format = "Q6_K\""""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("inputs", nargs="+", metavar="IN", help="model files or folders")
    parser.add_argument("output", metavar="OUT.gguf", help="file to write")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--type", default="Q4_K_M", help=f"{TYPES} (default Q4_K_M)")
    how.add_argument("--recipe", metavar="FILE", help="recipe of your own, .toml or .json")
    parser.add_argument(
        "--component",
        choices=("transformer", "text_projection", "vae", "audio_vae", "text_encoder"),
        default="transformer",
        help="what to convert (default transformer, with its connectors)",
    )
    parser.add_argument(
        "--verify",
        choices=("full", "sample", "none"),
        default="sample",
        help="how many rows are read back and compared (default sample: 1 in 100)",
    )
    parser.add_argument(
        "--importance",
        metavar="FILE",
        help="importance of each input, from `ltxlite calibrate` (default: all count alike)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to bake in, such as x.safetensors:0.8 or x.safetensors:video=1,audio=0 "
        "(strength 1 by default; repeatable)",
    )
    parser.add_argument(
        "--effort",
        choices=("default", "high"),
        default="default",
        help="of the search for scales; high takes 3 to 5 times as long (default default)",
    )
    _add_running(parser)


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.gguf if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Convert, then print what the file holds and what goes with it."""
    from ltxlite.cli import INTERRUPTED
    from ltxlite.cli.show import Terminal
    from ltxlite.convert.run import convert

    asked = _conversion(options)
    try:
        with Terminal(options.quiet) as terminal:
            result = convert(asked, terminal)
    except KeyboardInterrupt:
        import sys

        print(  # noqa: T201
            f"interrupted; the same command goes on from what lies beside {asked.target}",
            file=sys.stderr,
        )
        return INTERRUPTED
    _show(asked, result, options.json)
    return 0


def _conversion(options: argparse.Namespace) -> "Conversion":
    from ltxlite.convert.run import Conversion
    from ltxlite_quant.policy import read_recipe, recipe_named

    recipe = read_recipe(Path(options.recipe)) if options.recipe else recipe_named(options.type)
    return Conversion(
        tuple(Path(name) for name in options.inputs),
        Path(options.output),
        recipe,
        options.component,
        options.verify,
        options.device,
        options.effort,
        options.overwrite,
        Path(options.importance) if options.importance else None,
        tuple(_lora(text) for text in options.lora),
    )


def _lora(text: str) -> "tuple[Path, Strength]":
    from ltxlite.errors import RequestError
    from ltxlite.strength import parse_lora

    path, strengths = parse_lora(text)
    if len(strengths) != 1:
        raise RequestError(f"--lora {text}: a file has no stages; give one strength to bake in")
    return Path(path), strengths[0]


def _show(asked: "Conversion", result: "Converted", as_json: bool) -> None:
    from ltxlite.cli.show import print_result
    from ltxlite.convert.companions import companions

    advice = companions(asked.part, result.family)
    lines = [f"{result.path}  {result.nbytes / 1e9:.3f} GB, {asked.recipe.name}"]
    lines += [f"  {line}" for line in result.choices]
    lines += _error_lines(result)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    lines += [f"{sum(result.seconds.values()):.1f} s: {parts}", *advice]
    print_result("\n".join(lines), _values(result, advice), as_json)


def _error_lines(result: "Converted") -> list[str]:
    """Return the errors of quantized groups; plain formats only round."""
    rows = [row for row in result.errors if row.format not in ("F32", "F16", "BF16")]
    if not rows:
        return []
    width = max(len(row.group) for row in rows)
    is_weighted = any(row.weighted_error is not None for row in rows)
    title = "relative error, and weighted by importance:" if is_weighted else "relative error:"
    return [title] + [
        f"  {row.group:{width}}  {row.format:6} {row.tensors:4} tensors  {row.relative_error:.4f}"
        + ("" if row.weighted_error is None else f"  {row.weighted_error:.4f}")
        for row in rows
    ]


def _values(result: "Converted", advice: tuple[str, ...]) -> dict[str, Any]:
    import dataclasses

    values = dataclasses.asdict(result)
    return values | {"path": str(result.path), "companions": list(advice)}
