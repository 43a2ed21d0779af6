"""The benchmark of host memory: what it counts, its files, and a run on the demo's tiny ones."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import host, report
from benchmarks.host import (
    SETUPS,
    Peak,
    Setup,
    SharedCard,
    line,
    measured,
    private_bytes,
    result_of,
)
from benchmarks.host_files import write_release
from ltxlite.checkpoint.files import ModelFiles
from ltxlite.memory.budget import GIB
from ltxlite.opening import open_networks
from ltxlite.request import Files
from ltxlite.stages import refuse_missing

MIB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
FOUND = {
    "planned": 6 * GIB,
    "idle": GIB // 4,
    "peaks": {"text encoder": GIB, "transformer": 7 * GIB},
}


def test_private_pages_are_read_from_the_status_of_a_process() -> None:
    assert private_bytes("VmRSS:\t 9000 kB\nRssAnon:\t    5120 kB\nRssFile: 1 kB\n") == 5 * MIB


@linux
def test_what_is_written_counts_and_the_card_does_not() -> None:
    before = private_bytes()
    with Peak().watching() as peak:
        # Not from the heap, where pages that other tests have used may be free.
        private = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        plain = torch.frombuffer(private, dtype=torch.uint8).fill_(1)
        assert private_bytes() - before > 60 * MIB
        peak.restart()
        card = SharedCard()
        buffers = [card.device_buffer(64 * MIB).fill_(1), card.device_buffer(32 * MIB)]
        assert private_bytes() - before < 80 * MIB
        del plain, private
        assert peak.restart() - before > 60 * MIB
    assert int(buffers[1][-1]) == 1, "all buffers are one memory"
    card.close()


def test_the_files_have_the_size_of_the_release_and_take_no_disk(tmp_path: Path) -> None:
    files = write_release(tmp_path)
    networks = open_networks(files, "cpu", "bfloat16")
    refuse_missing((), networks)
    assert networks.transformer_config().layers == networks.gemma_config().layers == 48
    sizes = {path.name: path.stat().st_size / 1e9 for path in tmp_path.iterdir()}
    # Blocks of 11.4 GB in Q4_K_M (peers.md 5.1), 2 of connectors in Q8_0, AdaLN in BF16.
    assert 14 < sizes["ltx-2.3-22b-distilled-Q4_K_M.gguf"] < 16
    assert 7 < sizes["gemma-3-12b-it-Q4_K_M.gguf"] < 8  # README: 7.3
    if sys.platform.startswith("linux"):
        assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 100e6
    assert {type(model) for model in ModelFiles.open([tmp_path]).models}


@linux
def test_a_run_loads_every_network_where_the_plan_puts_it(
    demo_files: tuple[Path, Path, Path],
) -> None:
    model, upscaler, encoder = map(str, demo_files)
    files = Files(model, encoder, upscalers=(upscaler,))
    found = measured(Setup("tiny", 8, 16), files, 64 * GIB)
    assert list(found["peaks"]) == list(found["held"])
    assert {"text encoder", "transformer", "video decoder"} <= found["peaks"].keys()
    assert all(peak >= found["idle"] // 2 for peak in found["peaks"].values())
    assert found["held"]["transformer"]["resident"] > 0  # all of it, on a card of 8 GiB
    limited = measured(Setup("tiny", 8, 16), files, GIB)
    assert limited["limited_to"] == GIB


def test_a_limited_run_has_no_figure_that_a_target_asks_for() -> None:
    setup = SETUPS[0]
    whole = result_of(setup, FOUND)
    assert whole.figures["peak_gib"] == 7 and "peak in transformer" in line(whole)
    limited = result_of(setup, {**FOUND, "limited_to": 4 * GIB})
    assert "room for 4.0 GiB only" in line(limited)
    targets = report.read_targets("host")
    assert [v.met for v in report.judge([whole, limited], targets)] == [True, False]


def test_every_case_has_a_target() -> None:
    named = {case for target in report.read_targets("host") for case in target["cases"]}
    assert named == {setup.name for setup in host.SETUPS}
