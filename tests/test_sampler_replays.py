"""Stored reference runs retraced: the model's answers are given back, its inputs checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ltxlite.sampling.contract import Prediction, State, Tools
from ltxlite.sampling.samplers import SAMPLERS, sample

GOLDEN = Path(__file__).parent / "golden"
STREAMS = ("video", "audio")

# Values reach 8, where one fp32 unit is 9.5e-7; noises of res_2s were stored in fp32 too.
REPLAY = {"rtol": 0.0, "atol": 1e-6}


class Replay:
    """The model of a stored run: gives its answers back and checks what it is asked."""

    def __init__(self, name: str) -> None:
        self.tensors = load_file(GOLDEN / "golden" / f"{name}.safetensors")
        self.calls = 0
        self.drawn = {"step": 0, "sub": 0}

    def denoise(self, x: State, sigma: float) -> Prediction:
        self._check_input(x, sigma)
        answers = [self.tensors[f"step_{stream}_x0"][self.calls] for stream in STREAMS]
        self.calls += 1
        return Prediction(self.blend(tuple(answers)))

    def noise(self, kind: str) -> State:
        step = self.drawn[kind]
        self.drawn[kind] += 1
        return tuple(self.tensors[f"in.noise.{step}.{kind}_{stream}"] for stream in STREAMS)

    def blend(self, x: State) -> State:
        if "state.video_clean" not in self.tensors:
            return x
        masks = [self.tensors[f"state.{stream}_denoise_mask"] for stream in STREAMS]
        cleans = [self.tensors[f"state.{stream}_clean"] for stream in STREAMS]
        return tuple(
            a * mask + clean * (1 - mask) for a, mask, clean in zip(x, masks, cleans, strict=True)
        )

    def start(self) -> State:
        first = "state.{}_latent" if "state.video_latent" in self.tensors else "in.{}_noise"
        return tuple(self.tensors[first.format(stream)] for stream in STREAMS)

    def final(self) -> State:
        video, audio = (self.tensors[f"{stream}_final"] for stream in STREAMS)
        if video.ndim == 5:  # conditioned runs store latents: (B,C,F,Y,X) and (B,C,T,mel)
            return video.flatten(2).mT, audio.transpose(1, 2).flatten(2)
        return video, audio

    def _check_input(self, x: State, sigma: float) -> None:
        if "step_sigmas" not in self.tensors:
            return
        assert sigma == pytest.approx(float(self.tensors["step_sigmas"][self.calls]), rel=1e-7)
        for stream, got in zip(STREAMS, x, strict=True):
            stored = self.tensors[f"step_{stream}_latents"][self.calls]
            torch.testing.assert_close(got, stored, **REPLAY)


RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("sampler_euler", "euler", {}),
    ("sampler_gradient_estimating", "euler_gradient", {}),
    ("sampler_res2s", "res_2s", {}),
    ("sampler_res2s_nobong_eta0", "res_2s", {"eta": 0.0, "bong": False}),
    *((name, "euler", {}) for name in ("guided_full", "guided_cfg_only", "guided_skip_step")),
    *(
        (f"cond_{name}", "euler", {})
        for name in (
            "image_in_place",
            "image_in_place_strength07_stage2",
            "keyframe",
            "keyframe_clip_strength08",
            "ic_lora_reference",
            "ic_lora_reference_attn05",
            "frozen_audio",
            "retake",
        )
    ),
]


@pytest.mark.parametrize("name, sampler, options", RUNS)
def test_reference_run_is_retraced(name: str, sampler: str, options: dict[str, Any]) -> None:
    run = Replay(name)
    sigmas = run.tensors["sigmas"]
    end = sample(sampler, run.start(), sigmas, Tools(run.denoise, run.noise, run.blend), options)
    for got, stored in zip(end, run.final(), strict=True):
        # Appended conditioning tokens come last; stored results have none.
        torch.testing.assert_close(got[:, : stored.shape[1]], stored, **REPLAY)
    assert run.calls == SAMPLERS[sampler].evaluations(len(sigmas) - 1)
    assert run.calls == len(run.tensors["step_video_x0"])


def test_every_sampler_run_of_the_manifest_is_replayed_here() -> None:
    manifest = json.loads((GOLDEN / "MANIFEST.json").read_text())
    names = {case["name"] for case in manifest["cases"]}
    prefixes = ("sampler_", "guided_", "cond_")
    assert {name for name in names if name.startswith(prefixes)} == {run[0] for run in RUNS}
