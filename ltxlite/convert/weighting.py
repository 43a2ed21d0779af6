"""Which importance belongs to which tensor of a conversion, and what the file says of it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ltxlite.convert import gemma
from ltxlite.convert.layout import Key, text
from ltxlite.convert.rows import Planned
from ltxlite.errors import CheckpointError
from ltxlite.importance import Importance, read_importance, sha256_of
from ltxlite_quant.search_plan import PLANS

_PREFIX = re.compile(r"^model\.diffusion_model\.")


@dataclass(frozen=True, slots=True, eq=False)
class Weighting:
    """An importance file as a conversion uses it.

    by_name: mean squares (K,) by the names of the new file.
    """

    path: Path
    sha256: str
    by_name: Mapping[str, Tensor]
    measured: Importance

    @classmethod
    def read(cls, path: Path, part: str) -> "Weighting":
        """Read an importance file. Raises CheckpointError for anything else."""
        measured = read_importance(path)
        by_name = {_written(name, part): value for name, value in measured.moments.items()}
        return cls(path, sha256_of(path), by_name, measured)

    def applied(self, tensors: Sequence[Planned]) -> tuple[tuple[Planned, ...], list[str]]:
        """Return the tensors with their importances, and what the user should know.

        Raises CheckpointError if an importance is of another size than its matrix, or if none is
        of these matrices.
        """
        searched = [planned for planned in tensors if _is_searched(planned)]
        missing = [planned.name for planned in searched if planned.name not in self.by_name]
        if searched and len(missing) == len(searched):
            raise CheckpointError(
                f"{self.path}: holds no importance of {missing[0]} nor of any other matrix to be "
                "quantized here; it was measured on another part or model"
            )
        weighed = tuple(self._weighed(p) if _is_searched(p) else p for p in tensors)
        return weighed, [self._note(len(searched), missing)]

    def key(self) -> Key:
        """Return the metadata that tells where the importances come from."""
        measured = self.measured
        said = {"file": self.path.name, "sha256": self.sha256, "prompts": measured.prompts}
        return text(json.dumps(said | {"models": list(measured.models)}, ensure_ascii=False))

    def _weighed(self, planned: Planned) -> Planned:
        importance = self.by_name.get(planned.name)
        columns = planned.decision.shape[-1]
        if importance is not None and len(importance) != columns:
            raise CheckpointError(
                f"{self.path}: {planned.name} has {len(importance)} importances, the matrix reads "
                f"{columns} inputs; the file was measured on another model"
            )
        return replace(planned, importance=importance)

    def _note(self, searched: int, missing: Sequence[str]) -> str:
        name = self.path.name
        if not searched:
            return f"{name}: no matrix becomes a format that importances help; it changes nothing"
        line = f"{name}: importances of {searched - len(missing)} of {searched} matrices"
        return f"{line}; none of {missing[0]}, for example" if missing else line


def _is_searched(planned: Planned) -> bool:
    return planned.decision.format.name in PLANS


def _written(name: str, part: str) -> str:
    """Turn a release name into that of the new file."""
    if part == "text_encoder":
        return gemma.llama_name(name.removeprefix("model."))
    return _PREFIX.sub("", name)
