"""Guidance against the reference values and against what the formulas must keep."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ltxlite.errors import RequestError
from ltxlite.sampling.guidance import apg, cfg_star, combine, rescale
from ltxlite.sampling.settings import SAMPLER_OPTIONS, Guidance, check_sampler, passes

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    manifest = json.loads((GOLDEN / "MANIFEST.json").read_text())
    (case,) = (case for case in manifest["cases"] if case["name"] == name)
    return case["params"], load_file(GOLDEN / case["file"])


def guidance_of(params: dict[str, Any]) -> Guidance:
    return Guidance(
        cfg=params.get("cfg_scale", 1.0),
        stg=params.get("stg_scale", 0.0),
        modality=params.get("modality_scale", 1.0),
        rescale=params.get("rescale_scale", 0.0),
        stg_blocks=(0,),
        skip_step=params.get("skip_step", 0),
    )


def random_passes(batch: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(batch, 7, 5, generator=draw), torch.randn(batch, 7, 5, generator=draw)


@pytest.mark.parametrize("name", ["cfg", "stg", "modality", "all_rescale", "audio_defaults", "hq"])
def test_combination_equals_the_reference(name: str) -> None:
    params, tensors = golden("guidance_formulas")
    inputs = [tensors[f"in.{key}"] for key in ("cond", "uncond", "perturbed", "modality")]
    got = combine(*inputs, guidance=guidance_of(params[name]))  # type: ignore[misc]
    # Values reach 30: a few fp32 roundings of that size.
    torch.testing.assert_close(got, tensors[name], rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("mode", ["cfg_star", "apg"])
def test_other_modes_equal_the_reference(mode: Any) -> None:
    params, tensors = golden("guidance_formulas")
    settings = params[mode]
    guidance = Guidance(
        cfg=settings["scale"],
        mode=mode,
        apg_eta=settings.get("eta", 1.0),
        apg_norm_threshold=settings.get("norm_threshold", 0.0),
    )
    got = combine(tensors["in.cond"], tensors["in.uncond"], None, None, guidance)
    # Dot products over 96 values in another order: a few fp32 roundings of values up to 10.
    torch.testing.assert_close(got, tensors[mode], rtol=1e-6, atol=2e-6)


def test_skipped_steps_are_those_where_the_reference_repeats_its_prediction() -> None:
    params, tensors = golden("guided_skip_step")
    for stream in ("video", "audio"):
        guidance, x0 = guidance_of(params[stream]), tensors[f"step_{stream}_x0"]
        repeated = [False] + [torch.equal(x0[i], x0[i - 1]) for i in range(1, len(x0))]
        assert [guidance.skips(step) for step in range(len(x0))] == repeated


def test_default_guidance_is_the_conditional_prediction_itself() -> None:
    cond, _ = random_passes()
    assert torch.equal(combine(cond, None, None, None, Guidance()), cond)
    assert Guidance().passes(0) == {"cond"}


def test_bf16_predictions_are_combined_in_fp32() -> None:
    cond, uncond = (x.bfloat16() for x in random_passes())
    got = combine(cond, uncond, None, None, Guidance(cfg=3))
    exact = cond.double() + 2 * (cond.double() - uncond.double())
    # bf16 arithmetic would be off by 1e-2.
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


def test_modes_agree_with_plain_cfg_where_they_must() -> None:
    cond, uncond = random_passes()
    plain = cond + 3 * (cond - uncond)
    # Same numbers, split and joined again in fp32.
    torch.testing.assert_close(apg(cond, uncond, 4.0), plain, rtol=1e-5, atol=1e-5)
    # A negative that is a multiple of the positive leaves nothing to guide away from.
    torch.testing.assert_close(cfg_star(cond, 2.5 * cond, 4.0), cond, rtol=1e-5, atol=1e-5)


def test_apg_without_its_parallel_part_moves_across_the_positive() -> None:
    cond, uncond = random_passes()
    change = apg(cond, uncond, 4.0, eta=0.0) - cond
    along = (change * cond).sum((1, 2)) / (change.norm() * cond.norm())
    torch.testing.assert_close(along, torch.zeros(2), rtol=0, atol=1e-6)  # fp32 over 35 products


def test_apg_caps_the_difference_of_each_sample_alone() -> None:
    cond, uncond = random_passes()
    uncond[1] = cond[1] + 0.01  # a short difference, below the cap
    change = apg(cond, uncond, 2.0, norm_threshold=0.5) - cond
    wanted = torch.tensor([0.5, 0.01 * 35**0.5])
    torch.testing.assert_close(change.norm(dim=(1, 2)), wanted, rtol=1e-4, atol=0)


def test_cfg_star_projects_each_sample_alone() -> None:
    cond, uncond = random_passes()
    single = torch.cat([cfg_star(cond[i : i + 1], uncond[i : i + 1], 3.0) for i in range(2)])
    torch.testing.assert_close(cfg_star(cond, uncond, 3.0), single, rtol=1e-6, atol=1e-6)


def test_full_rescale_restores_the_spread_of_the_conditional_prediction() -> None:
    cond, uncond = random_passes()
    got = rescale(cond + 6 * (cond - uncond), cond, 1.0)
    torch.testing.assert_close(got.std(), cond.std(), rtol=1e-6, atol=0)


def test_rescale_leaves_a_stream_of_zeros_alone() -> None:
    zeros = torch.zeros(1, 7, 5)
    assert torch.equal(combine(zeros, zeros, None, None, Guidance(cfg=7, rescale=0.7)), zeros)


def test_passes_are_those_that_a_stream_needs() -> None:
    video = Guidance(cfg=3, stg=1, stg_blocks=(28,), skip_step=1)
    audio = Guidance(modality=3, skip_step=2)
    assert video.passes(0) == {"cond", "uncond", "perturbed"}
    assert passes(0, video, audio) == {"cond", "uncond", "perturbed", "isolated"}
    assert passes(1, video, audio) == set()  # both skip: no evaluation at all
    assert passes(3, video, audio) == {"cond", "isolated"}
    assert passes(4, video, audio) == {"cond", "uncond", "perturbed"}


def test_cfg_list_gives_one_value_a_step_and_its_last_to_the_rest() -> None:
    guidance = Guidance(cfg=(2, 2, 1))
    assert [guidance.cfg_at(step) for step in range(5)] == [2, 2, 1, 1, 1]
    assert [("uncond" in guidance.passes(step)) for step in range(4)] == [True, True, False, False]
    cond, uncond = random_passes()
    assert torch.equal(combine(cond, None, None, None, guidance, step=3), cond)
    assert torch.equal(combine(cond, uncond, None, None, guidance, 1), cond + (cond - uncond))


def test_guidance_survives_json() -> None:
    guidance = Guidance(cfg=(3, 1.5), stg=1, stg_blocks=(28,), mode="apg", apg_eta=0.5)
    text = json.dumps(dataclasses.asdict(guidance))
    assert Guidance(**json.loads(text)) == guidance
    assert hash(Guidance(**json.loads(text))) == hash(guidance)


def test_missing_pass_is_named() -> None:
    cond, uncond = random_passes()
    guidance = Guidance(cfg=3, stg=1, stg_blocks=(1,))
    with pytest.raises(RequestError, match="uncond pass"):
        combine(cond, None, None, None, guidance)
    with pytest.raises(RequestError, match="perturbed pass"):
        combine(cond, uncond, None, None, guidance)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cfg": -1}, "guidance cfg is -1"),
    ({"cfg": float("nan")}, "guidance cfg is nan"),
    ({"cfg": "3"}, "guidance cfg is '3'"),
    ({"cfg": []}, "cfg is an empty list"),
    ({"cfg": [3, 1e9]}, "guidance cfg is 1000000000.0"),
    ({"rescale": 1.5}, "guidance rescale is 1.5, wanted a number from 0 to 1"),
    ({"modality": float("inf")}, "guidance modality is inf"),
    ({"stg": 1}, "name the blocks"),
    ({"stg": 1, "stg_blocks": [-1]}, "stg_blocks is (-1,)"),
    ({"stg_blocks": 28}, "stg_blocks is 28"),
    ({"skip_step": 0.5}, "skip_step is 0.5"),
    ({"mode": "cfgstar"}, "choose one of cfg, cfg_star, apg"),
    ({"apg_norm_threshold": -2}, "apg_norm_threshold is -2"),
]


@pytest.mark.parametrize("fields, message", REFUSED)
def test_guidance_out_of_range_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refusal:
        Guidance(**fields)
    assert message in str(refusal.value)


def test_sampler_settings_are_checked_against_the_table() -> None:
    for name, options in SAMPLER_OPTIONS.items():
        check_sampler(name, options)
    for name, options, message in [
        ("heun", {}, "choose one of euler, euler_gradient"),
        ("euler", {"eta": 1.0}, "it takes none"),
        ("res_2s", {"gamma": 2.0}, "it takes eta, bong"),
        ("res_2s", {"eta": 1.5}, "res_2s eta is 1.5, wanted a number from 0 to 1"),
        ("er_sde", {"max_stage": 2.5}, "a whole number"),
    ]:
        with pytest.raises(RequestError) as refusal:
            check_sampler(name, options)
        assert message in str(refusal.value)
