"""Trains the video VAE: single frames first, then clips of growing length, at two sizes.

What made it learn at all, by tiny-model.md 4: squares before absolute differences, weight on the
shape, own initialisation, noise on the latents.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.models.settings import Settings
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.training import recipe
from ltxlite.training.differentiable import decode, encode
from ltxlite.training.initial import start
from ltxlite.training.loop import CPU, Loop, Note, Pace, narrow_products, trained
from ltxlite.training.scene import draw, masks
from ltxlite.training.world import BACKGROUNDS, COLOURS, every_fact

PACE = Pace(steps=10000, rate=2e-3, decay=0.5, clip=0.5, matrix_rate=0.03)
POLISH = Pace(steps=1800, rate=5e-4, warmup=50, decay=0.9, clip=0.5, matrix_rate=0.01)
_LONGEST = 25
_RATES = (12.0, 16.0, 16.0, 16.0, 20.0, 24.0)
_NOISE = 0.1  # of latents whose deviation is about 1: errors of 4-bit networks do not show
_SCENES = 640  # of the smallest size that are painted anew again and again
_FREE_COLOURS = 0.3  # of the clips: any colour at all, so that new words can name new colours


@dataclass(frozen=True, slots=True)
class Batch:
    """Kinds of a batch: clips, their length and their size."""

    clips: int
    frames: int
    size: tuple[int, int]


_SMALL, _LARGE, _WIDE, _LARGE_WIDE = (64, 64), (128, 128), (64, 96), (128, 192)
# (from, batches): what is trained on from a part of the run on; sizes in equal shares of pixels.
_COURSE: tuple[tuple[float, tuple[Batch, ...]], ...] = (
    (0.0, (Batch(32, 1, _SMALL), Batch(12, 1, _LARGE))),
    (0.112, (Batch(10, 9, _SMALL), Batch(3, 9, _LARGE), Batch(32, 1, _SMALL))),
    (
        0.16,
        (
            Batch(6, 17, _SMALL),
            Batch(10, 9, _SMALL),
            Batch(2, 17, _LARGE),
            Batch(4, 17, _WIDE),
            Batch(6, 17, _SMALL),
            Batch(4, 25, _SMALL),
            Batch(2, 17, _LARGE),
            Batch(12, 1, _LARGE),
            Batch(6, 17, _SMALL),
            Batch(1, 17, _LARGE_WIDE),
        ),
    ),
    (
        0.32,  # single frames are sharp by now; what moves within a latent frame is not
        (
            Batch(6, 17, _SMALL),
            Batch(2, 17, _LARGE),
            Batch(4, 25, _SMALL),
            Batch(6, 17, _SMALL),
            Batch(2, 17, _LARGE),
            Batch(4, 17, _WIDE),
            Batch(6, 17, _SMALL),
            Batch(2, 17, _LARGE),
            Batch(10, 9, _SMALL),
            Batch(1, 17, _LARGE_WIDE),
        ),
    ),
)
_POLISHING = (Batch(2, 17, _LARGE), Batch(6, 17, _SMALL), Batch(2, 17, _LARGE), Batch(4, 17, _WIDE))
_FROZEN = 0.6  # of the run, after which the encoder stays: others already learn its latents


def build() -> tuple[VideoEncoder, VideoDecoder]:
    """Build both halves with initial weights."""
    config = VideoVAEConfig.from_settings(Settings(recipe.VAE, "recipe"))
    encoder, decoder = VideoEncoder(config), VideoDecoder(config)
    generator = torch.Generator().manual_seed(recipe.SEED)
    for network in (encoder, decoder):
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv3d):
                start(module, 0.36 if ".conv2." in name else 1.2, generator)
    return encoder, decoder


class Pool:
    """Coverage of many rendered scenes (N, F, H, W) uint8: painted anew whenever they are used."""

    def __init__(
        self, size: tuple[int, int], count: int, generator: torch.Generator, device: torch.device
    ) -> None:
        facts = every_fact()
        parts = []
        for _ in range(0, count, 16):
            picks = torch.randint(len(facts), (16,), generator=generator)
            scenes = draw([facts[pick] for pick in picks.tolist()], generator).to(device)
            rate = _RATES[int(torch.randint(len(_RATES), (1,), generator=generator))]
            parts.append((masks(scenes, size, _LONGEST, rate) * 255).round().to(torch.uint8))
        self.masks = torch.cat(parts)

    def sample(self, clips: int, frames: int, generator: torch.Generator) -> Tensor:
        """Return coverage (B, F, H, W) of some clips' consecutive frames."""
        picks = torch.randint(len(self.masks), (clips,), generator=generator).tolist()
        latest = _LONGEST - frames + 1
        firsts = torch.randint(latest, (clips,), generator=generator).tolist()
        pieces = [self.masks[n, i : i + frames] for n, i in zip(picks, firsts, strict=True)]
        return torch.stack(pieces).float() / 255


class Pools:
    """Pools of all sizes, each rendered when it is first needed.

    scenes: how many of the smallest size; larger ones have as many pixels together.
    device: where they are kept.
    """

    def __init__(self, scenes: int, device: torch.device) -> None:
        self.scenes, self.device = scenes, device
        self._made: dict[tuple[int, int], Pool] = {}

    def of(self, size: tuple[int, int]) -> Pool:
        """Return the pool of a size (height, width)."""
        if size not in self._made:
            generator = torch.Generator().manual_seed(recipe.SEED + size[0] * size[1])
            count = self.scenes * _SMALL[0] * _SMALL[1] // (size[0] * size[1])
            self._made[size] = Pool(size, max(16, count), generator, self.device)
        return self._made[size]


