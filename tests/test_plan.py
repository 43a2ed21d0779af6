"""The planner: what lives where within a budget, and what is refused."""

import itertools

import pytest

from ltxlite.errors import BudgetError, RequestError
from ltxlite.memory.budget import GIB, HOST_BASE, Budget, available_ram, parse_bytes
from ltxlite.memory.plan import Need, fit
from ltxlite.memory.stream import evenly_spread

BLOCK = 230 << 20
UNITS = tuple(BLOCK + (index % 3 << 20) for index in range(48))  # a mix: blocks differ a little


def need(activations: int, phase: str = "stage 1", units: tuple[int, ...] = UNITS) -> Need:
    return Need(phase, "transformer", 100 << 20, units, activations, walks=8)


def budget(gib: float, ram: float = 64) -> Budget:
    return Budget(int(gib * GIB), int(ram * GIB), GIB)


def test_blocks_are_spread_as_far_apart_as_they_can_be() -> None:
    for total in (1, 2, 7, 48):
        for count in range(1, total + 1):
            chosen = sorted(evenly_spread(count, total))
            assert len(chosen) == count and chosen[0] >= 0 and chosen[-1] < total
            gaps = [b - a for a, b in itertools.pairwise(chosen)]
            assert not gaps or max(gaps) - min(gaps) <= 1
    assert evenly_spread(0, 48) == frozenset()


@pytest.mark.parametrize("gib", [2.4, 3, 4, 6, 8, 10, 12, 16, 24])
def test_a_plan_never_exceeds_its_budget_and_uses_it_up_to_one_block(gib: float) -> None:
    plan = fit([need(300 << 20), need(800 << 20, "stage 2")], budget(gib, 64))
    assert plan.peak <= plan.budget.usable
    placement = plan.placements["transformer"]
    if len(placement.resident) < len(UNITS):
        assert plan.budget.usable - plan.peak < 2 * max(UNITS)
    assert plan.phases[0].residence == plan.phases[1].residence  # one transformer for all stages


def test_more_memory_never_means_fewer_residents() -> None:
    counts = [
        len(fit([need(800 << 20)], budget(gib / 4)).placements["transformer"].resident)
        for gib in range(10, 80)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 0 and counts[-1] == 48


def test_the_smallest_plan_fits_exactly_and_one_byte_less_is_refused() -> None:
    item = need(800 << 20)
    exact = Budget(item.least() + GIB, 64 * GIB, GIB)
    plan = fit([item], exact)
    assert plan.peak <= exact.usable
    assert plan.placements["transformer"].slots == 2
    with pytest.raises(BudgetError, match=r"stage 1 takes at least .* GiB of VRAM"):
        fit([item], Budget(item.least() + GIB - 1, 64 * GIB, GIB))


def test_what_does_not_fit_into_ram_is_read_from_disk() -> None:
    plan = fit([need(0)], budget(3, ram=8))
    residence = plan.phases[0].residence
    assert residence is not None
    assert residence.read > 0
    assert residence.pinned + residence.read == residence.moved
    assert HOST_BASE + residence.pinned + residence.ring <= 8 * GIB
    assert plan.placements["transformer"].pinned_bytes == residence.pinned
    tiny = fit([need(0)], budget(3, ram=1)).phases[0].residence
    assert tiny is not None and tiny.pinned == 0 and tiny.read == tiny.moved
    assert "from disk" in tiny.line()


def test_resident_blocks_are_not_kept_in_ram() -> None:
    small, large = (fit([need(0)], budget(gib)).phases[0].residence for gib in (3, 8))
    assert small is not None and large is not None
    assert large.pinned == sum(UNITS) - large.resident < small.pinned


def test_a_network_without_blocks_needs_only_itself() -> None:
    plan = fit([Need("decode", "video_decoder", GIB, (), GIB)], budget(4))
    assert plan.peak == 2 * GIB and plan.placements == {} and plan.pinned == 0


def test_every_phase_is_told_in_a_line() -> None:
    plan = fit([need(300 << 20), Need("decode", "video_decoder", GIB, (), GIB)], budget(4))
    text = "\n".join(plan.lines())
    assert "stage 1: peak" in text and "decode: peak 2.00 GiB" in text and "page-locked" in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("8GiB", 8 << 30), ("8", 8 << 30), ("7.5 gb", 7_500_000_000), ("900MiB", 900 << 20)],
)
def test_sizes_are_read_in_every_usual_spelling(text: str, wanted: int) -> None:
    assert parse_bytes(text, "--vram") == wanted


@pytest.mark.parametrize("text", ["", "GiB", "8TB", "-1", "nan", "1e9", "8 GiB of it"])
def test_other_sizes_are_refused_by_flag(text: str) -> None:
    with pytest.raises(RequestError, match="--vram"):
        parse_bytes(text, "--vram")


def test_this_machine_tells_its_free_memory() -> None:
    assert 1 << 26 < available_ram() < 1 << 50


def test_what_is_walked_once_is_streamed_from_disk_however_much_room_there_is() -> None:
    once = Need("encode prompt", "text_encoder", 0, UNITS, 100 << 20)
    residence = fit([once], budget(24)).phases[0].residence
    assert residence is not None
    assert not residence.placement.resident and residence.pinned == 0
    assert residence.ring == 4 * max(UNITS)


def test_slots_are_given_back_while_another_network_works_and_residents_stay() -> None:
    stage = need(300 << 20)
    upscale = Need("upscale", "transformer", GIB, UNITS, 200 << 20, rests=True)
    smallest = max(stage.least(), upscale.base)
    plan = fit([stage, upscale], Budget(smallest + GIB, 64 * GIB, GIB))
    assert plan.peak <= smallest
    roomy = fit([stage, upscale], budget(4))
    resident = roomy.phases[0].residence.resident
    assert roomy.phases[1].peak == upscale.base + resident <= 3 * GIB
    assert roomy.phases[0].peak == stage.base + resident + roomy.phases[0].residence.slots


def test_what_fits_into_ram_is_pinned_whole_whatever_arenas_add() -> None:
    # Streamed blocks are padded: a bound of their very sum would leave one of them on disk.
    residence = fit([need(0)], budget(3)).phases[0].residence
    assert residence is not None and residence.read == 0 and residence.pinned == residence.moved
    assert residence.placement.pinned_bytes is None
