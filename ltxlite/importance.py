"""Importance files: the mean square of each input of each matrix, as a run of the model read them.

A safetensors file of vectors (K,) fp32 under the matrices' release names. The squared error that a
matrix makes in its outputs is, for inputs that are not correlated, the squared error of its weights
weighted by these; `ltxlite calibrate` writes them, `ltxlite convert --importance` uses them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltxlite import __version__
from ltxlite.checkpoint.config import parse_json
from ltxlite.errors import CheckpointError, LtxliteError
from ltxlite.media.atomic import written_beside
from ltxlite_quant.formats import FormatError
from ltxlite_quant.safetensors import SafetensorsFile

_KIND = "ltxlite_importance"  # metadata key; its value counts versions of the file's layout
_VERSION = "1"


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """What was measured, and on what.

    moments: mean square (K,) fp32 of each input, by the release name of the matrix.  tokens: how
    many rows of inputs each matrix read.  prompts: how many were run.  models: name, size and
    header's sha256 of each file that was run.
    """

    moments: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    prompts: int
    models: tuple[Mapping[str, Any], ...]

    def plus(self, other: "Importance") -> "Importance":
        """Return what both measured together, weighted by tokens.

        Raises CheckpointError if a matrix reads another number of inputs in the other one.
        """
        moments, tokens = dict(self.moments), dict(self.tokens)
        for name, more in other.moments.items():
            count = other.tokens[name]
            if name in moments:
                more = _mean(name, (moments[name], tokens[name]), (more, count))
                count += tokens[name]
            moments[name], tokens[name] = more, count
        new = [model for model in other.models if model not in self.models]
        return Importance(moments, tokens, self.prompts + other.prompts, (*self.models, *new))


def write_importance(path: Path, importance: Importance) -> None:
    """Write an importance file; it appears under its name when it is complete."""
    from safetensors.torch import save

    metadata = {
        _KIND: _VERSION,
        "ltxlite_version": __version__,
        "prompts": str(importance.prompts),
        "models": json.dumps(list(importance.models), ensure_ascii=False),
        "tokens": json.dumps(dict(importance.tokens)),
    }
    tensors = {name: value.contiguous() for name, value in importance.moments.items()}
    with written_beside(path) as unfinished:
        unfinished.write_bytes(save(tensors, metadata))  # save_file hides the file from others


def read_importance(path: Path) -> Importance:
    """Read an importance file.

    Raises CheckpointError for a file that is something else, or whose numbers can be no mean
    squares.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such importance file; `ltxlite calibrate` writes one")
    with _opened(path) as file:
        models, tokens = _list(path, file.metadata), _counts(path, file.metadata)
        prompts = file.metadata.get("prompts", "")
        if not re.fullmatch("[0-9]{1,9}", prompts) or tokens.keys() != file.tensors.keys():
            raise _damaged(path, "its tensors are not those that its header counts")
        moments = {name: _moments(path, name, file.load(name).clone()) for name in file.tensors}
    return Importance(moments, tokens, int(prompts), models)


def sha256_of(path: Path) -> str:
    """Return the hash by which a conversion knows an importance file again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path) -> SafetensorsFile:
    try:
        file = SafetensorsFile(path)
    except FormatError as error:
        raise CheckpointError(f"{error}; wanted an importance file") from None
    if file.metadata.get(_KIND) != _VERSION:
        file.close()
        raise CheckpointError(
            f"{path}: no importance file of version {_VERSION} (its {_KIND} is "
            f"{file.metadata.get(_KIND)!r:.40}); `ltxlite calibrate` writes one"
        )
    return file


def _list(path: Path, metadata: Mapping[str, str]) -> tuple[Mapping[str, Any], ...]:
    models = parse_json(f'{{"models": {metadata.get("models", "")}}}', f"{path}: models")["models"]
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise _damaged(path, f"its models are {models!r:.60}")
    return tuple(models)


def _counts(path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    counts = parse_json(metadata.get("tokens", ""), f"{path}: tokens")
    if not all(type(count) is int and 0 < count < 1 << 62 for count in counts.values()):
        raise _damaged(path, "it counts no tokens, or too many")
    return counts


def _moments(path: Path, name: str, value: Tensor) -> Tensor:
    if value.dtype != torch.float32 or value.dim() != 1 or not len(value):
        raise _damaged(path, f"{name} is {value.dtype} {list(value.shape)}, wanted F32 [K]")
    if not bool((value.isfinite() & (value >= 0)).all()):
        raise _damaged(path, f"{name} holds NaN, infinity or numbers below zero")
    return value


def _mean(name: str, one: tuple[Tensor, int], two: tuple[Tensor, int]) -> Tensor:
    if one[0].shape != two[0].shape:
        raise CheckpointError(
            f"{name} reads {len(two[0])} inputs here and {len(one[0])} in the file to add to; "
            "they are of different models"
        )
    total = one[1] + two[1]
    mixed = one[0].double() * (one[1] / total) + two[0].double() * (two[1] / total)
    return mixed.float()


def _damaged(path: Path, what: str) -> LtxliteError:
    return CheckpointError(f"{path}: {what}; the file is damaged, calibrate again")
