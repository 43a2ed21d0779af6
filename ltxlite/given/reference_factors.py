"""At what fraction of size and frames an IC-LoRA wants its reference, as its file says."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ltxlite.checkpoint.files import OpenModel
from ltxlite.checkpoint.lora import open_lora
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.networks import Networks

Factor = Literal["downscale", "temporal"]

_DOWNSCALE = ("reference_downscale_factor", "reference_spatial_scale_factor")
_KEYS: dict[Factor, tuple[str, ...]] = {
    "downscale": _DOWNSCALE,
    "temporal": ("reference_temporal_scale_factor",),
}
_IN_NAME = re.compile(r"-ref(0\.5|0\.25)(?!\d)")


def reference_factor(kind: Factor, loras: Sequence[str], networks: Networks) -> int:
    """Return the "downscale" or "temporal" factor of references; 1 where no LoRA file says.

    Raises CheckpointError for a damaged number and RequestError where files disagree.
    Source: LTX-2 400fd31 (metadata keys), the file names of Lightricks' releases; features.md F1.
    """
    said = {
        model.path.name: factor
        for model in _models(loras, networks)
        if (factor := _said(model, _KEYS[kind])) is not None
    }
    if len(set(said.values())) > 1:
        told = ", ".join(f"{name} {factor}" for name, factor in said.items())
        raise RequestError(
            f"LoRA files want references at different {kind} factors: {told}; say which with "
            f"--reference-{kind}"
        )
    return next(iter(said.values()), 1)


def follows_references(path: str) -> bool:
    """Tell whether a LoRA file says at what fraction it wants references, as IC-LoRA files do."""
    model = open_lora(Path(path))
    return any(_said(model, names) is not None for names in _KEYS.values())


def _models(loras: Sequence[str], networks: Networks) -> list[OpenModel]:
    paths = [Path(path) for path in loras]
    if [model.path for model in networks.lora_models] == paths:
        return networks.lora_models
    return [open_lora(path) for path in paths]


def _said(model: OpenModel, names: tuple[str, ...]) -> int | None:
    """Return the factor that a file states, None if it states none."""
    for key, value in model.metadata.items():
        if key.endswith(names):  # behind any prefix
            text = str(value).removesuffix(".0")
            if not text.isdecimal() or not 1 <= int(text) <= 64:
                raise CheckpointError(
                    f"{model.path}: {key} is {value!r}, wanted a whole number from 1 to 64"
                )
            return int(text)
    found = _IN_NAME.search(model.path.name) if names == _DOWNSCALE else None
    return round(1 / float(found[1])) if found else None
