"""At what fraction of size and frames an IC-LoRA wants its reference, as its file says."""

from collections.abc import Sequence
from pathlib import Path

from ltxlite.checkpoint.files import OpenModel
from ltxlite.checkpoint.lora import open_lora
from ltxlite.checkpoint.lora_facts import Factor, factor_said
from ltxlite.errors import RequestError
from ltxlite.networks import Networks


def reference_factor(kind: Factor, loras: Sequence[str], networks: Networks) -> int:
    """Return the "downscale" or "temporal" factor of references; 1 where no LoRA file says.

    Raises CheckpointError for a damaged number and RequestError where files disagree.
    """
    return _agreed(kind, _models(loras, networks)) or 1


def stated_factor(kind: Factor, loras: Sequence[str]) -> int | None:
    """Return the factor that LoRA files state, None if none does; raises as `reference_factor`."""
    return _agreed(kind, [open_lora(Path(path)) for path in loras])


def _agreed(kind: Factor, models: Sequence[OpenModel]) -> int | None:
    said = {
        model.path.name: factor
        for model in models
        if (factor := factor_said(model, kind)) is not None
    }
    if len(set(said.values())) > 1:
        told = ", ".join(f"{name} {factor}" for name, factor in said.items())
        raise RequestError(
            f"LoRA files want references at different {kind} factors: {told}; say which with "
            f"--reference-{kind}"
        )
    return next(iter(said.values()), None)


def follows_references(path: str) -> bool:
    """Tell whether a LoRA file says at what fraction it wants references, as IC-LoRA files do."""
    model = open_lora(Path(path))
    kinds: tuple[Factor, ...] = ("downscale", "temporal")
    return any(factor_said(model, kind) is not None for kind in kinds)


def _models(loras: Sequence[str], networks: Networks) -> list[OpenModel]:
    paths = [Path(path) for path in loras]
    if [model.path for model in networks.lora_models] == paths:
        return networks.lora_models
    return [open_lora(path) for path in paths]
