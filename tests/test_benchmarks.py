"""The harness judges honestly, and the step benchmark compares what it says."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import formats, quantize, report
from benchmarks.__main__ import main
from benchmarks.harness import (
    Case,
    Contestant,
    GateError,
    Result,
    Row,
    measure,
    relative_error,
)
from benchmarks.rivals import RIVALS, Rival, diffusers_name
from benchmarks.step import SMALL, Size, cases, checkpoint_shapes, contestants
from benchmarks.wide_model import wide_networks
from ltxlite_quant import FORMATS, QuantTensor

GOLDEN = Path(__file__).parent / "golden"


class Runner:
    """Returns a fixed value and notes in a shared log that it ran."""

    def __init__(self, name: str, value: float, log: list[str]) -> None:
        self.name, self.value, self.log = name, value, log

    def __call__(self) -> dict[str, torch.Tensor]:
        self.log.append(self.name)
        return {"out": torch.tensor([1.0, self.value])}


def case_of(*pairs: tuple[str, float]) -> tuple[Case, list[str]]:
    log: list[str] = []
    made = [Contestant(name, Runner(name, value, log)) for name, value in pairs]
    return Case("toy", {"size": 2}, 1e-3, lambda: made), log


def result_of(**samples: list[float]) -> Result:
    case, _ = case_of(("ours", 1.0))
    return Result(case, [Row(name, samples_ms=values) for name, values in samples.items()])


@pytest.mark.parametrize("wrong", [1.002, float("nan"), float("inf")])
def test_a_wrong_contestant_stops_everything_before_timing(wrong):
    case, log = case_of(("ours", 1.0), ("rival", wrong))
    with pytest.raises(GateError, match="rival and ours differ"):
        measure(case, 5)
    assert log == ["ours", "rival"], "one run each for the comparison, none for the clock"


def test_other_output_names_are_an_error_not_an_agreement():
    x = torch.ones(2)
    assert np.isnan(relative_error({"video": x}, {"video": x, "audio": x}))


def test_relative_error_is_the_worst_output_over_its_own_maximum():
    expected = {"a": torch.tensor([10.0, 1.0]), "b": torch.tensor([-0.5])}
    actual = {"a": torch.tensor([10.0, 1.5]), "b": torch.tensor([-0.4])}
    # 0.5/10 and 0.1/0.5; fp32 inputs, so 1e-6.
    assert relative_error(actual, expected) == pytest.approx(0.2, abs=1e-6)


def test_contestants_take_turns_and_everyone_begins_a_turn():
    case, log = case_of(("a", 1.0), ("b", 1.0), ("c", 1.0))
    result = measure(case, 4)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [len(row.samples_ms) for row in result.rows] == [4, 4, 4]


def test_percentiles_are_those_of_numpy():
    samples = [5.0, 1.0, 9.5, 2.25, 7.0, 3.0, 11.0]
    row = Row("x", samples_ms=samples)
    assert row.median_ms == np.median(samples)
    for percent in (10, 90):  # both interpolate linearly; rounding differs in the last bit
        assert row.percentile_ms(percent) == pytest.approx(np.percentile(samples, percent))


def test_figures_compare_with_the_best_rival_of_each_kind():
    result = result_of(ours=[2.0], slow=[8.0], fast=[4.0])
    for row, peak in zip(result.rows, (30, 50, 100), strict=True):
        row.peak_bytes = peak
    assert result.figures == {"time_ratio": 0.5, "peak_ratio": 0.6}


def test_a_missing_rival_is_named_and_misses_the_targets_that_need_it():
    result = result_of(ours=[1.0], here=[10.0])
    result.rows.append(Row("gone", "not installed"))
    target = {"figure": "time_ratio", "at_most": 1.0}
    both, one = (
        report.judge([result], [{**target, "rivals": rivals}])[0]
        for rivals in (["here", "gone"], ["here"])
    )
    assert one.met and not both.met
    assert "gone not installed" in report.summary([both, one]).splitlines()[0]
    assert report.summary([both, one]).startswith("MISS 1 of 2")


def test_a_figure_at_the_limit_is_met_and_one_above_is_not():
    result = result_of(ours=[1.03], rival=[1.0])
    limits = [{"figure": "time_ratio", "at_most": x, "rivals": []} for x in (1.03, 1.029)]
    assert [verdict.met for verdict in report.judge([result], limits)] == [True, False]
    unknown = report.judge([result], [{"figure": "typo", "at_most": 9, "rivals": []}])
    assert not unknown[0].met, "a target that names no figure cannot be met"


def test_every_target_names_a_benchmark_and_rivals_that_exist():
    targets = report.read_targets("step")
    assert {target["figure"] for target in targets} == {"time_ratio", "peak_ratio"}
    names = {rival.name for rival in RIVALS}
    assert all(set(target["rivals"]) <= names for target in targets)


def test_a_package_that_is_absent_is_told_from_one_that_is_broken(tmp_path, monkeypatch):
    (tmp_path / "broken_rival.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    absent = Rival("a", ("no_such_package",), RIVALS[0].build)
    broken = Rival("b", ("broken_rival",), RIVALS[0].build)
    assert absent.missing() == "not installed: pip install -e .[rivals]"
    assert "nowhere_to_be_found" in (broken.missing() or "")


def test_checkpoint_names_and_shapes_are_those_of_the_full_size_file():
    listed = json.loads((GOLDEN / "real_22b_keys.json").read_text(encoding="utf-8"))
    prefix = "model.diffusion_model."
    real = {
        name.removeprefix(prefix): tuple(shape)
        for name, shape in listed["tensors"].items()
        if name.startswith(prefix) and "embeddings_connector" not in name
    }
    full = Size(blocks=48, heads=32, video_head=128, audio_head=64)
    assert checkpoint_shapes(full) == real


def test_names_of_diffusers_follow_the_published_map():
    pairs = {  # model.md 1.6
        "patchify_proj.weight": "proj_in.weight",
        "audio_adaln_single.linear.bias": "audio_time_embed.linear.bias",
        "prompt_adaln_single.linear.bias": "prompt_adaln.linear.bias",
        "av_ca_a2v_gate_adaln_single.linear.bias": "av_cross_attn_video_a2v_gate.linear.bias",
        "transformer_blocks.3.attn1.q_norm.weight": "transformer_blocks.3.attn1.norm_q.weight",
        "transformer_blocks.3.ff.net.0.proj.bias": "transformer_blocks.3.ff.net.0.proj.bias",
    }
    assert {name: diffusers_name(name) for name in pairs} == pairs


def test_cases_are_fp32_and_bf16_of_the_size_asked_for():
    made = {case.name: case for case in cases(argparse.Namespace(small=False))}
    assert made.keys() == {"fp32", "bf16"}
    assert made["fp32"].facts["video_tokens"] == 2048
    assert made["fp32"].facts["widths"] == [1024, 512]
    assert (made["fp32"].tolerance, made["bf16"].tolerance) == (3e-4, 3e-2)


def test_bf16_of_ours_stays_within_its_tolerance_of_fp32():
    # Weights and inputs rounded to bf16 first, so that only the arithmetic differs.
    low = next(iter(contestants(SMALL, torch.bfloat16, ()))).run()
    high = next(iter(contestants(SMALL, torch.float32, ()))).run()
    assert 1e-4 < relative_error(low, high) < 6e-2  # inputs rounded too: twice the gate's 3e-2


def test_the_command_ends_with_one_json_object(capsys):
    assert main(["step", "--small", "--runs", "2", "--case", "fp32"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    row = document["cases"][0]["rows"][0]
    assert (row["name"], row["error"], len(row["samples_ms"])) == ("ltxlite", 0.0, 2)
    assert row["peak_bytes"] > 63 * 64 * 4, "at least the residual stream"
    assert document["conditions"]["runs"] == 2


def test_too_few_runs_cannot_be_checked():
    with pytest.raises(SystemExit) as stopped:
        main(["step", "--small", "--check", "--runs", "3"])
    assert stopped.value.code == 2


def test_results_are_filed_by_machine_date_and_commit(tmp_path):
    header = {
        "machine": "Intel(R) Xeon(R) Processor @ 2.00GHz",
        "threads": 2,
        "date": "2026-11-21",
        "commit": "abc1234",
        "dirty": True,
    }
    path = report.results_path(header, "step", tmp_path)
    assert path.relative_to(tmp_path).as_posix() == (
        "intel-xeon-processor-2-00ghz-2-threads/2026-11-21-abc1234-dirty-step.json"
    )


def test_the_command_measures_a_format_on_whole_clips(capsys):
    assert main(["formats", "--models", "1", "--runs", "1", "--case", "Q4_0"]) == 0
    captured = capsys.readouterr()
    (case,) = json.loads(captured.out.splitlines()[-1])["cases"]
    found = case["figures"]
    assert (case["case"], found["bits"]) == ("Q4_0", 4.5)
    # Weights lose 8.6 %; through 4 blocks and 11 steps a latent loses something of that order.
    assert 0.005 < found["video_error"] < 0.5 and 0.005 < found["audio_error"] < 0.5
    assert 15 < found["psnr"] < 60
    assert "audio_error" in captured.err and "Q4_0" in captured.err


def test_every_matrix_of_the_wide_model_takes_every_format(tmp_path):
    network = wide_networks(tmp_path, 0).transformer()
    matrices = formats._matrices(network)
    assert len(matrices) == 4 * 34  # linears of a block: formats.md 7, 1
    assert all(linear.in_features % 256 == 0 for linear in matrices.values())


def test_smaller_formats_of_a_family_have_fewer_bits():
    for name, smaller in formats.SMALLER.items():
        assert formats.bits_of(smaller) < formats.bits_of(name)
    # formats.md 3: one number a tensor; one a row of 4096; one of 8 bits a group of 32.
    sizes = {"F8_E4M3_SCALED": 32 / (256 * 4096), "INT8": 32 / 4096, "MXFP8": 8 / 32}
    for name, scales in sizes.items():
        assert formats.bits_of(name) == pytest.approx(8 + scales, abs=1e-9)


class FakeClip:
    """A clip whose latents are off by as much as a table says."""

    reference = 0.0

    def __init__(self, errors: dict[str, float]) -> None:
        self.errors = errors

    def made(self, change: str) -> float:
        return self.errors[change]


def test_errors_of_formats_are_means_over_models_and_compared_within_a_family(monkeypatch):
    monkeypatch.setattr(formats, "change_to", lambda name: name)
    monkeypatch.setattr(
        formats,
        "_compared",
        lambda made, wanted: {
            "video_error": made,
            "audio_error": 2 * made,
            "psnr": 10 / made,
            "snr": 5.0,
        },
    )
    study = formats.Study(
        [FakeClip({"Q5_0": 1.0, "Q4_0": 2.0}), FakeClip({"Q5_0": 3.0, "Q4_0": 2.0})]
    )
    found = study.of_case("Q5_0")
    assert found["video_error"] == pytest.approx(5**0.5), "root mean square of 1 and 3"
    assert found["psnr"] == pytest.approx((10 + 10 / 3) / 2), "decibels are averaged"
    # A format that is worse than the smaller one shows as more than 1, and as more than 0 dB.
    assert found["video_over_smaller"] == pytest.approx(5**0.5 / 2)
    assert found["psnr_behind_smaller"] == pytest.approx(5 - 20 / 3)
    assert "video_over_smaller" not in study.of_case("Q4_0")


@pytest.mark.parametrize("benchmark", ["formats", "quantize"])
def test_targets_name_cases_that_are_run(benchmark):
    named = {case for target in report.read_targets(benchmark) for case in target.get("cases", ())}
    run = {
        "formats": {*formats.PLAIN, *formats.ENCODERS, *formats.PLANS, *formats.SCALED},
        "quantize": {case.name for case in quantize.cases(argparse.Namespace())},
    }
    assert named and named <= run[benchmark]


def test_weighted_errors_are_sums_of_squares_times_importance():
    random = torch.Generator().manual_seed(4)
    source = torch.randn(5, 64, generator=random)
    importance = torch.rand(64, generator=random) * 1000
    made = quantize._ours(source, "Q8_0", "default", importance)
    assert isinstance(made, QuantTensor) and made.format == FORMATS["Q8_0"]
    miss = made.dequantize().double().numpy() - source.double().numpy()
    wanted = (miss**2 * importance.double().numpy()).sum()
    assert quantize._weighted_error(made, source, importance) == pytest.approx(wanted, rel=1e-12)


def test_importances_of_the_quantize_benchmark_differ_between_inputs_and_one_kind_is_measured():
    found = quantize._importances()
    assert found.keys() == {"lognormal", "outliers", "calibrated"}
    for kind, importance in found.items():
        assert importance.shape == (2048,) and bool((importance > 0).all()), kind
        assert importance.log().std() > 0.5, kind
    # Four blocks' feed-forwards of 256 inputs each, twice.
    assert torch.equal(found["calibrated"][:1024], found["calibrated"][1024:])
    assert (found["outliers"] > 100).sum() == 2048 / 64
