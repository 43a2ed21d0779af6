"""LoRA files baked into what is converted: added row by row before rows are quantized.

At run time a baked file costs nothing, but its strengths are fixed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ltxlite.checkpoint.files import OpenModel
from ltxlite.checkpoint.lora import (
    Attached,
    Lora,
    open_lora,
    other_generation,
    place_terms,
    read_lora,
    refuse_nan,
)
from ltxlite.checkpoint.lora_names import ModuleNames
from ltxlite.convert.layout import text
from ltxlite.convert.plan import Plan
from ltxlite.convert.rows import Planned
from ltxlite.convert.source import SourceFile, source_files
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.low_rank import LowRankDelta, LowRankTerm
from ltxlite.strength import Strength

LORAS_KEY = "ltxlite.loras"


@dataclass(frozen=True, slots=True)
class BakedLora:
    """A LoRA file and how strongly it goes into the weights."""

    model: OpenModel
    lora: Lora
    strength: Strength

    @classmethod
    def open(cls, path: Path, strength: Strength) -> "BakedLora":
        """Open a LoRA file. Raises CheckpointError for anything else.

        Raises RequestError for strengths that change, which weights cannot.
        """
        if strength.varies or strength.steps:
            raise RequestError(
                f"{path}: a strength by step or time cannot be baked; give it to `generate --lora`"
            )
        model = open_lora(path)
        return cls(model, read_lora(model), strength)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The file it lies in, as it is known again."""
        return source_files(self.model.tensors.values())


def bake(plan: Plan, loras: Sequence[BakedLora], part: str) -> Plan:
    """Return a plan whose weights have the LoRA files added, and that says so in its keys.

    The files become sources: a conversion that was begun with others, or at other strengths, is
    not continued.  Raises CheckpointError for a file that fits nothing of the part, ShapeError
    naming the layer whose factors have another shape.
    """
    if not loras:
        return plan
    layers = {
        planned.name.removesuffix(".weight"): planned
        for planned in plan.tensors
        if planned.name.endswith(".weight") and len(planned.decision.shape) == 2
    }
    names = ModuleNames({name: name for name in layers})
    found: dict[str, list[tuple[LowRankTerm, float]]] = {}
    reports = []
    for baked in loras:
        placed = place_terms(baked.lora, names.find, part.replace("_", " "))
        reports.append(placed.report)
        for name, term in placed.terms.items():
            term.check_fits(layers[name].decision.shape)
            refuse_nan(term)
            if factor := baked.strength.at(name):
                found.setdefault(name, []).append((term, factor))
    _refuse_twice(loras)
    tensors = tuple(_with_delta(planned, found) for planned in plan.tensors)
    return replace(
        plan,
        tensors=tensors,
        keys={**plan.keys, LORAS_KEY: text(_record(loras, reports))},
        sources=(*plan.sources, *(file for baked in loras for file in baked.files)),
        notes=(*plan.notes, *_notes(plan, loras, reports)),
    )


def _with_delta(planned: Planned, found: dict[str, list[tuple[LowRankTerm, float]]]) -> Planned:
    pairs = found.get(planned.name.removesuffix(".weight"))
    if not pairs:
        return planned
    terms, strengths = zip(*pairs, strict=True)
    return replace(planned, delta=LowRankDelta(tuple(terms), tuple(strengths)))


def _record(loras: Sequence[BakedLora], reports: Sequence[Attached]) -> str:
    """Return what the new file says of its LoRA files, as JSON."""
    return json.dumps(
        [
            {
                "file": file.name,
                "bytes": file.nbytes,
                "header_sha256": file.header,
                "strength": str(baked.strength),
                "modules": report.matched,
                "unmatched": len(report.unmatched),
            }
            for baked, report in zip(loras, reports, strict=True)
            for file in baked.files
        ],
        ensure_ascii=False,
    )


def _notes(plan: Plan, loras: Sequence[BakedLora], reports: Sequence[Attached]) -> list[str]:
    notes = [report.line() for report in reports]
    family = tuple(int(number) for number in plan.family.split(".")) if plan.family else ()
    for baked in loras:
        if warning := other_generation(baked.lora, family):
            notes.append(warning)
        if "distill" in baked.model.path.name and _variant(plan) == "dev":
            notes.append(
                f"{baked.model.path.name} makes a distilled model of this one, whose header still "
                "says dev: generate with --variant distilled"
            )
    return notes


def _variant(plan: Plan) -> str | None:
    key = plan.keys.get("ltxlite.variant")
    return None if key is None else str(key.value)


def _refuse_twice(loras: Sequence[BakedLora]) -> None:
    paths = [baked.model.path.resolve() for baked in loras]
    for path in paths:
        if paths.count(path) > 1:
            raise CheckpointError(f"{path}: this LoRA is given twice; give one strength")
