"""`doctor`: one pasteable report on the machine and on the model files named."""

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = """example:
  ltxlite doctor ltx-2.3-22b-distilled-1.1.safetensors gemma-3-12b/ > report.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("files", nargs="*", help="model files or folders; headers only are read")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Print versions, GPU, memory, disk speed, then what the files say of themselves."""
    from ltxlite.cli.machine import disk_speed, machine_report
    from ltxlite.cli.show import print_result

    machine = machine_report()
    if options.files:
        machine["disk read"] = disk_speed(Path(options.files[0]))
    files = [_file_report(Path(path)) for path in options.files]
    lines = [f"{name}: {value}" for name, value in machine.items()]
    for item in files:
        lines.append("")
        lines.extend(_file_lines(item))
    print_result("\n".join(lines), {"machine": machine, "files": files}, options.json)
    return 0


def _file_report(path: Path) -> dict[str, Any]:
    from ltxlite.checkpoint.files import open_models
    from ltxlite.cli.describe import describe
    from ltxlite.errors import LtxliteError
    from ltxlite_quant.formats import FormatError

    try:
        models = open_models(path)
    except (LtxliteError, FormatError, OSError) as error:
        return {"path": str(path), "error": str(error)}
    return {"path": str(path), "models": [describe(model) | _evidence(model) for model in models]}


def _evidence(model: Any) -> dict[str, Any]:
    """Collect what could not be seen without real files: padding key, tables, modules, metadata."""
    import re

    config = model.config() or {}
    vae = config.get("vae", {})
    padding = {key: vae[key] for key in vae if "padding" in key}
    tables = {s.format.name for name, s in model.tensors.items() if "scale_shift_table" in name}
    modules = sorted({re.sub(r"\.\d+", ".N", name.rsplit(".", 1)[0]) for name in model.tensors})
    return {
        "metadata_keys": {key: len(str(value)) for key, value in model.metadata.items()},
        "vae_padding_keys": padding,
        "table_dtypes": sorted(tables),
        "modules": modules,
    }


def _file_lines(item: dict[str, Any]) -> list[str]:
    from ltxlite.cli.describe import lines_of

    if "error" in item:
        return [f"{item['path']}: {item['error']}"]
    lines = []
    for model in item["models"]:
        lines += lines_of(model)
        lines.append(f"  metadata keys (length): {model['metadata_keys']}")
        lines.append(f"  VAE padding keys: {model['vae_padding_keys'] or 'none'}")
        lines.append(f"  scale_shift_table dtypes: {', '.join(model['table_dtypes']) or 'none'}")
        lines.append(f"  {len(model['modules'])} kinds of modules: {', '.join(model['modules'])}")
    return lines
