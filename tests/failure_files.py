"""Copies of the tiny checkpoints with something wrong, for the tests of failures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxlite.checkpoint.files import ModelFiles
from ltxlite.networks import Networks

GOLDEN = Path(__file__).parent / "golden" / "models"
MODEL = GOLDEN / "tiny-2.3-distilled.safetensors"
GEMMA = GOLDEN / "gemma3_tiny"
SINGLE = GOLDEN / "gemma3_tiny_single.safetensors"
LORA = GOLDEN / "tiny-distilled-lora-r4.safetensors"
DIT = "model.diffusion_model."
Tensors = dict[str, Tensor]


def networks(*paths: Path) -> Networks:
    return Networks(ModelFiles.open(paths), torch.device("cpu"), torch.float32)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def changed(
    path: Path,
    change: Callable[[Tensors], Any] = lambda _: None,
    metadata: dict[str, str] | None = None,
    source: Path = MODEL,
) -> Path:
    """Copy a checkpoint with its tensors changed, and its metadata replaced."""
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path, metadata_of(source) if metadata is None else metadata)
    return path


def only(*prefixes: str) -> Callable[[Tensors], None]:
    def keep(tensors: Tensors) -> None:
        for name in [name for name in tensors if not name.startswith(prefixes)]:
            del tensors[name]

    return keep


class Stored:
    """A tensor of a container, as `assemble` wants it."""

    def __init__(self, container: Any, name: str) -> None:
        entry = container.tensors[name]
        self.shape, self.format, self.nbytes = entry.shape, entry.format, entry.nbytes
        self.load = lambda: container.load(name)
