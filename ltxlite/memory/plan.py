"""What is resident, what is streamed and from where, decided before anything is loaded.

The device holds, at any time, the weights of one network that are not streamed, some of its blocks,
slots for the others and the activations of one phase. Activations come first, since no phase can
do without; then two slots, better three; what is left holds resident blocks. They are spread
evenly, so that the copy of each streamed block hides behind the work of several others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ltxlite.errors import BudgetError
from ltxlite.memory.budget import GIB, HOST_BASE, Budget
from ltxlite.memory.stream import Placement, evenly_spread

SLOTS = (3, 2)  # in order of preference: with three, a copy may run while another waits
RING = 4  # host buffers between disk and device


@dataclass(frozen=True, slots=True)
class Need:
    """What a phase of a job takes, whatever the plan.

    component: the network that is loaded.  fixed: device bytes of its weights that are not
    streamed.  units: stored bytes of its blocks in order, () if it is loaded whole.
    activations: their peak.  workspace: what libraries are assumed to take besides.
    walks: how often the phase goes through all blocks.  rests: never; another network works while
    resident blocks stay, and the slots are given back.
    """

    phase: str
    component: str
    fixed: int
    units: tuple[int, ...]
    activations: int
    workspace: int = 0
    walks: int = 1
    rests: bool = False

    @property
    def base(self) -> int:
        """Device bytes without any block."""
        return self.fixed + self.activations + self.workspace

    def least(self, slots: int = SLOTS[-1]) -> int:
        """Return the device bytes of the smallest plan."""
        if self.rests:
            return self.base
        return self.base + min(slots * max(self.units, default=0), sum(self.units))


@dataclass(frozen=True, slots=True)
class Residence:
    """Where the blocks of a component live, and the bytes that follow from it.

    slots, resident: on the device.  pinned, ring: page-locked in RAM.  moved: over the bus, and
    read: from disk, each time all blocks are walked through.
    """

    component: str
    count: int
    placement: Placement
    slots: int
    resident: int
    pinned: int
    ring: int
    moved: int
    read: int

    def line(self) -> str:
        """Say it in words."""
        inside = len(self.placement.resident)
        if inside == self.count:
            return f"all {self.count} blocks resident ({_gib(self.resident)})"
        where = "RAM" if not self.read else "disk" if self.read == self.moved else "RAM and disk"
        resident = f"{inside} of {self.count} blocks resident ({_gib(self.resident)}), "
        return (
            f"{resident if inside else ''}{self.count - inside} streamed from {where} through "
            f"{self.placement.slots} slots ({_gib(self.slots)}), {_gib(self.moved)} a step"
        )


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """One phase as planned: predicted device peak in bytes."""

    need: Need
    residence: Residence | None
    peak: int

    def line(self) -> str:
        """Say it in words."""
        blocks = "" if self.residence is None else f"; {self.residence.line()}"
        return (
            f"{self.need.phase}: peak {_gib(self.peak)} ({_gib(self.need.fixed)} fixed, "
            f"{_gib(self.need.activations)} activations){blocks}"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """All phases of a job within a budget."""

    budget: Budget
    phases: tuple[PhasePlan, ...]

    @property
    def peak(self) -> int:
        """Largest predicted device bytes of any phase."""
        return max(phase.peak for phase in self.phases)

    @property
    def pinned(self) -> int:
        """Largest page-locked bytes of any component, ring included."""
        residences = [phase.residence for phase in self.phases if phase.residence]
        return max((item.pinned + item.ring for item in residences), default=0)

    @property
    def placements(self) -> dict[str, Placement]:
        """Where each component's blocks live."""
        residences = [phase.residence for phase in self.phases if phase.residence]
        return {item.component: item.placement for item in residences}

    def lines(self) -> list[str]:
        """Return the plan as text: a line a phase, then the sums."""
        bounded = self.budget.vram < 1 << 60
        limit = f" of {_gib(self.budget.usable)}" if bounded else ""
        total = (
            f"VRAM {_gib(self.peak)}{limit}, {_gib(self.budget.reserve)} kept free; RAM about "
            f"{_gib(HOST_BASE + self.pinned)} of {_gib(self.budget.ram)}, "
            f"{_gib(self.pinned)} of it page-locked"
        )
        return [*(phase.line() for phase in self.phases), total]


def fit(needs: Sequence[Need], budget: Budget) -> Plan:
    """Place the blocks of every component.

    Raises BudgetError naming the phase that cannot fit and what it would need.
    """
    for need in needs:
        if need.least() > budget.usable:
            raise BudgetError(
                f"{need.phase} takes at least {_gib(need.least())} of VRAM, "
                f"{_gib(max(0, budget.usable))} are there ({_gib(budget.vram)} less "
                f"{_gib(budget.reserve)} in reserve)"
            )
    residences = {
        component: _reside([n for n in needs if n.component == component], budget)
        for component in {need.component for need in needs if need.units}
    }
    return Plan(budget, tuple(_phase(need, residences.get(need.component)) for need in needs))


def _phase(need: Need, residence: Residence | None) -> PhasePlan:
    blocks = 0
    if residence is not None:
        blocks = residence.resident + (0 if need.rests else residence.slots)
    return PhasePlan(need, residence, need.base + blocks)


def _reside(needs: Sequence[Need], budget: Budget) -> Residence:
    units = needs[0].units
    # Resting phases bound what is resident, the others that and the slots.
    room = budget.usable - max(need.base for need in needs if not need.rests)
    bound = budget.usable - max(need.base for need in needs)
    if max(need.walks for need in needs) == 1 and SLOTS[0] * max(units) <= room:
        # What is needed once gains nothing by staying, nor by a copy in RAM.
        return _residence(needs[0], frozenset(), SLOTS[0], replace(budget, ram=0))
    if sum(units) <= bound:
        return _residence(needs[0], frozenset(range(len(units))), 0, budget)
    slots = next(n for n in SLOTS if n * max(units) <= room or n == SLOTS[-1])
    left = min(room - slots * max(units), bound)
    for count in range(len(units) - 1, -1, -1):
        chosen = evenly_spread(count, len(units))
        if sum(units[index] for index in chosen) <= left:
            return _residence(needs[0], chosen, slots, budget)
    raise AssertionError("no block resident always fits")


def _residence(need: Need, resident: frozenset[int], slots: int, budget: Budget) -> Residence:
    units = need.units
    streamed = [size for index, size in enumerate(units) if index not in resident]
    moved, largest = sum(streamed), max(streamed, default=0)
    slots = min(slots, len(streamed))
    pinned, ring = moved, 0
    if HOST_BASE + moved > budget.ram:
        ring = min(RING, len(streamed)) * largest
        pinned = max(0, budget.ram - HOST_BASE - ring)
    # Arenas are padded, by 15 kB a block: a bound of their very sum would leave one on disk.
    bound = pinned if pinned < moved else None
    placement = Placement(resident, slots, max(0, slots - 1), bound)
    return Residence(
        component=need.component,
        count=len(units),
        placement=placement,
        slots=slots * largest,
        resident=sum(units) - moved,
        pinned=pinned,
        ring=ring,
        moved=moved,
        read=moved - pinned,
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