def painted(covered: Tensor, generator: torch.Generator) -> Tensor:
    """Colour masks (B, F, H, W) by chance: pixels (B, 3, F, H, W) in [-1, 1]."""
    count = len(covered)
    colours = _some(tuple(COLOURS.values()), count, generator)
    grounds = _some(tuple(BACKGROUNDS.values()), count, generator)
    colour, ground = (x.to(covered.device)[:, :, None, None, None] for x in (colours, grounds))
    return (ground + (colour - ground) * covered[:, None]) * 2 - 1


def _some(palette: tuple[tuple[float, ...], ...], count: int, generator: torch.Generator) -> Tensor:
    picks = torch.randint(len(palette), (count,), generator=generator)
    free = torch.rand(count, 1, generator=generator) < _FREE_COLOURS
    return torch.where(
        free, torch.rand(count, 3, generator=generator), torch.tensor(palette)[picks]
    )


def losses(made: Tensor, pixels: Tensor, covered: Tensor, sharp: float) -> dict[str, Tensor]:
    """Compare pixels (B, 3, F, H, W) with those made.

    covered: (B, F, H, W), where the weight is nine times as high.  sharp: 0 to 1, how much
    absolute differences and edges count; they come late, when nothing is left to average over.
    """
    weight = 1 + 8 * F.max_pool2d(covered, 5, 1, 2)[:, None]
    weight = weight / weight.mean()
    missed = made - pixels
    hue = missed - missed.mean(dim=1, keepdim=True)  # brightness comes by itself, hue does not
    found = {"square": (weight * (missed.square() + 2 * hue.square())).mean()}
    if sharp:
        found["absolute"] = 0.15 * sharp * (weight * missed.abs()).mean()
        edges = [
            (weight[..., 1:, 1:] * (_edges(made, axis) - _edges(pixels, axis)).abs()).mean()
            for axis in (-1, -2)
        ]
        found["edges"] = 0.15 * sharp * (edges[0] + edges[1])
    return found


def _edges(x: Tensor, axis: int) -> Tensor:
    moved = x[..., 1:, :-1] if axis == -2 else x[..., :-1, 1:]
    return moved - x[..., :-1, :-1]


class VideoVAETraining:
    """The loop's parts: networks, pools of scenes, one step."""

    until = 1.0  # of the run

    def __init__(
        self, folder: Path, pace: Pace = PACE, device: torch.device = CPU, scenes: int = _SCENES
    ) -> None:
        self.encoder, self.decoder = build()
        networks = {"encoder": self.encoder, "decoder": self.decoder}
        self.loop = Loop("video_vae", folder, networks, pace, device)
        self.pools = Pools(scenes, device)

    def run(self, note: Note) -> None:
        """Train to the end."""
        for step in self.loop.steps(note, self.until):
            self.loop.learn(self.losses(step), note)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Compute the losses of a step's batch."""
        generator, progress = self.loop.generator, self.loop.pace.progress(step)
        batches = [batches for begin, batches in _COURSE if progress >= begin][-1]
        batch = batches[step % len(batches)]
        covered = self.pools.of(batch.size).sample(batch.clips, batch.frames, generator)
        pixels = painted(covered, generator)
        if progress >= _FROZEN:
            self.encoder.requires_grad_(False)
        with narrow_products(self.loop.device):
            latent = encode(self.encoder, pixels).float()
            noise = torch.randn(latent.shape, generator=generator).to(self.loop.device)
            made = decode(self.decoder, latent + _NOISE * noise).float()
        sharp = min(1.0, max(0.0, (progress - 0.16) / 0.24))
        found = losses(made, pixels, covered, sharp)
        found["latent"] = 1e-3 * latent.square().mean()
        return found


class VideoEncoderTraining(VideoVAETraining):
    """The same run, as far as the encoder learns; `VideoVAETraining` goes on with it."""

    until = _FROZEN


class VideoDecoderTraining:
    """The decoder alone, gone on with: the encoder is known by now, edges and flat grounds are not.

    Reads the state of `VideoVAETraining` in the same folder.
    """

    def __init__(
        self, folder: Path, pace: Pace = POLISH, device: torch.device = CPU, scenes: int = _SCENES
    ) -> None:
        self.encoder, self.decoder = build()
        state = folder / "video_vae.state.safetensors"
        trained(state, "encoder", self.encoder)
        trained(state, "decoder", self.decoder)
        self.decoder.requires_grad_(True)
        self.loop = Loop("video_decoder", folder, {"decoder": self.decoder}, pace, device)
        self.encoder.to(device)
        self.pools = Pools(scenes, device)

    def run(self, note: Note) -> None:
        """Train to the end."""
        for step in self.loop.steps(note):
            self.loop.learn(self.losses(step), note)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Compute the losses of a step's batch; edges and absolute differences count twice."""
        generator, batch = self.loop.generator, _POLISHING[step % len(_POLISHING)]
        covered = self.pools.of(batch.size).sample(batch.clips, batch.frames, generator)
        pixels = painted(covered, generator)
        with narrow_products(self.loop.device):
            with torch.no_grad():
                latent = encode(self.encoder, pixels).float()
            noise = torch.randn(latent.shape, generator=generator).to(self.loop.device)
            made = decode(self.decoder, latent + _NOISE * noise).float()
        return losses(made, pixels, covered, 2.0)
