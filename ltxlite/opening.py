"""Opens the files of a job, headers only, and chooses device and dtype."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ltxlite.checkpoint.at_load import AtLoad
from ltxlite.checkpoint.files import ModelFiles, OpenModel
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.networks import Networks
from ltxlite.request import Files


def open_networks(
    files: Files,
    device: str,
    dtype: str,
    quantize: str | None = None,
    math: str = "auto",
    exact: Sequence[str] = (),
) -> Networks:
    """Open all files of a job, headers only. Raises CheckpointError if one is not usable.

    quantize: what matrices become while they load (`checkpoint.at_load`); RequestError if it is
    no type that can be made on the device.  math: what the transformer computes in (`math_mode`),
    but for the layers named `exact`.
    """
    slots = (
        ("--text-encoder", files.text_encoder, ("text_encoder",)),
        ("--vae", files.vae, ("video_decoder", "video_encoder")),
        ("--audio-vae", files.audio_vae, ("audio_decoder", "vocoder")),
        ("--connectors", files.connectors, ("video_connector", "audio_connector")),
        ("--text-projection", files.text_projection, ("text_projection",)),
        *(("--upscaler", path, ("upscaler",)) for path in files.upscalers),
        ("--model", files.model, ()),
    )
    opened: list[OpenModel] = []
    for flag, path, wanted in slots:
        if path is not None:
            opened += _open_slot(flag, Path(path), wanted)
    for path in files.loras:
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such LoRA file")
    chosen = choose_device(device)
    at_load = None if quantize is None else AtLoad.named(quantize, chosen)
    networks = Networks(ModelFiles(opened), chosen, _dtype(dtype, chosen), at_load)
    networks.math, networks.exact = math, tuple(exact)
    return networks


def _open_slot(flag: str, path: Path, wanted: tuple[str, ...]) -> list[OpenModel]:
    """Open what a flag names; a file that holds nothing of the wanted parts is refused."""
    models = list(ModelFiles.open([path]).models)
    held = {component for model in models for component in model.components}
    if wanted and not held & set(wanted):
        raise CheckpointError(
            f"{path}: given with {flag}, which wants {' or '.join(wanted)}, but it holds "
            f"{', '.join(sorted(held))}"
        )
    if not wanted:
        return models
    # Whatever else it holds, the transformer say, was not meant.
    return [replace(m, components=tuple(n for n in m.components if n in wanted)) for m in models]


def choose_device(name: str) -> torch.device:
    """Return the device that a user names; "auto" is a GPU if torch sees one.

    Raises RequestError for an unknown device, or one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {name}: torch sees no CUDA GPU here; use --device cpu")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return dtypes[name]
