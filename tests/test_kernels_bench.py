"""The GPU program without a GPU: every trial and check through the twins, and its judgement."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernels, kernels_run, kernels_targets, report
from benchmarks import kernels_torch_decode as torch_decode
from benchmarks.harness import Row
from benchmarks.kernels_checks import Check, Finding, run
from benchmarks.kernels_inputs import calm_q4_k, exact, random_blocks, turned
from benchmarks.kernels_run import (
    Bench,
    Contender,
    Outcome,
    Prepared,
    Trial,
    _ratios,
    measure,
    poisoned,
    relative_error,
)
from ltxlite_kernels import reference
from ltxlite_kernels.configs import DEQUANT
from ltxlite_kernels.rotate import Rotation

BENCH = Bench("cpu", small=True)
ROOT = Path(__file__).parent.parent
# What is not on the machine with the card, or may not be.
ABSENT = ("gguf", "rich", "av", "safetensors", "PIL", "tokenizers", "sentencepiece", "numba")


def trial_of(*contenders: Contender, error=lambda y: float(y)) -> Trial:
    return Trial("toy", "toy", {}, lambda _: Prepared(contenders, error))


@pytest.fixture(scope="module")
def small_run() -> tuple[subprocess.CompletedProcess[str], dict]:
    """Run the whole program with the absent packages blocked, as it is run on a lent machine."""
    block = "".join(f"sys.modules[{name!r}] = None; " for name in ABSENT)
    code = f"import sys; {block}from benchmarks.kernels import main; sys.exit(main(['--small']))"
    roots = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "quant"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": roots, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(done.stdout.splitlines()[-1])


def test_the_program_runs_without_anything_but_torch_triton_and_numpy(small_run):
    done, document = small_run
    assert document["benchmark"] == "kernels"
    assert len(done.stdout.splitlines()) == 1, "people's lines go to stderr"


def test_a_small_run_tries_every_kernel_and_gives_no_figures(small_run):
    _, document = small_run
    rows = [row for case in document["cases"] for row in case["rows"]]
    assert not [case for case in document["cases"] if "red" in case or "skipped" in case]
    assert all(case["figures"] == {} for case in document["cases"])
    assert all("median_ms" not in row for row in rows) and document["achieved"] == {}
    ours = [row for row in rows if row["name"].startswith("ltxlite")]
    assert len(ours) > 30 and all(row["error"] < 0.1 for row in ours)
    assert {row["missing"] for row in rows if "missing" in row} == {
        "ComfyUI-GGUF does not read it",
        "needs a card",
    }


def test_all_formats_are_decoded_to_both_kinds_of_scratch(small_run):
    _, document = small_run
    names = {case["case"] for case in document["cases"]}
    assert {f"dequant {name} {kind}" for name in DEQUANT for kind in ("bf16", "int8")} <= names


def test_every_timed_kernel_has_a_check(small_run):
    _, document = small_run
    checked = {item["family"] for item in document["checks"]}
    timed = {case["family"] for case in document["cases"]} - {"ceiling", "block"}
    assert timed <= checked
    assert all(item["error"] <= item["allowed"] for item in document["checks"])


def test_without_a_card_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("no CUDA device") and len(captured.err.splitlines()) == 1
    assert json.loads(captured.out) == {"benchmark": "kernels", "skipped": "no CUDA device"}


def test_full_sizes_are_those_that_the_issue_names():
    trials = {one.name: one for one in kernels._trials(small=False)}
    for name in ("linear 8192x16384x4096", "linear 32768x2048x2048", "linear 256x4096x16384"):
        assert name in trials
    for name in ("attention 32640x32640 d128", "attention 6144x6144 d64"):
        assert name in trials
    assert "attention 14080x1024 d128 biased" in trials and "block 14080 tokens" in trials
    one = trials["dequant Q4_K bf16"]
    assert one.nbytes == 16384 * 4096 * (144 / 256 + 2)
    assert trials["linear 8192x16384x4096"].flops == 2 * 8192 * 16384 * 4096


@pytest.mark.parametrize("wrong", [0.011, math.nan, math.inf])
def test_a_wrong_output_leaves_a_trial_red_and_without_rows(wrong):
    right = Contender("ltxlite", lambda _: 0.0, 0.01, ours=True)
    outcome = measure(trial_of(right, Contender("rival", lambda _: wrong, 0.01)), BENCH)
    assert outcome.red is not None and "rival is off by" in outcome.red and outcome.rows == []


def test_a_library_that_cannot_is_named_and_a_kernel_that_cannot_is_red():
    def unable(_: int) -> float:
        raise NotImplementedError("no such kernel\non this card")

    good = Contender("ltxlite", lambda _: 0.0, 0.01, ours=True)
    outcome = measure(trial_of(good, Contender("rival", unable, 0.01)), BENCH)
    assert outcome.red is None
    assert outcome.rows[1].missing == "NotImplementedError: no such kernel"
    broken = measure(trial_of(Contender("ltxlite", unable, 0.01, ours=True)), BENCH)
    assert broken.red is not None and "no such kernel" in broken.red


def test_what_begins_too_late_is_left_out():
    late = Bench("cpu", small=True, deadline=0.0)
    assert measure(trial_of(Contender("a", lambda _: 0.0)), late).skipped == "out of time"


def test_a_check_whose_kernel_fails_has_a_finding_that_nothing_allows():
    def broken(_: Bench):
        yield Finding("first", 0.0, 0.0)
        raise RuntimeError("illegal memory access")

    first, second = run(Check("toy", broken), BENCH)
    assert first.good and not second.good and "illegal memory access" in second.case


def test_memory_that_is_not_written_shows_while_it_is_poisoned():
    with poisoned():
        assert torch.empty(7).isnan().all()
        assert (torch.empty(7, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_errors_are_frobenius_norms_and_other_shapes_are_none():
    wanted = torch.tensor([3.0, 4.0])
    assert relative_error(wanted + torch.tensor([0.0, 0.5]), wanted) == pytest.approx(0.1)
    assert math.isnan(relative_error(wanted[:1], wanted))


def test_figures_compare_with_the_first_and_missing_rivals_have_none():
    rows = [Row("ltxlite", samples_ms=[2.0]), Row("a", samples_ms=[3.0]), Row("b", "gone")]
    assert _ratios(rows) == {"times a": 1.5}


class Pretended(Bench):
    """A CPU that is measured like a card."""

    @property
    def cuda(self) -> bool:
        return True


class Clock:
    """What `torch.cuda.Event` is, on a CPU."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Clock") -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def pretended(monkeypatch):
    """Let a CPU pass for a card, of which there is none to test with."""
    card = SimpleNamespace(major=9, minor=0, total_memory=8 << 30, multi_processor_count=2)
    for name, value in {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: None,
        "Event": Clock,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1 << 20,
        "get_device_properties": lambda _: card,
        "get_device_capability": lambda *_: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(report, "machine_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(kernels_run, "SAMPLE_MS", 0.01)
    monkeypatch.setattr(kernels, "Bench", lambda *given: Pretended("cpu", True, *given[2:]))
    monkeypatch.setattr(kernels, "CHECKS", kernels.CHECKS[-1:])


def test_what_is_measured_on_a_card_has_figures_and_is_judged(pretended, capsys):
    code = kernels.main(["--case", "fused norm", "--turns", "3", "--check"])
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert code == 1, "targets of trials that were not run are missed"
    assert document["conditions"]["machine"] == "NVIDIA H200"
    assert document["ceilings"].keys() == {"copy", "bf16", "fp16", "int8", "fp8"}
    assert document["compiling_seconds"] >= 0
    assert document["achieved"]["memory"] == document["ceilings"]["copy"]
    case = next(one for one in document["cases"] if one["case"] == "fused norm, modulate, int8")
    ours, torchs, copy = case["rows"]
    assert len(ours["samples_ms"]) == 3 and ours["peak_bytes"] == 1 << 20
    # Rates are rounded to two digits behind the point.
    assert ours["gb_s"] == pytest.approx(3 * 37 * 256 / ours["median_ms"] / 1e6, abs=0.006)
    assert copy["error"] is None and torchs["error"] > 0
    ratio = torchs["median_ms"] / ours["median_ms"]
    assert case["figures"]["times torch to bf16"] == pytest.approx(ratio, rel=0.01)
    rate = case["figures"]["of ceiling"] * document["ceilings"]["copy"]
    assert rate == pytest.approx(ours["gb_s"], abs=0.006 + 1e-4 * document["ceilings"]["copy"])
    assert "MISS block 14080 tokens" in captured.err


def test_a_kernel_whose_check_fails_is_not_timed(pretended, monkeypatch, capsys):
    wrong = Check("norm_silu", lambda _: iter([Finding("odd", 0.5, 0.1)]))
    monkeypatch.setattr(kernels, "CHECKS", (wrong,))
    assert kernels.main(["--case", "fused norm, SiLU"]) == 1
    document = json.loads(capsys.readouterr().out)
    case = document["cases"][-1]
    assert case["red"] == "fused norm, SiLU: norm_silu fails its checks" and case["rows"] == []


def outcome_of(name: str, **figures: float) -> Outcome:
    trial = Trial(name, "toy", {}, lambda _: Prepared((), float))
    return Outcome(trial, figures={key.replace("_", " "): value for key, value in figures.items()})


def test_targets_are_judged_only_on_the_cards_they_are_stated_for():
    outcomes = [outcome_of("dequant Q4_K bf16", of_ceiling=0.81, times_torch_ops=4.4)]
    assert kernels_targets.judge(outcomes, "NVIDIA GeForce RTX 4090") == []
    verdicts = kernels_targets.judge(outcomes, "NVIDIA H200")
    by_line = {one.line: one.met for one in verdicts}
    assert by_line["dequant Q4_K bf16: of ceiling 0.81 (at least 0.8)"]
    assert not by_line["dequant Q4_K bf16: times torch ops 4.40 (at least 4.5)"]
    assert not any(one.met for one in verdicts if one.trial.startswith("block")), "never run"


def test_every_target_speaks_of_trials_and_figures_that_exist():
    names = [one.name for one in kernels._trials(small=False)]
    outcomes = [outcome_of(name) for name in names]
    verdicts = kernels_targets.judge(outcomes, "NVIDIA H200")
    assert len(verdicts) == 4 + 1 + 1 + 2 + 8 + 1
    assert {one.trial for one in verdicts} <= set(names)


def test_rates_of_small_products_do_not_count_as_achieved():
    found = []
    for m, ms in ((256, 9.0), (8192, 2.0), (32768, 4.0)):
        trial = Trial("linear", "toy", {"M": m}, lambda _: Prepared((), float), flops=8e9)
        row = Row("ltxlite int8", samples_ms=[ms])
        found.append(Outcome(trial, [row], {"ltxlite int8": "matmul int8"}))
    assert kernels.achieved(found) == {"matmul int8": 3.0}  # of 4 and 2 TFLOP/s, not of 0.9


@pytest.mark.parametrize("name", torch_decode.DECODERS)
def test_torch_operations_decode_what_the_decoder_does(name):
    shape = (5, 768)
    blocks = random_blocks(BENCH, name, shape, seed=3)
    found = torch_decode.decoded(name, blocks, shape)
    # Three roundings to fp16, of 2^-12 of a value in the mean square, and one to bf16 of 2^-9 / √3.
    assert relative_error(found, exact(name, blocks, shape)) < 2.0**-8


@pytest.mark.parametrize("name", DEQUANT)
def test_random_blocks_have_finite_values_of_useful_size(name):
    values = exact(name, random_blocks(BENCH, name, (7, 512)), (7, 512))
    assert values.isfinite().all() and 1e-4 < float(values.std()) < 1e3


def test_calm_weights_keep_activations_as_large_as_they_are():
    values = exact("Q4_K", calm_q4_k(BENCH, (64, 1024)), (64, 1024))
    assert float(values.std()) == pytest.approx(1 / 32, rel=0.02)  # 65536 samples: 0.3 %
    assert abs(float(values.mean())) < 1e-3


@pytest.mark.parametrize("rotation", Rotation)
def test_rows_are_turned_as_the_twin_turns_them(rotation):
    x = BENCH.normal(5, 512, seed=1)
    # The twin works in fp32.
    assert relative_error(reference.rotate(x, rotation), turned(x, rotation)) < 1e-6
