"""Training away from the CPU: the same clips and steps, and nothing that was left behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from away_device import AWAY, elsewhere
from safetensors.torch import load_file
from test_training import quiet
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltxlite.training import audio_vae, latents, new_word, transformer, upscaler, video_vae, vocoder
from ltxlite.training.latents import NARROW, Kind
from ltxlite.training.loop import CPU, Loop, Pace

PACE = Pace(steps=3, rate=2e-3, warmup=2, matrix_rate=0.02)
FEW = (Kind(64, 64, 9, 16, 8), Kind(64, 64, 9, 16, 4, NARROW))


def picture(folder: Path, device: torch.device) -> video_vae.VideoVAETraining:
    return video_vae.VideoVAETraining(folder, PACE, device, scenes=16)


def decoder(folder: Path, device: torch.device) -> video_vae.VideoDecoderTraining:
    picture(folder, CPU).loop.save()
    return video_vae.VideoDecoderTraining(folder, PACE, device, scenes=16)


def sound(folder: Path, device: torch.device) -> audio_vae.AudioVAETraining:
    return audio_vae.AudioVAETraining(folder, PACE, device)


def player(folder: Path, device: torch.device) -> vocoder.VocoderTraining:
    sound(folder, CPU).loop.save()
    return vocoder.VocoderTraining(folder, PACE, device)


def enlarger(folder: Path, device: torch.device) -> upscaler.UpscalerTraining:
    picture(folder, CPU).loop.save()
    return upscaler.UpscalerTraining(folder, PACE, device)


def denoiser(folder: Path, device: torch.device) -> transformer.TransformerTraining:
    picture(folder, CPU).loop.save()
    sound(folder, CPU).loop.save()
    latents.write_latents(folder, device, quiet)
    return transformer.TransformerTraining(folder, PACE, device)


# Torch thinks that the device has no values; it has.
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize("part", [picture, decoder, sound, player, enlarger, denoiser])
def test_a_run_elsewhere_sees_the_same_clips_and_goes_on_here(
    part: Callable[[Path, torch.device], video_vae.VideoVAETraining],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latents, "KINDS", FEW)
    monkeypatch.setattr(upscaler, "_PAIRS", 16)
    found: dict[torch.device, tuple[list[float], dict[str, Tensor]]] = {}
    # Torch chooses attention by device: the plain one, for both.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), elsewhere(monkeypatch):
        for device in (CPU, AWAY):
            folder = tmp_path / device.type
            training = part(folder, device)
            assert {value.device for value in training.loop.parameters.values()} == {device}
            found[device] = steps(training.loop, training.losses), training.loop._state()
            training.loop.save()
        # The same arithmetic, so the same numbers, to the last bit.
        assert found[CPU][0] == found[AWAY][0]
        for name, value in found[CPU][1].items():
            assert torch.equal(found[AWAY][1][name], value), name
        for device in (CPU, AWAY):
            other = part(tmp_path / device.type, AWAY if device == CPU else CPU).loop
            other.resume(quiet)
            for name, value in other._state().items():
                assert torch.equal(found[device][1][name], value), name


def test_a_word_is_learned_elsewhere_as_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_word, "_KIND", replace(new_word._KIND, count=16, frames=9))
    pace, files = Pace(steps=2, rate=2e-3, warmup=2), []
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), elsewhere(monkeypatch):
        for device in (CPU, AWAY):
            folder = tmp_path / device.type
            word = new_word.WordTraining(folder, "orange", (0.9, 0.5, 0.1), None, pace, device)
            files.append(word.run(quiet))
    here, away = (load_file(file) for file in files)
    assert here.keys() == away.keys()
    assert all(torch.equal(away[name], value) for name, value in here.items())


def steps(loop: Loop, losses: Callable[[int], dict[str, Tensor]]) -> list[float]:
    """Take all steps of the pace but one; return every loss."""
    listed = []
    for step in range(loop.pace.steps - 1):
        values = losses(step)
        listed += [float(value.detach()) for value in values.values()]
        loop.learn(values, quiet)
    return listed


def test_what_was_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere(monkeypatch) as device, pytest.raises(RuntimeError, match="two devices"):
        torch.ones(2).to(device) + torch.ones(2)
