"""Asks a model in training what it knows: captions it never saw, sampled, decoded and measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ltxlite.geometry import AudioGrid, LatentGrid, audio_positions, video_positions
from ltxlite.models.passes import Pass, StreamInput, Timesteps
from ltxlite.sampling.schedules import TABLES, Schedule
from ltxlite.training import audio_vae, upscaler, video_vae
from ltxlite.training.differentiable import decode, upscale
from ltxlite.training.latents import Kind, Scale, read_latents
from ltxlite.training.loop import trained
from ltxlite.training.measure import Hearing, Sight, facts_of, listen, look, together
from ltxlite.training.text import CaptionRows, full_contexts
from ltxlite.training.transformer import build, velocities
from ltxlite.training.world import Facts


@dataclass(frozen=True, slots=True)
class Sample:
    """A clip that was made: normalised latents, frames (F, 3, H, W), log-mel (2, T, 64)."""

    video: Tensor
    audio: Tensor
    frames: Tensor
    spectrogram: Tensor


class Trial:
    """The networks in a folder, as far as they are trained."""

    def __init__(self, folder: Path) -> None:
        self.transformer, self.path = build()
        state = folder / "transformer.state.safetensors"
        trained(state, "transformer", self.transformer)
        for name, network in self.path.networks().items():
            trained(state, name, network)
        self.rows = CaptionRows(self.path)
        self.scale = Scale.of(next(iter(read_latents(folder).values())))
        _, self.decoder = video_vae.build()
        trained(folder / "video_decoder.state.safetensors", "decoder", self.decoder)
        _, self.sound = audio_vae.build()
        trained(folder / "audio_vae.state.safetensors", "decoder", self.sound)
        self.upscaler = upscaler.build(temporal=False)
        if (folder / "upscaler.state.safetensors").is_file():
            trained(folder / "upscaler.state.safetensors", "upscaler", self.upscaler)

    @torch.no_grad()
    def sample(self, captions: Sequence[str], kind: Kind, seed: int = 0) -> list[list[Sample]]:
        """Make clips in two stages: for each stage, a sample of every caption."""
        contexts = full_contexts(self.path, self.rows.of(captions))
        generator = torch.Generator().manual_seed(seed)
        size = (kind.frames // 8 + 1, kind.height // 32, kind.width // 32)
        video = torch.randn(len(captions), size[0] * size[1] * size[2], 32, generator=generator)
        audio = torch.randn(len(captions), kind.sound, 32, generator=generator)
        video, audio = self._denoise((video, audio), contexts, TABLES["distilled"], (kind, size))
        first = self._decoded(video, audio, size)
        mean, std = (x.view(-1, 1, 1, 1) for x in (self.scale.video_mean, self.scale.video_std))
        latent = video.transpose(1, 2).unflatten(2, size) * std + mean
        large = (upscale(self.upscaler, latent) - mean) / std
        size = (size[0], 2 * size[1], 2 * size[2])
        start = TABLES["stage2"][0]
        given = [large.flatten(2).transpose(1, 2), audio]
        noisy = [torch.lerp(x, torch.randn(x.shape, generator=generator), start) for x in given]
        video, audio = self._denoise((noisy[0], noisy[1]), contexts, TABLES["stage2"], (kind, size))
        return [first, self._decoded(video, audio, size)]

    def _denoise(
        self,
        state: tuple[Tensor, Tensor],
        contexts: tuple[Tensor, Tensor],
        sigmas: Schedule,
        shape: tuple[Kind, tuple[int, int, int]],
    ) -> tuple[Tensor, Tensor]:
        kind, size = shape
        places = (
            video_positions(size, kind.fps, LatentGrid()),
            audio_positions(kind.sound, AudioGrid()),
        )
        ropes = [self.transformer.rope(place, bool(n)) for n, place in enumerate(places)]
        for sigma, following in pairwise(sigmas):
            level = torch.full((len(state[0]),), sigma)
            index = torch.zeros(len(level), 1, dtype=torch.long)
            inputs = [
                StreamInput(x, level, Timesteps(level[:1], index), place, context, rope=rope)
                for x, place, context, rope in zip(state, places, contexts, ropes, strict=True)
            ]
            made = velocities(self.transformer, Pass(inputs[0], inputs[1]))
            assert made.video is not None and made.audio is not None
            step = following - sigma
            state = (state[0] + step * made.video, state[1] + step * made.audio)
        return state

    def _decoded(self, video: Tensor, audio: Tensor, size: tuple[int, int, int]) -> list[Sample]:
        mean, std = (x.view(-1, 1, 1, 1) for x in (self.scale.video_mean, self.scale.video_std))
        latent = video.transpose(1, 2).unflatten(2, size)
        frames = decode(self.decoder, latent * std + mean).transpose(1, 2)
        wide = audio.unflatten(2, (-1, 16)).transpose(1, 2)
        shape = (wide.shape[1], 1, 16)
        sound = wide * self.scale.audio_std.view(shape) + self.scale.audio_mean.view(shape)
        mels = self.sound(sound)
        return [Sample(video[n], audio[n], frames[n], mels[n]) for n in range(len(video))]


def judged(sample: Sample, fps: float) -> tuple[Facts, Sight, Hearing]:
    """Measure a sample."""
    sight, hearing = look(sample.frames, fps), listen(sample.spectrogram)
    return facts_of(sight, hearing), sight, hearing


def score(wanted: Sequence[Facts], samples: Sequence[Sample], fps: float) -> dict[str, float]:
    """Return the share of clips right in each attribute; for those that pulse, in both streams."""
    found: dict[str, list[float]] = {}
    for facts, sample in zip(wanted, samples, strict=True):
        seen, sight, hearing = judged(sample, fps)
        for name, right in facts.agreement(seen).items():
            found.setdefault(name, []).append(right)
        found.setdefault("visible rhythm", []).append(sight.rhythm == facts.rhythm)
        if facts.rhythm == "pulsing":
            found.setdefault("together", []).append(together(sight, hearing, fps))
    return {name: sum(values) / len(values) for name, values in found.items()}
