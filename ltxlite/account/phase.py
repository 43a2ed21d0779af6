"""What the account of a phase says, and how it is taken."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ltxlite.memory.blank import Weights, fill, stored_bytes
from ltxlite.memory.meter import ActivationMeter, Footprints, Holder
from ltxlite.memory.plan import Need
from ltxlite.models.layers import TOKEN_CHUNK
from ltxlite.models.rolling import GROUP_BYTES
from ltxlite.networks import ANATOMY, NAMINGS
from ltxlite_kernels import ops

META = torch.device("meta")
_SHOWN = 8
Network = TypeVar("Network", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of a job needs of a card, wherever its weights are.

    fixed_bytes: weights that stay for the phase: all of a network that is not streamed, else what
    stands around its blocks.  units: bytes of each streamed block, in order.  activation_bytes: the
    peak that the meter saw, workspaces of our own operators included.  library_bytes: stated, not
    counted: what cuBLAS and cuDNN are assumed to need.  largest: what held memory at the peak.
    walks: how often the phase goes through all blocks.
    """

    name: str
    component: str
    fixed_bytes: int
    units: tuple[int, ...]
    activation_bytes: int
    library_bytes: int
    largest: tuple[Holder, ...] = ()
    walks: int = 1

    def need(self) -> Need:
        """Return what the planner must know."""
        return Need(
            self.name,
            self.component,
            self.fixed_bytes,
            self.units,
            self.activation_bytes,
            self.library_bytes,
            self.walks,
        )

    def peak_bytes(self, slots: int = 2) -> int:
        """Return the peak of the smallest plan: so many slots for blocks, none resident."""
        return self.need().least(slots)


@dataclass(frozen=True, slots=True)
class Component:
    """A network as headers tell it: hyper-parameters and how its tensors are stored."""

    config: Any
    weights: Weights = field(default_factory=Weights)


Components = Mapping[str, Component]


@dataclass(frozen=True, slots=True)
class Levers:
    """What a plan may turn: the dtype, tokens of a chunk, bytes of a group of decoded frames.

    math, capability: what the transformer computes in, and of which card (`math_mode`).
    trace: remember where in the program each storage was made; costs half as much again.
    """

    dtype: torch.dtype = torch.bfloat16
    chunk: int = TOKEN_CHUNK
    group_bytes: int = GROUP_BYTES
    math: str = "bf16"
    capability: int | None = None
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Blank(Generic[Network]):
    """A network without values, a layer of each kind, and the bytes of the whole one."""

    component: str
    network: Network
    fixed_bytes: int
    units: tuple[int, ...] = ()

    def phase(self, name: str, meter: ActivationMeter) -> Phase:
        """Return the account of a phase that this network ran; the next one begins."""
        largest, library = tuple(meter.largest(_SHOWN)), meter.library_bytes
        peak = meter.restart()
        return Phase(name, self.component, self.fixed_bytes, self.units, peak, library, largest)


def blank(
    name: str, component: Component, build: Callable[[Any], Network], dtype: torch.dtype
) -> Blank[Network]:
    """Build a component's network on meta; of its streamed layers, one of each kind."""
    anatomy = ANATOMY.get(name)
    if anatomy is None:
        network = _built(name, lambda: build(component.config), component.weights, dtype)
        return Blank(name, network, stored_bytes(network))
    (layers,) = anatomy.streamed
    kinds, weights = _one_of_each(component, layers)
    config = replace(component.config, layers=len(set(kinds)))
    network = _built(name, lambda: build(config), weights, dtype)
    sizes = [stored_bytes(layer) for layer in network.get_submodule(layers).children()]
    present = dict(network.named_modules())
    host = sum(stored_bytes(present[part]) for part in anatomy.host if part in present)
    fixed = stored_bytes(network) - sum(sizes) - host
    return Blank(name, network, fixed, tuple(sizes[kind] for kind in kinds))


def metered(levers: Levers) -> ActivationMeter:
    """Return a meter that counts what lies on meta as the card's; use it in inference mode."""
    return ActivationMeter("meta", CARD, levers.trace)


def on_card(value: T, known: dict[int, tuple[Tensor, Tensor]], device: torch.device = META) -> T:
    """Move every tensor in records, tuples and lists to a device.

    known: what was moved before and what it became, by id: what is shared stays shared.
    """
    moved: Any = value
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = (value, value.to(device, copy=True))
        moved = known[id(value)][1]
    elif isinstance(value, tuple | list):
        moved = type(value)(on_card(item, known, device) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = {
            item.name: on_card(getattr(value, item.name), known, device) for item in fields(value)
        }
        moved = replace(value, **items)
    result: T = moved
    return result


def _built(
    name: str, build: Callable[[], Network], weights: Weights, dtype: torch.dtype
) -> Network:
    with META:
        network = build()
    fill(network, weights, dtype, NAMINGS[name].keeps_float32)
    return network.requires_grad_(False).eval()


def _one_of_each(component: Component, layers: str) -> tuple[list[int], Weights]:
    """Number each layer by its kind; return the weights of a network with one layer a kind."""
    split, rest = component.weights.split(layers, component.config.layers)
    formats, ranks = dict(rest.formats), dict(rest.ranks)
    numbers: dict[tuple[object, ...], int] = {}
    kinds = []
    for weights in split:
        kind = weights.kind()
        if kind not in numbers:
            place = f"{layers}.{len(numbers)}."
            formats |= {place + key: value for key, value in weights.formats.items()}
            ranks |= {place + key: rank for key, rank in weights.ranks.items()}
        kinds.append(numbers.setdefault(kind, len(numbers)))
    return kinds, Weights(formats, ranks)


def _all_distinct(x: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
    """Answer `unique` where values are unknown: as many as there are elements."""
    return torch.empty_like(x.flatten()), torch.empty_like(x, dtype=torch.long), x.new_empty(0)


CARD = Footprints(
    ops.WORKSPACES,
    ops.LIBRARIES,
    {**ops.FUSED, torch.ops.aten._unique2.default: _all_distinct},
)
