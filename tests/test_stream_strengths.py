"""Low-rank factors of strength 0 stay where they are, and are there again when they are wanted."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ltxlite.checkpoint.assemble import nonfinite_parameters
from ltxlite.low_rank import LowRankLinear, LowRankTerm
from ltxlite.memory.arena import FileRange, layout_of
from ltxlite.memory.machine import CpuMachine, Faults
from ltxlite.memory.needed import Needed, lateness
from ltxlite.memory.stream import Placement, Streamer

COUNT, WIDTH, RANKS = 5, 65, {"distilled": 33, "style": 7}
# fp32 factors A (r, 65) and B (65, r), each padded to 256 bytes.
PADDED = {name: 2 * -(-4 * rank * WIDTH // 256) * 256 for name, rank in RANKS.items()}


class Block(nn.Module):
    """A linear with both LoRA files beside it, one with the second alone, one with none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.both = self._linear(random, "distilled", "style")
        self.one = self._linear(random, "style")
        self.none = self._linear(random)

    def _linear(self, random: torch.Generator, *sources: str) -> nn.Module:
        linear = nn.Linear(WIDTH, WIDTH)
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) / WIDTH
            parameter.requires_grad_(False)
        if not sources:
            return linear
        terms = [
            LowRankTerm(
                torch.randn(RANKS[source], WIDTH, generator=random),
                torch.randn(WIDTH, RANKS[source], generator=random),
                0.5,
                source,
            )
            for source in sources
        ]
        return LowRankLinear(linear, terms)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.none(self.one(self.both(x).tanh()).tanh()).tanh()
        return out


def blocks() -> list[Block]:
    return [Block(seed) for seed in range(COUNT)]


def set_strengths(modules: list[Block], distilled: float, style: float) -> None:
    for module in modules:
        module.both.strengths = [distilled, style]  # type: ignore[assignment]
        module.one.strengths = [style]  # type: ignore[assignment]


def written(folder: Path, modules: list[Block]) -> list[dict[str, FileRange]]:
    """Write each LoRA file, and the rest, as loaders find them: apart."""
    found: list[dict[str, FileRange]] = [{} for _ in modules]
    for kind in ("base", *RANKS):
        path, data = folder / kind, b""
        for number, module in enumerate(modules):
            for name, value in module.state_dict().items():
                if kind == _kind(name):
                    found[number][name] = FileRange(path, len(data), value.nbytes)
                    data += value.contiguous().numpy().tobytes()
        path.write_bytes(data)
    return found


def _kind(name: str) -> str:
    if name.rpartition(".")[2] not in ("a0", "b0", "a1", "b1"):
        return "base"
    return "distilled" if name in ("both.a0", "both.b0") else "style"


SCHEDULES = [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (0.5, 1.0)]


@pytest.mark.parametrize("pinned", [None, 0, 2 * layout_of(Block(0)).nbytes])
def test_strengths_that_come_and_go_give_the_bits_of_blocks_in_memory(
    tmp_path: Path, pinned: int | None
) -> None:
    given = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(99))
    for slots, prefetch in product((1, 3), (0, 2)):
        plain, streamed = blocks(), blocks()
        origins = written(tmp_path, streamed)
        machine = CpuMachine(Faults(poison=True))
        placement = Placement(frozenset({1}), slots, prefetch, pinned, ring=2)
        with Streamer(streamed, machine, placement, origins) as streamer:
            for strengths in SCHEDULES:
                set_strengths(plain, *strengths)
                set_strengths(streamed, *strengths)
                wanted = x = given
                for block in plain:
                    wanted = block(wanted)
                for module in streamer.walk():
                    x = module(x)
                assert torch.equal(x, wanted), (slots, prefetch, strengths)
        machine.close()


def test_what_is_not_read_is_neither_copied_nor_read_from_its_file(tmp_path: Path) -> None:
    modules = blocks()
    origins = written(tmp_path, modules)
    machine = CpuMachine()
    whole = COUNT * layout_of(modules[0]).nbytes
    expected = {
        (1.0, 1.0): 0,
        (0.0, 1.0): COUNT * PADDED["distilled"],
        (0.0, 0.0): COUNT * (PADDED["distilled"] + 2 * PADDED["style"]),
        (1.0, 0.0): 0,  # one copy a block: what lies before is taken along
    }
    with Streamer(modules, machine, Placement(pinned_bytes=0), origins) as streamer:
        full = streamer.report.read
        for strengths, saved in expected.items():
            set_strengths(modules, *strengths)
            for _ in streamer.walk():
                pass
            assert whole - streamer.report.moved == saved
            unpadded = sum(
                item.nbytes
                for origin in origins
                for item in origin.values()
                if saved and item.path.name not in ("base", "style" if strengths[1] else "base")
            )
            assert full - streamer.report.read == unpadded
    machine.close()


def test_factors_lie_behind_everything_else_the_first_file_last() -> None:
    module = Block(0)
    names = [item.name for item in layout_of(module).fields]
    late = lateness(module)
    assert sorted(names, key=lambda name: late.get(name, 0)) == names
    assert names[-2:] == ["both.a0", "both.b0"] and set(names[-6:]) == set(late)
    assert Needed([module], [layout_of(module)]).lengths() == [layout_of(module).nbytes]


def test_factors_that_were_left_out_are_not_taken_for_damage() -> None:
    module = Block(0)
    module.both.get_buffer("a0").fill_(torch.nan)
    assert nonfinite_parameters(module) == ["both.a0"]
    set_strengths([module], 0.0, 1.0)
    assert nonfinite_parameters(module) == []
