"""Reads LoRA files and hangs them beside a model's linears; base weights are never rewritten."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ltxlite.checkpoint.assemble import Naming, Stored
from ltxlite.checkpoint.files import OpenModel, open_models
from ltxlite.checkpoint.lora_facts import LoraFacts, Scaling, header_scaling, lora_facts
from ltxlite.checkpoint.lora_names import ModuleNames, read_name
from ltxlite.errors import CheckpointError
from ltxlite.linear import QuantLinear
from ltxlite.low_rank import LowRankLinear, LowRankTerm, OverTime
from ltxlite.release import release_name
from ltxlite.strength import Strength
from ltxlite_quant.tensor import QuantTensor

_FITTING = 0.95  # of a file's modules; below, it was probably made for another model
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file: low-rank terms by the layers it names, and what its header says."""

    source: str
    terms: Mapping[str, LowRankTerm]
    facts: LoraFacts

    @property
    def version(self) -> tuple[int, ...]:
        """The generation it was made for; () if nothing tells."""
        return self.facts.version

    @property
    def reference_downscale(self) -> int:
        """By how much an IC-LoRA's reference is smaller than the clip."""
        return self.facts.reference_downscale

    @property
    def reference_temporal(self) -> int:
        """By how much an IC-LoRA's reference has fewer frames than the clip."""
        return self.facts.reference_temporal


@dataclass(frozen=True, slots=True)
class Attached:
    """What became of a LoRA file: matrices it changes, and its modules the model does not have."""

    source: str
    matched: int
    unmatched: tuple[str, ...]

    def count(self) -> str:
        """Return as text how much of the file applies, where not all of it is meant to."""
        total = self.matched + len(self.unmatched)
        return f"LoRA {self.source}: {self.matched} of {total} modules are those of the sound"

    def line(self) -> str:
        """Return the report as text, a warning where much of the file does not apply."""
        total = self.matched + len(self.unmatched)
        first = f", not {_some(self.unmatched)}" if self.unmatched else ""
        warning = "warning: " if self.matched < _FITTING * total else ""
        return f"{warning}LoRA {self.source}: {self.matched} of {total} modules fit{first}"


@dataclass(frozen=True, slots=True)
class Placed:
    """The terms of a LoRA file by the layers of a model, and the report of it."""

    terms: Mapping[str, LowRankTerm]
    report: Attached


