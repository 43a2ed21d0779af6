"""Stopped runs go on to the same bits: samplers, stages, whole jobs, and out of memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_support import GUIDED, LORA, every_progress, request_of, tiny_networks, tiny_prompts
from sampler_bench import Bench, curved, draws, other_curved

from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.pipeline import run_stages
from ltxlite.progress import Clock, Report
from ltxlite.request import Request, Stage
from ltxlite.sampling.samplers import SAMPLERS
from ltxlite.sampling.schedules import TABLES
from ltxlite.sampling.settings import Guidance
from ltxlite.saved_state import conditions, describe, encode_state, read_state
from ltxlite.stages import Progress, Prompts, StageRun, beginning


@pytest.fixture(scope="module")
def networks() -> Networks:
    return tiny_networks()


@pytest.fixture(scope="module")
def prompts(networks: Networks) -> Prompts:
    with torch.no_grad():
        return tiny_prompts(networks)


def written(progress: Progress, request: Request, networks: Networks, path: Path) -> Progress:
    """Take a progress through its file."""
    path.write_bytes(b"".join(encode_state(progress, conditions(request, networks))))
    return read_state(path, request, networks)


def same_latents(one: Progress, other: Progress) -> bool:
    pairs = ((one.latents.video, other.latents.video), (one.latents.audio, other.latents.audio))
    return all(torch.equal(*pair) for pair in pairs)


def refuse_loss(
    request: Request, networks: Networks, prompts: Prompts, path: Path, first: int = 0
) -> list[Progress]:
    """Run a job, go on from its saved states since `first`, and compare the ends bit for bit."""
    progresses = every_progress(request, networks, prompts)
    for progress in progresses[first:]:
        again = written(progress, request, networks, path)
        for end in run_stages(request, networks, prompts, again, Clock(Report())):
            again = end
        assert same_latents(again, progresses[-1]), describe(progress, request, networks)
    return progresses


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_goes_on_from_any_step_to_the_same_bits(name: str) -> None:
    bench = Bench(curved, other_curved)
    end = bench.run(name, draws(1), TABLES["distilled"])
    assert len(bench.positions) == 8
    for position, drawn in bench.positions:
        again = Bench(curved, other_curved).go_on(name, position, drawn, TABLES["distilled"])
        assert all(map(torch.equal, again, end))


def test_noise_goes_on_where_the_counts_say() -> None:
    bench = Bench(curved)
    bench.run("res_2s", draws(1), TABLES["stage2"])
    assert [drawn for _, drawn in bench.positions] == [{"step": n, "sub": n} for n in (1, 2, 3)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_guided_stage_that_skips_steps_is_resumed_bit_for_bit(
    sampler: str, networks: Networks, prompts: Prompts, tmp_path: Path
) -> None:
    stage = Stage(sigmas="linq:4", sampler=sampler, video=GUIDED, audio=Guidance(skip_step=1))
    progresses = refuse_loss(request_of(tmp_path, stage), networks, prompts, tmp_path / "state")
    assert [progress.done for progress in progresses] == [1, 2, 3, 4, 0]
    wide = progresses[0].position.carry["x"][0].dtype == torch.float64
    assert wide == (sampler == "res_2s")


@pytest.mark.parametrize("sound", ["refine", "keep", "freeze"])
def test_two_stages_with_a_lora_are_resumed_bit_for_bit(
    sound: Any, prompts: Prompts, tmp_path: Path
) -> None:
    stages = (
        Stage("1/2", "linq:3", sampler="euler_gradient", loras=(0.5,)),
        Stage(
            sigmas="0.8,0.4,0", upscaler="x2", sampler="euler_ancestral", sound=sound, loras=(1,)
        ),
    )
    request = request_of(tmp_path, *stages, width=128, height=64)
    request = replace(request, files=replace(request.files, loras=(str(LORA),)))
    networks = open_networks(request.files, "cpu", "float32")
    first = 0 if sound == "refine" else 3  # sound differs in the second stage only
    progresses = refuse_loss(request, networks, prompts, tmp_path / "state", first)
    assert [(p.stage, p.done) for p in progresses] == [
        *((0, 1), (0, 2), (0, 3), (1, 0)),
        *((1, 1), (1, 2), (2, 0)),
    ]
    told = [describe(progress, request, networks) for progress in progresses]
    assert told[0] == "stage 1 of 2, step 2 of 3"
    assert told[2] == "the end of stage 1 of 2"
    assert told[3] == "stage 2 of 2, step 1 of 2"
    assert told[-1] == "the decoding"


def test_a_stage_that_ran_out_of_memory_goes_on_with_another_transformer(
    networks: Networks, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(sigmas="linq:4", sampler="res_2s", video=GUIDED)
    request = request_of(tmp_path, stage)
    begun = beginning(request, networks)
    wanted = StageRun(request, begun, networks, networks.transformer())(prompts, lambda _: None)

    transformer, calls = networks.transformer(), iter(range(99))
    real = transformer.run

    def scarce(passes: Any) -> Any:
        if next(calls) in (3, 4):  # the second evaluation of the second step, and its repetition
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(passes)

    monkeypatch.setattr(transformer, "run", scarce)
    run = StageRun(request, begun, networks, transformer)
    finished: list[int] = []
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            run(prompts, lambda progress: finished.append(progress.done))
        assert run.progress.done == 1
    again = StageRun(request, run.progress, networks, networks.transformer())
    latents = again(prompts, lambda progress: finished.append(progress.done))
    assert torch.equal(latents.video, wanted.video)
    assert torch.equal(latents.audio, wanted.audio)
    assert finished == [1, 2, 3, 4]
