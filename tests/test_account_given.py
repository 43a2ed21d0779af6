"""The account of what is given: encoders, appended tokens, parts that are kept."""

from dataclasses import replace

import pytest
import torch

from benchmarks.vram import GIVEN, GIVEN_SIZE, VARIED, Setup, setups
from benchmarks.vram_models import components
from ltxlite.account.job import StageJob
from ltxlite.account.media import image_phase, sound_encoder_phase
from ltxlite.account.phase import META, Levers, blank, metered
from ltxlite.account.stage import stage_phases
from ltxlite.geometry import ClipShape
from ltxlite.models.rolling import encode_frames
from ltxlite.models.video_vae import VideoEncoder

SHAPE = ClipShape(10, 3, 5, 81, 24.0)


def test_an_encode_stopped_early_has_its_peak_already() -> None:
    given, levers = components("bf16"), Levers(group_bytes=1 << 20)
    stage = StageJob(SHAPE, encoded=((10, 3, 5),))
    made = blank("video_encoder", given["video_encoder"], VideoEncoder, torch.bfloat16)
    with torch.inference_mode(), metered(levers) as meter:
        group = levers.group_bytes // (4 * 3 * 96 * 160)
        frames = [group] * (73 // group) + [73 % group] * bool(73 % group)
        size = (1, 3), (96, 160)
        pixels = (
            torch.empty(*size[0], n, *size[1], dtype=torch.bfloat16, device=META) for n in frames
        )
        encode_frames(made.network, pixels, levers.group_bytes).float()
    found = image_phase(given, 1, stage, levers)
    # The latents of the whole clip are a few hundred values a frame.
    assert found.activation_bytes == pytest.approx(meter.peak_bytes, rel=0.02)


def test_an_encode_does_not_grow_with_the_clip() -> None:
    given, levers = components("bf16"), Levers()
    short, long = (
        image_phase(given, 1, StageJob(SHAPE, encoded=((n, 12, 20),)), levers) for n in (4, 31)
    )
    assert long.activation_bytes <= short.activation_bytes * 1.02
    sound = sound_encoder_phase(given, StageJob(SHAPE, sound=126), levers)
    assert 0 < sound.activation_bytes < 200 << 20


def test_what_is_given_is_counted() -> None:
    stage = StageJob(SHAPE, images=1, appended=((1, 3, 5), (10, 1, 2)), strengths=2)
    assert stage.tokens == 150 + 15 + 20
    assert stage.levels == 9 * 3
    assert stage.encodes == ((1, 3, 5),)
    assert StageJob(SHAPE).levels == 9
    assert StageJob(SHAPE, held=True).levels == 18


def test_keyframes_and_retakes_cost_no_more_than_their_tokens_at_full_size() -> None:
    (plain,) = Setup(GIVEN_SIZE, VARIED, 1).job().stages
    given, levers = components(VARIED), Levers()
    base = stage_phases(given, 1, plain, levers)[1].activation_bytes
    for name in ("keyframes", "retake"):
        (stage,) = Setup(GIVEN_SIZE, VARIED, 1, given=name).job().stages
        found = stage_phases(given, 1, stage, levers)[1].activation_bytes
        share = stage.tokens / plain.tokens
        # A level a token instead of one for all takes an index and rows of modulation.
        assert found <= base * share + (128 << 20), name
        assert found >= base


def test_the_benchmark_has_a_row_for_each_kind_in_both_ways() -> None:
    names = {setup.name for setup in setups()}
    for given in GIVEN:
        for count in (1, 2):
            assert f"1280x768x121 Q4_K_M {count}-stage {given}" in names
    first, second = Setup(GIVEN_SIZE, VARIED, 2, given="IC-LoRA 1/2").job().stages
    assert first.appended == ((16, 6, 10),)
    assert second == replace(second, appended=()), "references are seen by the first stage only"
