"""Puts tensors into a model built on `meta`: strict both ways, nothing computed before all fits."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ltxlite.errors import CheckpointError
from ltxlite.linear import QuantMatrix, row_pieces, swap_embeddings, swap_linears
from ltxlite.low_rank import LowRankLinear
from ltxlite_quant.formats import BlockFormat
from ltxlite_quant.scaled import stored_shape
from ltxlite_quant.tensor import QuantTensor

_SHOWN = 5
Quantize = Callable[[str, Tensor | QuantTensor], QuantTensor | None]


class Stored(Protocol):
    """A tensor in a file: known from the header, read when asked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""

    @property
    def format(self) -> BlockFormat:
        """How it is stored."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    def load(self) -> Tensor | QuantTensor:
        """Read it; zero-copy where the file allows."""


@dataclass(frozen=True, slots=True)
class Naming:
    """A network's names as data: patterns rewritten, patterns left out, patterns kept in fp32."""

    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()

    def rename(self, name: str) -> str:
        """Turn a checkpoint name into a module name."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def is_ignored(self, name: str) -> bool:
        """Tell whether a checkpoint name is deliberately not loaded."""
        return any(re.search(pattern, name) for pattern in self.ignored)

    def keeps_float32(self, name: str) -> bool:
        """Tell whether a module name keeps fp32 whatever the compute dtype is."""
        return any(re.search(pattern, name) for pattern in self.float32)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load used: tensors and bytes by format, and the names left out on purpose."""

    tensors: Mapping[str, int] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    quantized: int = 0


@dataclass(frozen=True, slots=True)
class Rules:
    """What tensors become as they are loaded.

    dtype: of all floating point parameters but those that `naming` keeps in fp32; quantized
    matrices stay quantized.  quantize: makes quantized weights of plain ones, or returns None.
    as_stored: weights of Linears of another dtype keep it and are cast when they are used.
    """

    naming: Naming
    dtype: torch.dtype
    quantize: Quantize | None = None
    as_stored: bool = False

    def weight(
        self, name: str, loaded: Tensor | QuantTensor, stored: BlockFormat
    ) -> QuantTensor | None:
        """Return the weight of a Linear as one that is decoded when used, if it is to be one."""
        if isinstance(loaded, QuantTensor):
            return loaded
        if self.quantize is not None and (packed := self.quantize(name, loaded)) is not None:
            return packed
        if not self.as_stored or loaded.dtype == self.dtype or loaded.dim() != 2:
            return None
        return QuantTensor(loaded.contiguous().view(torch.uint8), stored, tuple(loaded.shape))


