"""The benchmark of the engine: its small form end to end, and what its figures are made of."""

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from benchmarks import engine, report
from benchmarks.engine_memory import ALLOWANCE, _compared
from benchmarks.engine_models import Rig, drawn, random_blocks, small_components
from benchmarks.engine_speed import TimedCpuMachine
from ltxlite.linear import QuantLinear
from ltxlite.memory.machine import CpuMachine, Faults
from ltxlite.memory.plan import Need, PhasePlan
from ltxlite.models.transformer import Transformer
from ltxlite_quant.formats import FORMATS

ROOT = Path(__file__).parent.parent
# All that a machine with a card must have: issue 4.
ALLOWED = {"torch", "numpy", "safetensors", "triton", "triton-windows"}
MODULES = {"pillow": "PIL"}
CPU = Rig(torch.device("cpu"), torch.float32, "auto")


def test_the_account_of_small_networks_is_what_the_meter_sees(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert engine.main(["--small", "--case", "small memory"]) == 0
    told = capsys.readouterr()
    assert "no figure below is a card's" in told.err
    (case,) = json.loads(told.out.splitlines()[-1])["cases"]
    phases = {row["phase"]: row for row in case["phases"]}
    assert len(phases) == 9
    for name, row in phases.items():
        if not name.startswith("levels"):  # there the weights of a CPU are where they were
            # Norms of a CPU keep a number a row, as test_account says; in stages it runs norms,
            # rotations and gates in parts, which the card of the account fuses.
            share = 0.1 if name.startswith("stage") else 0.01
            assert row["measured"] == pytest.approx(row["counted"], rel=share), name


def test_it_runs_where_only_torch_numpy_and_safetensors_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {re.split(r"[^\w-]", item)[0] for item in project["dependencies"]}
    absent = [MODULES.get(name, name) for name in sorted(wanted - ALLOWED)]
    assert "gguf" in absent and "rich" in absent
    roots = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "quant")]
    code = (
        f"import sys; sys.path[:0] = {roots!r}\n"
        f"for name in {absent!r}: sys.modules[name] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from benchmarks.__main__ import main\n"
        "sys.exit(main(['engine', '--small', '--runs', '1', '--case', 'small step']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout.splitlines()[-1])["cases"]
    assert case["video_tokens"] == 2 * 5 * 7
    assert [row["name"] for row in case["rows"]] == ["streamed", "resident"]
    assert case["figures"].keys() == {"gap_share", "host_share", "time_ratio"}


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_random_blocks_decode_to_weights_that_keep_the_variance(name: str) -> None:
    kind, rows, columns = FORMATS[name], 37, 768
    row_bytes = columns // kind.block_size * kind.block_bytes
    blocks = random_blocks(kind, (rows, row_bytes), columns)
    values = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]) * math.sqrt(columns)
    assert np.isfinite(values).all()
    # 28416 values, of which groups of 16 and more share a random scale: 1800 draws, 5 % is 2 sigma.
    assert values.std() == pytest.approx(1, rel=0.05)
    assert abs(values.mean()) < 0.05


def test_blocks_share_their_values_but_not_their_modules() -> None:
    network = drawn("transformer", small_components()["transformer"], CPU)
    assert isinstance(network, Transformer)
    first, last = network.blocks[0], network.blocks[-1]
    pairs = list(zip(first.state_dict().values(), last.state_dict().values(), strict=True))
    assert len(pairs) > 80 and all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    kinds = {m.format.name for m in network.modules() if isinstance(m, QuantLinear)}
    assert kinds == {"Q4_K", "Q6_K"}
    assert not [name for name, value in network.state_dict().items() if value.is_meta]


def test_waiting_for_a_copy_is_counted_and_computing_is_not() -> None:
    machine = TimedCpuMachine()
    CpuMachine.__init__(machine, Faults(delay=lambda number: 0.05))
    target, source = machine.device_buffer(8), torch.ones(8, dtype=torch.uint8)
    try:
        machine.hold(machine.copy(target, source, None))
        assert 0.045 < machine.waited() < 5
        assert machine.waited() == 0
    finally:
        machine.close()


@pytest.mark.parametrize(
    ("component", "measured", "off"),
    [
        ("transformer", 1000 << 20, 0.0),  # what is counted
        ("transformer", 1100 << 20, 0.0),  # with all that libraries may take
        ("transformer", (1100 << 20) + ALLOWANCE, 0.0),
        ("transformer", (1100 << 20) + ALLOWANCE + (110 << 20), 0.1),
        ("transformer", (1000 << 20) - ALLOWANCE - (55 << 20), 0.05),
        ("video_decoder", 1155 << 20, 0.05),  # without the allowance
    ],
)
def test_an_account_is_off_by_what_lies_beyond_its_bounds(
    component: str, measured: int, off: float
) -> None:
    need = Need("phase", component, 400 << 20, (), 600 << 20, workspace=100 << 20)
    row = _compared(PhasePlan(need, None, need.base), measured)
    assert row["off"] == pytest.approx(off)


def test_what_cannot_run_is_a_row_that_says_so_and_misses_its_targets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    found = list(engine._measured(iter([("step 8k", full)]), None, float("inf")))
    assert "Tried to allocate" in capsys.readouterr().err
    late = list(engine._measured(iter([("step 8k", full)]), None, -1.0))
    assert "no time was left" in str(late[0].rows[0].missing)
    verdicts = report.judge(found, report.read_targets("engine"))
    assert [item.figure for item in verdicts] == ["time_ratio", "gap_share"]
    assert not any(item.met for item in verdicts)


def test_every_target_names_a_case_of_the_full_size() -> None:
    scale = engine.full_scale()
    cases = {*scale.cards, *scale.steps}
    for target in report.read_targets("engine"):
        assert set(target["cases"]) <= cases
    tokens = {name: math.prod(size) for name, size in scale.steps.items()}
    assert tokens["step 8k"] == 8160 and tokens["step 32k"] == 32640


def test_a_check_without_a_card_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        engine.main(["--check"])
    assert stopped.value.code == 2
