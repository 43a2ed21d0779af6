"""Converts whatever ltxlite loads to a GGUF file that ComfyUI-GGUF accepts too.

Headers are read, every tensor's place is computed, and only then do values move: from the mapped
source, a chunk of rows at a time, into the file at its full size. Memory does not grow with the
model, and a killed conversion goes on where it was.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ltxlite.checkpoint.files import ModelFiles
from ltxlite.convert.file import PartialFile
from ltxlite.convert.layout import Layout, Placed, lay_out
from ltxlite.convert.lora import BakedLora, bake
from ltxlite.convert.plan import PARTS, Plan, plan_conversion
from ltxlite.convert.rows import Encoder, Planned, Rows
from ltxlite.convert.verify import SHARES, Check, GroupError, check_header, compare
from ltxlite.convert.weighting import Weighting
from ltxlite.errors import RequestError
from ltxlite.opening import choose_device
from ltxlite.progress import Clock, Report
from ltxlite.strength import Strength
from ltxlite_quant.policy import Recipe, decision_lines
from ltxlite_quant.search_plan import Effort

Verification = Literal["full", "sample", "none"]
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is converted to what.

    sources: files and folders.  part: one of `plan.PARTS`.  verify: how much is read back.
    device: where blocks are computed.  effort: of the search for scales.
    overwrite: replace a target that exists.  importance: a file of `ltxlite calibrate`, whose
    numbers weigh the errors of each matrix.  loras: files that are baked into the weights.
    """

    sources: tuple[Path, ...]
    target: Path
    recipe: Recipe
    part: str = "transformer"
    verify: Verification = "sample"
    device: str = "auto"
    effort: Effort = "default"
    overwrite: bool = False
    importance: Path | None = None
    loras: tuple[tuple[Path, Strength], ...] = ()

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise RequestError(f"no part is called {self.part!r}; choose {', '.join(PARTS)}")
        if self.verify not in SHARES:
            raise RequestError(f"verify is {self.verify!r}; choose {', '.join(SHARES)}")
        if self.effort not in get_args(Effort):
            raise RequestError(f"effort is {self.effort!r}; choose {', '.join(get_args(Effort))}")
        if self.target.suffix.lower() != ".gguf":
            raise RequestError(f"{self.target}: the target must be called .gguf")


@dataclass(frozen=True, slots=True)
class Converted:
    """What came of it.

    formats: tensors and bytes by format.  errors: by group of tensors, empty without verification.
    resumed: tensors that an earlier run had finished.  seconds: by part of the work.
    """

    path: Path
    nbytes: int
    family: str | None
    formats: dict[str, tuple[int, int]]
    choices: list[str]
    errors: list[GroupError]
    notes: list[str]
    resumed: int
    seconds: dict[str, float] = field(default_factory=dict)


def convert(asked: Conversion, report: Report) -> Converted:
    """Convert a part of a model to a GGUF file.

    Raises CheckpointError for sources that are not usable, RequestError for a target that is an
    input or taken, BudgetError for a full disk; what was done until then is kept beside the target
    and the same call goes on with it.
    """
    clock = Clock(report)
    files = ModelFiles.open(asked.sources)
    plan = _planned(asked, files)
    layout = lay_out([planned.decision for planned in plan.tensors], plan.keys)
    for line in plan.notes:
        report.note(line)
    encode = Encoder(choose_device(asked.device), asked.effort)
    with PartialFile(asked.target, layout, _identity(plan, layout, asked.effort)) as partial:
        resumed = len(partial.done)
        if resumed:
            report.note(f"{partial.path}: going on, {resumed} of {len(plan.tensors)} tensors done")
        _write(plan, layout, partial, encode, clock)
        partial.sync()
        errors, notes = _verified(
            partial.path, plan, layout, Check(SHARES[asked.verify], encode), clock
        )
        for line in notes:
            report.note(line)
        partial.publish()
    return Converted(
        asked.target,
        layout.size,
        plan.family,
        _formats(layout),
        decision_lines(planned.decision for planned in plan.tensors),
        errors,
        [*plan.notes, *notes],
        resumed,
        clock.finish(),
    )


def _planned(asked: Conversion, files: ModelFiles) -> Plan:
    loras = [BakedLora.open(path, strength) for path, strength in asked.loras]
    check_target(asked, ModelFiles([*files.models, *(baked.model for baked in loras)]))
    weighting = None
    if asked.importance is not None:
        weighting = Weighting.read(asked.importance, asked.part)
    plan = plan_conversion(files, asked.part, asked.recipe, weighting)
    return bake(plan, loras, asked.part)


def check_target(asked: Conversion, files: ModelFiles) -> None:
    """Raise RequestError if the target is one of the inputs, a folder, or exists already."""
    target = asked.target
    standing = next(parent for parent in target.absolute().parents if parent.exists())
    if not standing.is_dir():
        raise RequestError(f"{target}: cannot be written, {standing} is no folder")
    if not target.exists():
        return
    if target.is_dir():
        raise RequestError(f"{target}: is a folder, wanted a file name to write to")
    stored = [tensor for model in files.models for tensor in model.tensors.values()]
    read = {piece.container.path for tensor in stored for piece in tensor.pieces}
    if any(target.samefile(path) for path in read):
        raise RequestError(f"{target}: is one of the inputs; name another file to write to")
    if not asked.overwrite:
        raise RequestError(f"{target}: exists already; name another file, or say --overwrite")


def _write(plan: Plan, layout: Layout, partial: PartialFile, encode: Encoder, clock: Clock) -> None:
    """Write every tensor that is not there yet; progress counts millions of weights."""
    total = sum(_elements(planned) for planned in plan.tensors)
    clock.begin("convert, M", max(1, total // _MILLION))
    done = 0
    for planned, place in zip(plan.tensors, layout.tensors, strict=True):
        if place.name not in partial.done:
            partial.write(place, _pieces(planned, encode, clock, done))
        done += _elements(planned)
        clock.advance(done // _MILLION)


def _pieces(planned: Planned, encode: Encoder, clock: Clock, done: int) -> Iterator[memoryview]:
    rows = Rows(planned)
    for first, last in rows.chunks():
        yield rows.encoded(first, last, encode).contiguous().view(-1).numpy().data
        clock.advance((done + last * rows.columns) // _MILLION)


def _verified(
    path: Path, plan: Plan, layout: Layout, check: Check, clock: Clock
) -> tuple[list[GroupError], list[str]]:
    check_header(path, plan, layout)
    return compare(path, plan, check, clock) if check.share else ([], [])


def _identity(plan: Plan, layout: Layout, effort: Effort) -> str:
    """Return what must agree for a partial file to be continued."""
    # Names, shapes, formats, recipe, importance file's hash, LoRA strengths, our version.
    whole = hashlib.sha256(layout.header)
    whole.update(effort.encode())
    for source in plan.sources:
        whole.update(f"{source.nbytes} {source.fingerprint}\n".encode())
    return whole.hexdigest()


def _formats(layout: Layout) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for tensor in sorted(layout.tensors, key=_format_name):
        count, nbytes = found.get(tensor.format.name, (0, 0))
        found[tensor.format.name] = (count + 1, nbytes + tensor.nbytes)
    return found


def _format_name(tensor: Placed) -> str:
    return tensor.format.name


def _elements(planned: Planned) -> int:
    size = 1
    for length in planned.decision.shape:
        size *= length
    return size
