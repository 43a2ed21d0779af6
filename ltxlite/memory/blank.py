"""Networks without values: on the meta device, with every tensor as large as a file has it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from ltxlite.linear import QuantLinear, swap_linears
from ltxlite.low_rank import LowRankLinear, LowRankTerm
from ltxlite_quant.formats import BlockFormat, byte_shape
from ltxlite_quant.scaled import SCALINGS, tiles_shape
from ltxlite_quant.tensor import QuantTensor

_META = torch.device("meta")
T = TypeVar("T")
_BNB_BLOCK = 64  # weights that share a scale, as bitsandbytes writes them by default


@dataclass(frozen=True, slots=True)
class Weights:
    """How a network's tensors are stored, by module names.

    formats: of the weights of Linears; one that is not named has the dtype of the network.
    ranks: of the low-rank terms that hang beside a Linear.
    """

    formats: Mapping[str, BlockFormat] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def split(self, layers: str, count: int) -> tuple[list["Weights"], "Weights"]:
        """Return those of each layer of a list, by the layer's own names, and the rest."""
        formats, other_formats = _split(self.formats, layers, count)
        ranks, other_ranks = _split(self.ranks, layers, count)
        found = [Weights(*pair) for pair in zip(formats, ranks, strict=True)]
        return found, Weights(other_formats, other_ranks)

    def kind(self) -> tuple[object, ...]:
        """Return what is equal for submodules that are stored alike."""
        formats = sorted((name, item.name) for name, item in self.formats.items())
        return (*formats, *sorted(self.ranks.items()))


def _split(
    table: Mapping[str, T], layers: str, count: int
) -> tuple[list[dict[str, T]], dict[str, T]]:
    found: list[dict[str, T]] = [{} for _ in range(count)]
    rest = {}
    for name, value in table.items():
        if name.startswith(f"{layers}."):
            number, own = name[len(layers) + 1 :].split(".", 1)
            found[int(number)][own] = value
        else:
            rest[name] = value
    return found, rest


def fill(
    network: nn.Module, weights: Weights, dtype: torch.dtype, float32: Callable[[str], bool]
) -> None:
    """Give a network built on meta its stored formats; what has none becomes `dtype`.

    float32: tells which names keep fp32.  Raises ShapeError where a format belongs to no Linear.
    """
    linears = {
        f"{name}.weight": module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }
    for module in network.modules():
        _cast(module, dtype)
    for name, value in network.state_dict(keep_vars=True).items():
        if float32(name):
            value.data = value.data.float()
    quantized = {
        name.removesuffix(".weight"): _blank(item, tuple(linears[name].weight.shape))
        for name, item in weights.formats.items()
        if name in linears and item.dtype is not dtype
    }
    swap_linears(network, quantized)
    _hang(network, weights.ranks, dtype)


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(value.nbytes for value in module.state_dict().values())


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if value.is_floating_point():
            value.data = value.data.to(dtype)


def _blank(block_format: BlockFormat, shape: tuple[int, ...]) -> QuantTensor:
    rows, row_bytes = byte_shape(shape, block_format)
    blocks = torch.empty(rows, row_bytes, dtype=torch.uint8, device=_META)
    return QuantTensor(blocks, block_format, shape, _parts(block_format, shape))


def _parts(block_format: BlockFormat, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return blank parts of the usual sizes: a scale of fp8 is one number, of int8 one a row."""
    sizes = {
        "scale": (1, 1) if block_format.name.startswith(("F8", "NVFP4")) else (shape[0], 1),
        "code": (1, 16),
    }
    if block_format.name in ("BNB_NF4", "BNB_FP4"):
        sizes["scale"] = (shape[0], -(-shape[1] // _BNB_BLOCK))
    found = {}
    for name in SCALINGS[block_format.name].parts if block_format.name in SCALINGS else ():
        if name == "scale_tiles":
            tiles = tiles_shape(block_format, shape)
            found[name] = torch.empty(tiles, dtype=torch.uint8, device=_META)
        else:
            found[name] = torch.empty(sizes[name], device=_META)
    return found


def _hang(network: nn.Module, ranks: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    modules = dict(network.named_modules())
    for name, of_module in ranks.items():
        base = modules.get(name)
        if not isinstance(base, nn.Linear | QuantLinear):
            continue  # files name layers that a network does not have; loading reports them
        rows, columns = base.out_features, base.in_features
        terms = [
            LowRankTerm(
                torch.empty(rank, columns, dtype=dtype, device=_META),
                torch.empty(rows, rank, dtype=dtype, device=_META),
                1.0,
                "account",
            )
            for rank in of_module
        ]
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, LowRankLinear(base, terms))
