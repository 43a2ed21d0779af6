"""Which latent upscaler of a job's files serves a stage.

Those of 2.0 and 2.3 differ in no shape, but were trained on latents of other statistics: the wrong
one gives false colours.  Source: features.md N2.
"""

from collections.abc import Iterable

from ltxlite.catalog import SOURCES
from ltxlite.checkpoint.files import OpenModel
from ltxlite.checkpoint.generation import upscaler_generation
from ltxlite.errors import CheckpointError
from ltxlite.models.upscaler import LatentUpscaler
from ltxlite.networks import Networks


def missing_upscalers(kinds: Iterable[str], networks: Networks) -> list[str]:
    """Return a line for each kind ("x2", "x1.5") that no file brings, or only a wrong one."""
    lines = []
    for kind in dict.fromkeys(kinds):
        found = _of_kind(kind, networks)
        refused = [reason for model in found if (reason := _misfit(model, networks))]
        if len(refused) == len(found):
            lines.append("; ".join([SOURCES[kind].advice(), *refused]))
    return lines


def find_upscaler(networks: Networks, kind: str) -> LatentUpscaler:
    """Load the upscaler of a kind that was made for the transformer's generation."""
    for model in _of_kind(kind, networks):
        if _misfit(model, networks) is None:
            return networks.upscaler_from(model)
    raise CheckpointError(f"no {kind} upscaler among the files")


def _of_kind(kind: str, networks: Networks) -> list[OpenModel]:
    models = networks.files.all("upscaler")
    return [model for model in models if networks.upscaler_kind(model) == kind]


def _misfit(model: OpenModel, networks: Networks) -> str | None:
    told = upscaler_generation(model)
    family = networks.transformer_config().family
    if told is None or told[0][:2] == tuple(map(int, family.split("."))):
        return None
    made = ".".join(map(str, told[0][:2]))
    return f"{model.path} is LTX-{made}'s ({told[1]}), the transformer LTX-{family}'s"