def check_names(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raise CheckpointError unless both name the same tensors with the same shapes."""
    problems = []
    if missing := sorted(expected.keys() - given.keys()):
        problems.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if surplus := sorted(given.keys() - expected.keys()):
        problems.append(f"{len(surplus)} are not part of the network ({_some(surplus)})")
    wrong = [
        f"{name} is {list(given[name])}, wanted {list(expected[name])}"
        for name in sorted(expected.keys() & given.keys())
        if given[name] != expected[name]
    ]
    if wrong:
        problems.append(f"{len(wrong)} have another shape ({_some(wrong)})")
    if problems:
        raise CheckpointError(
            f"{where}: {'; '.join(problems)}; the file is incomplete, damaged or of another model"
        )


def assemble(
    model: nn.Module, stored: Mapping[str, Stored], rules: Rules, where: str
) -> LoadReport:
    """Load a model built on `meta` from the tensors of its component.

    stored: checkpoint names without prefix.  Names and shapes are compared before anything is
    read.  Raises CheckpointError with the first names of each kind.
    """
    naming, dtype = rules.naming, rules.dtype
    ignored = tuple(sorted(name for name in stored if naming.is_ignored(name)))
    used = {naming.rename(name): item for name, item in stored.items() if name not in set(ignored)}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {name: _matched(item, expected.get(name)) for name, item in used.items()}
    check_names(expected, shapes, where)
    linears, tables = _weights(model, nn.Linear), _weights(model, nn.Embedding)
    quantized: dict[str, QuantTensor] = {}
    plain: dict[str, Tensor] = {}
    newly = 0
    for name, item in used.items():
        loaded = _without_padding(item.load(), expected[name])
        if name in linears and (weight := rules.weight(name, loaded, item.format)):
            quantized[name] = weight
            newly += weight.format != item.format
        elif isinstance(loaded, QuantTensor) and name in tables:
            quantized[name] = loaded
        else:
            kept = torch.float32 if naming.keeps_float32(name) else dtype
            plain[name] = _values(loaded, kept).reshape(expected[name])
    _refuse_nonfinite(plain, where)
    for name, weight in quantized.items():
        scales = {f"{name} ({part})": value.flatten() for part, value in weight.parts.items()}
        _refuse_nonfinite(scales, where)
    swap_linears(model, _modules(quantized, linears))
    swap_embeddings(model, _modules(quantized, tables), dtype)
    model.load_state_dict(plain, strict=False, assign=True)
    model.requires_grad_(False).eval()
    _refuse_meta(model, where)
    _refuse_zeros(model, where)
    return _report(used.values(), ignored, newly)


def _matched(item: Stored, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    # Quantizers drop or add dimensions of size one (formats.md 6, case 2) and pad matrices.
    squeezed = tuple(size for size in item.shape if size != 1)
    if wanted and squeezed == tuple(size for size in wanted if size != 1):
        return wanted
    if wanted and item.shape == stored_shape(item.format, wanted):
        return wanted
    return item.shape


def _without_padding(loaded: Tensor | QuantTensor, shape: tuple[int, ...]) -> Tensor | QuantTensor:
    if not isinstance(loaded, QuantTensor) or loaded.shape == shape:
        return loaded
    return loaded.cropped(shape) if loaded.shape == stored_shape(loaded.format, shape) else loaded


def _values(loaded: Tensor | QuantTensor, dtype: torch.dtype) -> Tensor:
    if isinstance(loaded, QuantTensor):
        return loaded.dequantize(dtype)
    return loaded.to(dtype) if loaded.is_floating_point() else loaded


def _weights(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    modules = model.named_modules()
    return {f"{name}.weight" for name, module in modules if isinstance(module, kind)}


def _modules(quantized: Mapping[str, QuantTensor], names: set[str]) -> dict[str, QuantTensor]:
    return {name.removesuffix(".weight"): q for name, q in quantized.items() if name in names}


def _refuse_nonfinite(tensors: Mapping[str, Tensor], where: str) -> None:
    # Vectors and scales only: they are read anyway and cost nothing, while checking matrices would
    # read all 46 GB; a NaN in a matrix is found by name when the first prediction is not finite.
    for name, value in tensors.items():
        if value.dim() < 2 and value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinity; download it again")


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Return the names of parameters and buffers with NaN or infinity; reads all of them.

    Quantized weights are decoded, a piece at a time. Lists are iterated over, because the blocks of
    a streamed one have values only then.
    """
    return list(_damaged(model, ""))


def _damaged(module: nn.Module, prefix: str) -> Iterator[str]:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    # Factors of strength 0 may not have been streamed.
    idle = module.idle() if isinstance(module, LowRankLinear) else frozenset()
    for name, value in own:
        if name not in idle and value.is_floating_point() and not bool(value.isfinite().all()):
            yield prefix + name
    if isinstance(module, QuantMatrix) and not module.is_finite():
        yield f"{prefix}weight"
    children: Iterable[tuple[object, nn.Module]] = module.named_children()
    if isinstance(module, nn.ModuleList):
        children = enumerate(module)
    for key, child in children:
        yield from _damaged(child, f"{prefix}{key}.")


def _refuse_meta(model: nn.Module, where: str) -> None:
    left = [name for name, value in model.state_dict().items() if value.is_meta]
    if left:
        raise CheckpointError(f"{where}: {len(left)} parameters got no values ({_some(left)})")


def _refuse_zeros(model: nn.Module, where: str) -> None:
    # Placeholders of repackagers (formats.md 6, case 6). Almost always the first row settles it.
    for name, module in model.named_modules():
        if _is_zero(module):
            raise CheckpointError(
                f"{where}: {name}.weight is all zeros, a placeholder instead of weights; the file "
                "was repackaged wrongly, download the original"
            )


def _is_zero(module: nn.Module) -> bool:
    if isinstance(module, QuantMatrix):
        rows = [slice(0, 1), *row_pieces(module.rows, module.columns * torch.float32.itemsize)]
        return not any(bool(module.decoded(torch.float32, piece).any()) for piece in rows)
    if isinstance(module, nn.Linear | nn.Embedding):
        return not bool(module.weight[:1].any()) and not bool(module.weight.any())
    return False


def _report(items: Iterable[Stored], ignored: tuple[str, ...], quantized: int) -> LoadReport:
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for item in items:
        tensors[item.format.name] += 1
        sizes[item.format.name] += item.nbytes
    return LoadReport(dict(tensors), dict(sizes), ignored, quantized)


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