def open_lora(path: Path) -> OpenModel:
    """Open a file that has to be a LoRA. Raises CheckpointError for anything else."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such LoRA file")
    (model,) = open_models(path)
    if "lora" not in model.components:
        held = ", ".join(model.components)
        raise CheckpointError(f"{path}: given as a LoRA, but it holds {held}")
    return model


def read_lora(model: OpenModel) -> Lora:
    """Read a LoRA file: names, shapes and scales; factors stay in the file's map until used.

    Raises CheckpointError for kinds that are not implemented, factors without a partner, given
    twice, of rank 0 or not finite; ShapeError for factors that do not belong together.
    """
    where = str(model.path)
    found: dict[str, dict[str, tuple[str, Stored]]] = {}
    for name, stored in model.tensors.items():
        read = read_name(name, where)
        roles = found.setdefault(read.module, {})
        if read.role in roles:
            raise _twice(where, name, roles[read.role][0])
        roles[read.role] = (name, stored)
    scaling = header_scaling(model.metadata, where)
    terms = {
        module: _term(module, {role: stored for role, (_, stored) in roles.items()}, scaling, where)
        for module, roles in found.items()
        if roles.keys() != {"alpha"}  # of layers that somebody took out of the file
    }
    return Lora(where, terms, lora_facts(model))


def other_generation(lora: Lora, version: tuple[int, ...]) -> str | None:
    """Return a warning where a LoRA was made for another generation than the checkpoint.

    Names and most shapes agree between 2.0, 2.3 and 2.5: it would load and do harm.
    """
    if not lora.version or not version or lora.version[:2] == version[:2]:
        return None
    runs = ".".join(map(str, version[:2]))
    return (
        f"warning: LoRA {lora.source} was made for {lora.facts.generation}, the checkpoint is "
        f"LTX-{runs} ({lora.facts.evidence})"
    )


def place_terms(lora: Lora, find: Callable[[str], str | None], wanted: str = "model") -> Placed:
    """Find the layers of a model that a LoRA file means.

    find: returns a layer's own name for the file's, or None.
    Raises CheckpointError if a file fits no layer at all, or means one twice.
    """
    terms: dict[str, LowRankTerm] = {}
    unmatched = []
    for module, term in lora.terms.items():
        name = find(module)
        if name is None:
            unmatched.append(module)
        elif name in terms:
            raise _twice(lora.source, module, terms[name].module)
        else:
            terms[name] = term
    if not terms:
        raise CheckpointError(
            f"{lora.source}: none of its {len(lora.terms)} modules is in the {wanted} "
            f"({_some(unmatched)}); this LoRA is for another network"
        )
    return Placed(terms, Attached(lora.source, len(terms), tuple(unmatched)))


def attach(model: nn.Module, loras: Sequence[Lora], naming: Naming) -> list[Attached]:
    """Hang LoRA files beside the linears they name, at strength 1 each, in the given order.

    Terms of an earlier call are taken off.  Nothing is changed if anything does not fit.
    Raises CheckpointError if a file fits no module at all, means one twice, or is given twice;
    ShapeError naming the layer whose factors have another shape.
    """
    sources = [lora.source for lora in loras]
    if repeated := [source for source in sources if sources.count(source) > 1]:
        raise CheckpointError(f"{repeated[0]}: this LoRA is given twice; give one strength")
    bases = _bases(model)
    flat = ModuleNames({_released(name): name for name in bases})

    def find(module: str) -> str | None:
        name = naming.rename(f"{module}.weight").removesuffix(".weight")
        return name if name in bases else flat.find(module)

    placed = [place_terms(lora, find) for lora in loras]
    terms: dict[str, list[LowRankTerm]] = {}
    for one in placed:
        for name, term in one.terms.items():
            term.check_fits((bases[name].out_features, bases[name].in_features))
            refuse_nan(term)
            terms.setdefault(name, []).append(term)
    for name, base in bases.items():
        _put(model, name, LowRankLinear(base, terms[name]) if name in terms else base)
    return [one.report for one in placed]


def set_strengths(
    model: nn.Module, strengths: Mapping[str, float | Strength], step: int = 0
) -> None:
    """Set the strength of every LoRA file, named by its path, in the whole model, at a step."""
    by_source = {source: Strength.of(value) for source, value in strengths.items()}
    of_step = {source: strength.at_step(step) for source, strength in by_source.items()}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            module.strengths = [by_source[s].at(name) * of_step[s] for s in module.sources]


def set_times(model: nn.Module, times: Mapping[str, OverTime]) -> None:
    """Say how LoRA files, named by their paths, change over a clip; others do not."""
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.times = [times.get(source) for source in module.sources]


def refuse_nan(term: LowRankTerm) -> None:
    """Raise CheckpointError for factors of a training that diverged.

    That leaves NaN in all of them, so a row of each is read and not 7.4 GB; a single NaN is found
    by name when the first prediction is not finite.
    """
    for factor in (term.a[:1], term.b[:1]):
        if not factor.is_meta and not bool(factor.isfinite().all()):
            raise CheckpointError(
                f"{term.where} holds NaN or infinity: its training failed; use an earlier "
                "checkpoint of it or download it again"
            )


def _bases(model: nn.Module) -> dict[str, nn.Linear | QuantLinear]:
    """Return the linears of a model by name, those under low-rank terms by the name they had."""
    bases: dict[str, nn.Linear | QuantLinear] = {}
    hidden: set[str] = set()
    for name, module in model.named_modules():  # a module comes before its children
        if isinstance(module, LowRankLinear):
            bases[name] = module.base
            hidden.add(f"{name}.base")
        elif isinstance(module, nn.Linear | QuantLinear) and name not in hidden:
            bases[name] = module
    return bases


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _released(name: str) -> str:
    full = release_name("transformer", f"{name}.weight")
    return full.removeprefix("model.diffusion_model.").removesuffix(".weight")


def _term(module: str, roles: Mapping[str, Stored], scaling: Scaling, where: str) -> LowRankTerm:
    if not {"a", "b"} <= roles.keys():
        raise CheckpointError(f"{where}: {module} has only one of its two factors; file damaged")
    if roles["a"].shape[:1] == (0,):
        raise CheckpointError(f"{where}: {module} has factors of rank 0; file damaged")
    a, b = _plain(roles["a"], where), _plain(roles["b"], where)
    term = LowRankTerm(a, b, 1.0, where, module)
    alpha = _alpha(roles["alpha"], term.where) if "alpha" in roles else None
    scale = scaling.of(term.rank) if alpha is None else alpha / term.rank
    return LowRankTerm(a, b, scale, where, module)


def _alpha(stored: Stored, where: str) -> float:
    loaded = stored.load()
    if not isinstance(loaded, Tensor) or loaded.numel() != 1 or not bool(loaded.isfinite()):
        raise CheckpointError(f"{where}: its alpha is no finite number; file damaged")
    return float(loaded)


def _plain(stored: Stored, where: str) -> Tensor:
    loaded = stored.load()
    if isinstance(loaded, QuantTensor):
        return loaded.dequantize(torch.bfloat16)
    if not loaded.is_floating_point():
        raise CheckpointError(f"{where}: a LoRA factor is {loaded.dtype}, wanted floating point")
    return loaded


def _twice(where: str, one: str, other: str) -> CheckpointError:
    return CheckpointError(f"{where}: {one} and {other} mean the same layer; file damaged")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
