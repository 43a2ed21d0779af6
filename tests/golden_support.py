"""Reference cases: what is given, what is expected, and how far apart they may be."""

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ltxlite.checkpoint.files import ModelFiles
from ltxlite.networks import Networks

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One entry of a manifest."""

    root: Path
    entry: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, root: Path, entry: dict[str, Any]) -> "Case":
        return cls(root, entry, load_file(root / entry["file"]))

    @property
    def kind(self) -> str:
        return str(self.entry["kind"])

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.entry["params"])

    @property
    def expected(self) -> dict[str, Tensor]:
        """Everything stored that is neither an input nor a diagnostic variant."""
        return {
            name: value
            for name, value in self.tensors.items()
            if not name.startswith(("in.", "alt_"))
        }

    def given(self, name: str) -> Tensor:
        return self.tensors[f"in.{name}"]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(f"in.{name}")

    def variants(self) -> Iterator[tuple[str, Any]]:
        """Yield the parameters that name stored tensors; others say nothing to compute."""
        for name, value in self.params.items():
            if any(key == name or key.startswith(f"{name}.") for key in self.expected):
                yield name, value

    def networks(self, *others: str) -> Networks:
        """Open the case's model and other files of the set."""
        names = [self.entry["model"], *others]
        return open_networks(tuple(str(self.root / name) for name in names if name))

    def tolerance(self, name: str) -> tuple[str, float, float]:
        tolerance = self.entry["tolerance"]
        for item in tolerance.get("per_tensor", ()):
            if fnmatch.fnmatch(name, item["tensors"]):
                return item["metric"], item["limit"], item.get("share", 0.0)
        return tolerance["metric"], tolerance.get("fp32", 0.0), 0.0


@cache
def open_networks(paths: tuple[str, ...]) -> Networks:
    """Open a set of files once for the whole session."""
    files = ModelFiles.open([Path(path) for path in paths])
    return Networks(files, torch.device("cpu"), torch.float32)


def compare(case: Case, name: str, actual: Tensor, where: Tensor | None = None) -> float:
    """Assert one tensor against the manifest's tolerance; returns the error it was judged by.

    where: boolean, broadcastable from the left; only these positions are meaningful.
    """
    expected = case.tensors[name]
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, wanted {expected.shape}"
    metric, limit, share = case.tolerance(name)
    if metric == "exact":
        assert torch.equal(actual.to(expected.dtype), expected), f"{name} differs"
        return 0.0
    difference = (actual.double() - expected.double()).abs()
    if where is not None:
        difference, expected = difference[where], expected[where]
    if metric == "levels":
        off = (difference > 0).double().mean().item()
        assert difference.max() <= limit, f"{name}: {difference.max()} levels, allowed {limit}"
        assert off <= share, f"{name}: {off:.4f} of the values differ, allowed {share}"
        return off
    scale = 1.0 if metric == "abs" else expected.double().abs().max().clamp(min=1e-12).item()
    error = difference.max().item() / scale
    assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:g} ({metric})"
    return error


def read_manifest(root: Path) -> list[dict[str, Any]]:
    """Return the cases of a set."""
    return list(json.loads((root / "MANIFEST.json").read_text(encoding="utf-8"))["cases"])
