"""Trains the audio VAE on spectrograms of the world's sounds."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ltxlite.models.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from ltxlite.models.settings import Settings
from ltxlite.training import recipe
from ltxlite.training.initial import start
from ltxlite.training.loop import CPU, Loop, Note, Pace, narrow_products
from ltxlite.training.scene import Scenes, draw, spectrograms
from ltxlite.training.world import every_fact

PACE = Pace(steps=1600, rate=1.5e-3, decay=0.5, matrix_rate=0.02)
_BATCH = 4
_LENGTHS = (14, 27, 27, 40)  # latents: 0.56, 1.06 and 1.56 s
_NOISE = 0.1


def build() -> tuple[AudioEncoder, AudioDecoder]:
    """Build both halves with initial weights."""
    config = AudioVAEConfig.from_settings(Settings(recipe.AUDIO_VAE, "recipe"))
    encoder, decoder = AudioEncoder(config), AudioDecoder(config)
    generator = torch.Generator().manual_seed(recipe.SEED)
    for network in (encoder, decoder):
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                start(module, 0.3 if ".conv2." in name else 1.2, generator)
    return encoder, decoder


def some_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Draw scenes of any facts."""
    facts = every_fact()
    picks = torch.randint(len(facts), (count,), generator=generator).tolist()
    return draw([facts[pick] for pick in picks], generator)


class AudioVAETraining:
    """The loop's parts: networks and one step."""

    def __init__(self, folder: Path, pace: Pace = PACE, device: torch.device = CPU) -> None:
        self.encoder, self.decoder = build()
        networks = {"encoder": self.encoder, "decoder": self.decoder}
        self.loop = Loop("audio_vae", folder, networks, pace, device)

    def run(self, note: Note) -> None:
        """Train to the end."""
        for step in self.loop.steps(note):
            self.loop.learn(self.losses(step), note)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Compute the losses of a step's batch: squares, later absolute differences too."""
        generator, device = self.loop.generator, self.loop.device
        latents = _LENGTHS[step % len(_LENGTHS)]
        sounds = spectrograms(some_scenes(_BATCH, generator).to(device), 4 * latents - 3)
        with narrow_products(device):
            latent = self.encoder(sounds).float()
            noise = torch.randn(latent.shape, generator=generator).to(device)
            made = self.decoder(latent + _NOISE * noise).float()
        found = {"square": 0.3 * (made - sounds).square().mean()}
        if self.loop.pace.progress(step) > 0.4:
            found["absolute"] = 0.3 * (made - sounds).abs().mean()
        found["latent"] = 1e-3 * latent.square().mean()
        return found
