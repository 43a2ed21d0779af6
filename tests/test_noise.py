"""The one rule for randomness: reproducible, device-independent, and no stream repeats another."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltxlite.errors import RequestError
from ltxlite.sampling.noise import (
    SDE_OFFSETS,
    SdeNoise,
    initial_noise,
    sde_seed,
    stage_seed,
    standardise,
)

GOLDEN = Path(__file__).parent / "golden"
SHAPES = ((1, 7, 5), (1, 3, 9))


def test_standardised_noise_equals_what_the_reference_injected() -> None:
    case = load_file(GOLDEN / "golden" / "sampler_res2s.safetensors")
    shapes = [case[f"in.noise.0.step_{stream}"].shape for stream in ("video", "audio")]
    # The reference seeds substeps with the step seed (42 in this case) + 10000.
    noise = SdeNoise(shapes, {"step": 42, "sub": 10_042}, standardised=True)
    for step in range(5):
        for kind in SDE_OFFSETS:
            for stream, got in zip(("video", "audio"), noise(kind), strict=True):
                stored = case[f"in.noise.{step}.{kind}_{stream}"].double()
                # Drawn in fp64, stored in fp32: half a unit in the last place of values up to 4.
                torch.testing.assert_close(got, stored, rtol=0, atol=2.4e-7)


def test_initial_noise_is_video_then_audio_from_one_generator() -> None:
    generator = torch.Generator().manual_seed(123)
    expected = [torch.randn(shape, generator=generator) for shape in SHAPES]
    got = initial_noise(SHAPES, 123)
    assert all(map(torch.equal, got, expected))
    assert torch.equal(initial_noise(SHAPES[:1], 123)[0], got[0])


def test_noise_does_not_depend_on_the_default_device() -> None:
    on_cpu = initial_noise(SHAPES, 5), SdeNoise(SHAPES, {"step": 6})("step")
    with torch.device("meta"):
        elsewhere = initial_noise(SHAPES, 5), SdeNoise(SHAPES, {"step": 6})("step")
    for plain, other in zip(on_cpu, elsewhere, strict=True):
        assert all(map(torch.equal, plain, other))


def test_noise_ends_on_the_device_that_was_asked_for() -> None:
    assert initial_noise(SHAPES, 5, "meta")[1].device.type == "meta"
    noise = SdeNoise(SHAPES, {"sub": 5}, standardised=True, device="meta")("sub")
    assert noise[0].device.type == "meta"
    assert noise[0].dtype == torch.float64


def test_no_two_streams_of_a_job_share_a_seed() -> None:
    stages = range(64)
    for job in (0, 10, 42, 4_294_967_295):
        seeds = [stage_seed(job, stage) for stage in stages]
        seeds += [sde_seed(job, stage, kind) for stage in stages for kind in SDE_OFFSETS]
        assert len(set(seeds)) == len(seeds)


def test_no_two_streams_of_a_job_draw_the_same_noise() -> None:
    shape = ((1, 63, 3),)
    draws = [initial_noise(shape, stage_seed(10, stage))[0] for stage in range(3)]
    for stage in range(3):
        noise = SdeNoise(shape, {kind: sde_seed(10, stage, kind) for kind in SDE_OFFSETS})
        draws += [noise(kind)[0] for kind in ("step", "sub", "step", "sub")]
    for one, other in combinations(draws, 2):
        # Unrelated normal draws of 189 values correlate by 0.07; 0.35 is five deviations.
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.35


def test_kinds_advance_independently() -> None:
    seeds = {kind: sde_seed(10, 0, kind) for kind in SDE_OFFSETS}
    alternating, alone = SdeNoise(SHAPES, seeds), SdeNoise(SHAPES, seeds)
    mixed = [alternating(kind) for kind in ("step", "sub", "sub", "step")]
    steps = [alone("step"), alone("step")]
    assert torch.equal(mixed[3][1], steps[1][1])
    assert not torch.equal(steps[0][1], steps[1][1])


def test_seeds_follow_the_documented_rule() -> None:
    assert stage_seed(10, 0) == 10
    assert stage_seed(10, 2) == 2_000_016
    assert stage_seed(10, 2, own=77) == 77
    assert sde_seed(10, 1, "step") == 1_010_013
    assert sde_seed(10, 1, "sub") == 1_020_013
    assert stage_seed(4_294_967_295, 1) == 1_000_002


def test_torch_uses_no_more_than_32_bits_of_a_seed() -> None:
    # The reason for the range of seeds; if this ever fails, the range can grow.
    small, large = (torch.Generator().manual_seed(seed) for seed in (10, 10 + (1 << 32)))
    assert torch.equal(torch.randn(9, generator=small), torch.randn(9, generator=large))


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_seeds_outside_the_range_are_refused(seed: int) -> None:
    for use in (lambda: stage_seed(seed, 0), lambda: initial_noise(SHAPES, seed)):
        with pytest.raises(RequestError, match=f"seed is {seed}, wanted 0 to 4294967295"):
            use()


def test_standardised_noise_has_no_mean_and_unit_deviation_in_each_sample() -> None:
    draw = torch.Generator().manual_seed(1)
    noise = 3 + 2 * torch.randn(2, 7, 5, generator=draw, dtype=torch.float64)
    got = standardise(noise)
    # fp64 sums of 35 values.
    torch.testing.assert_close(got.mean((1, 2)), torch.zeros(2).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(got.std((1, 2)), torch.ones(2).double(), rtol=0, atol=1e-14)
