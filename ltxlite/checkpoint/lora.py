"""Reads LoRA files and hangs them beside a model's linears; base weights are never rewritten.

Spellings: official, trainer and ComfyUI (lora_A, lora_B), the same with `.default`, and
lora_down, lora_up with alpha. Source: model.md 6, formats.md 1.9.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltxlite.checkpoint.assemble import Naming, Stored
from ltxlite.checkpoint.config import model_version
from ltxlite.checkpoint.files import OpenModel
from ltxlite.errors import CheckpointError
from ltxlite.linear import LowRankLinear, LowRankTerm, QuantLinear
from ltxlite_quant.tensor import QuantTensor

_PREFIX = re.compile(r"^(?:model\.diffusion_model\.|diffusion_model\.|transformer\.)")
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<side>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight$"
)
_ALPHA = re.compile(r"^(?P<module>.+)\.alpha$")
_FITTING = 0.95  # of a file's modules; below, it was probably made for another model
_REFUSED = (
    (re.compile(r"dora_scale|\.magnitude"), "DoRA"),
    (re.compile(r"\.lokr_|\.hada_"), "LoKr/LoHa"),
    (re.compile(r"^lora_unet_"), "kohya names (lora_unet_...)"),
    (re.compile(r"\.diff(?:_b)?$"), "full-weight differences (.diff)"),
)


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file: low-rank terms by checkpoint module name, and what its header says."""

    source: str
    terms: Mapping[str, LowRankTerm]
    reference_downscale: int = 1
    reference_temporal: int = 1
    version: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Attached:
    """What became of a LoRA file: matrices it changes, and its modules the model does not have."""

    source: str
    matched: int
    unmatched: tuple[str, ...]

    def line(self) -> str:
        """Return the report as text, a warning where much of the file does not apply."""
        total = self.matched + len(self.unmatched)
        first = f", not {self.unmatched[0]} for example" if self.unmatched else ""
        warning = "warning: " if self.matched < _FITTING * total else ""
        return f"{warning}LoRA {self.source}: {self.matched} of {total} modules fit{first}"


def read_lora(model: OpenModel) -> Lora:
    """Read a LoRA file's terms. Raises CheckpointError for kinds that are not implemented."""
    where = str(model.path)
    _refuse_kinds(model.tensors, where)
    sides: dict[str, dict[str, Stored]] = {}
    alphas: dict[str, float] = {}
    for name, stored in model.tensors.items():
        bare = _PREFIX.sub("", name)
        if match := _FACTOR.match(bare):
            side = "a" if match["side"] in ("lora_A", "lora_down") else "b"
            sides.setdefault(match["module"], {})[side] = stored
        elif match := _ALPHA.match(bare):
            alphas[match["module"]] = float(_plain(stored, where))
        else:
            raise CheckpointError(f"{where}: {name} is no LoRA factor that ltxlite knows")
    terms = {module: _term(module, pair, alphas, where) for module, pair in sides.items()}
    return Lora(
        where,
        terms,
        _factor(model, "reference_downscale_factor"),
        _factor(model, "reference_temporal_scale_factor"),
        model_version(model.metadata),
    )


def other_generation(lora: Lora, version: tuple[int, ...]) -> str | None:
    """Return a warning where a LoRA says that it was made for another generation.

    Names and most shapes agree between 2.0, 2.3 and 2.5: it would load and do harm.
    """
    if not lora.version or not version or lora.version[:2] == version[:2]:
        return None
    made, runs = (".".join(map(str, numbers[:2])) for numbers in (lora.version, version))
    return f"warning: LoRA {lora.source} was made for LTX-{made}, the checkpoint is LTX-{runs}"


def attach(model: nn.Module, loras: Sequence[Lora], naming: Naming) -> list[Attached]:
    """Hang LoRA files beside the linears they name, at strength 1 each, in the given order.

    Raises CheckpointError if a file fits no module at all: it was made for something else.
    """
    modules = dict(model.named_modules())
    terms: dict[str, list[LowRankTerm]] = {}
    reports = []
    for lora in loras:
        unmatched = []
        for module, term in lora.terms.items():
            name = naming.rename(f"{module}.weight").removesuffix(".weight")
            if isinstance(modules.get(name), (nn.Linear, QuantLinear)):
                terms.setdefault(name, []).append(term)
            else:
                unmatched.append(module)
        matched = len(lora.terms) - len(unmatched)
        if not matched:
            raise CheckpointError(
                f"{lora.source}: none of its {len(lora.terms)} modules is in the model "
                f"({unmatched[0]}, ...); this LoRA is for another network"
            )
        reports.append(Attached(lora.source, matched, tuple(unmatched)))
    for name, of_module in terms.items():
        base = modules[name]
        assert isinstance(base, (nn.Linear, QuantLinear))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LowRankLinear(base, of_module))
    return reports


def set_strengths(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Set the strength of every LoRA file, named by its path, in the whole model."""
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.strengths = [strengths[source] for source in module.sources]


def _term(
    module: str, pair: Mapping[str, Stored], alphas: Mapping[str, float], where: str
) -> LowRankTerm:
    if pair.keys() != {"a", "b"}:
        raise CheckpointError(f"{where}: {module} has only one of its two factors; file damaged")
    a, b = _plain(pair["a"], where), _plain(pair["b"], where)
    scale = alphas[module] / a.shape[0] if module in alphas else 1.0
    return LowRankTerm(a, b, scale, where)


def _plain(stored: Stored, where: str) -> Tensor:
    loaded = stored.load()
    if isinstance(loaded, QuantTensor):
        return loaded.dequantize(torch.bfloat16)
    if not loaded.is_floating_point():
        raise CheckpointError(f"{where}: a LoRA factor is {loaded.dtype}, wanted floating point")
    return loaded


def _refuse_kinds(names: Iterable[str], where: str) -> None:
    for name in names:
        for pattern, kind in _REFUSED:
            if pattern.search(name):
                raise CheckpointError(f"{where}: {kind} are not supported yet ({name})")


def _factor(model: OpenModel, key: str) -> int:
    text = str(model.metadata.get(key, "1"))
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise CheckpointError(
            f"{model.path}: {key} is {text!r}, wanted a whole number from 1 to 64"
        )
    return int(text)
