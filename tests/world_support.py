"""The shipped world model, for tests that ask what numbers cannot: does a clip still say it?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxlite import conditioning
from ltxlite.conditioning import LatentState
from ltxlite.demo import world_files
from ltxlite.denoise import Denoiser, Prompt, Stream
from ltxlite.encode import Contexts, encode_prompts
from ltxlite.geometry import (
    AudioGrid,
    ClipShape,
    LatentGrid,
    audio_positions,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
    video_positions,
)
from ltxlite.models.mel import HOP, SAMPLE_RATE, log_mel
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.request import Files
from ltxlite.sampling.contract import Tools
from ltxlite.sampling.noise import initial_noise
from ltxlite.sampling.samplers import sample
from ltxlite.sampling.schedules import TABLES, Schedule
from ltxlite.sampling.settings import Guidance
from ltxlite.training import scene
from ltxlite.training.latents import NARROW
from ltxlite.training.measure import Hearing, Sight, listen, look
from ltxlite.training.world import Facts

FPS, FRAMES, SIDE = 16.0, 17, 64


def world_networks() -> Networks:
    """Open the shipped files."""
    return open_networks(Files(str(world_files().model.parent)), "cpu", "float32")


@dataclass(frozen=True, slots=True)
class Made:
    """What sampling gave: normalised latents (1, C, F, Y, X) and (1, C, T, M)."""

    video: Tensor
    audio: Tensor


class World:
    """Everything of the shipped model, loaded once."""

    def __init__(self) -> None:
        self.networks = world_networks()
        self.transformer = self.networks.transformer()
        self.encoder, self.decoder = self.networks.video_encoder(), self.networks.video_decoder()
        self.hearing, self.sounding = self.networks.audio_encoder(), self.networks.audio_decoder()
        sound = AudioGrid().latent_frames(FRAMES, FPS)
        self.shape = ClipShape(LatentGrid().latent_frames(FRAMES), 2, 2, sound, FPS)

    def contexts(self, caption: str) -> Contexts:
        """Encode a caption."""
        return encode_prompts(self.networks, [caption], lambda _: None)[0]

    def states(self, video: Tensor | None = None, audio: Tensor | None = None) -> list[LatentState]:
        """Begin both streams from latents, zeros where none are given."""
        shape = self.shape
        size = (shape.frames, shape.rows, shape.columns)
        video = torch.zeros(1, 32, *size) if video is None else video
        audio = torch.zeros(1, 2, shape.audio_frames, 16) if audio is None else audio
        return [
            conditioning.start(patchify_video(video), video_positions(size, FPS, LatentGrid())),
            conditioning.start(
                patchify_audio(audio), audio_positions(shape.audio_frames, AudioGrid())
            ),
        ]

    def denoised(
        self,
        states: list[LatentState],
        contexts: Contexts,
        seed: int = 0,
        sigmas: Schedule = TABLES["distilled"],
    ) -> Made:
        """Noise the states and denoise them along a schedule."""
        video, audio = states
        denoiser = Denoiser(
            self.transformer,
            Stream(video, Prompt(contexts.video), Guidance()),
            Stream(audio, Prompt(contexts.audio), Guidance()),
        )
        noises = initial_noise([state.initial.shape for state in states], seed, torch.device("cpu"))
        x = tuple(s.noised(noise, sigmas[0]) for s, noise in zip(states, noises, strict=True))
        tools = Tools(denoiser, lambda _: x, denoiser.blend)
        final = sample("euler", x, sigmas, tools)
        return Made(
            unpatchify_video(final[0], self.shape),
            unpatchify_audio(final[1], self.shape.audio_frames, 2),
        )

    def seen(self, made: Made) -> Sight:
        """Measure the picture."""
        return look(self.decoder(made.video)[0].transpose(0, 1), FPS)

    def heard(self, made: Made) -> Hearing:
        """Measure the sound, before the vocoder plays it."""
        return listen(self.sounding(made.audio)[0])

    def encoded(self, facts: Facts, seed: int) -> Made:
        """Draw a scene as the model knows them and encode it."""
        scenes = scene.draw([facts], torch.Generator().manual_seed(seed), NARROW)
        frames = 4 * self.shape.audio_frames - 3
        sound = log_mel(scene.sounds(scenes, (frames - 1) * HOP), SAMPLE_RATE)
        pixels = scene.pictures(scenes, (SIDE, SIDE), FRAMES, FPS)
        return Made(self.encoder(pixels), self.hearing(sound))
