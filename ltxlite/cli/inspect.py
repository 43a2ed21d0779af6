"""`inspect`: what files are, which parts they hold, what is missing to run them."""

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = """example:
  ltxlite inspect ltx-2.3-22b-distilled-1.1.safetensors gemma-3-12b/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("files", nargs="+", help="model files or folders; headers only are read")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Describe every file, then what a run from all of them would lack."""
    from ltxlite.checkpoint.files import ModelFiles, open_models
    from ltxlite.cli.describe import describe, lines_of
    from ltxlite.cli.show import print_result
    from ltxlite.network_configs import missing_parts

    models = [model for path in options.files for model in open_models(Path(path))]
    described: list[dict[str, Any]] = [describe(model) for model in models]
    missing = missing_parts(ModelFiles(models))
    lines = [line for item in described for line in lines_of(item)]
    lines.append("missing to run them together:" if missing else "nothing is missing to run them")
    lines.extend(f"  {line}" for line in missing)
    print_result("\n".join(lines), {"files": described, "missing": missing}, options.json)
    return 0
