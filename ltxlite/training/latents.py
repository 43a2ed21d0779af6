"""Encodes scenes once, so that the transformer and the upscalers learn from latents alone."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltxlite.geometry import AudioGrid
from ltxlite.media.atomic import written_beside
from ltxlite.models.audio_vae import AudioEncoder
from ltxlite.models.video_vae import VideoEncoder
from ltxlite.training import audio_vae, recipe, video_vae
from ltxlite.training.differentiable import encode
from ltxlite.training.loop import Note, narrow_products, trained
from ltxlite.training.scene import draw, pictures, spectrograms
from ltxlite.training.world import Facts, every_fact, is_held_out


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of clip: size in pixels, frames, frames a second, how many.

    spread: of the scenes' chance, as `draw` takes it.
    """

    height: int
    width: int
    frames: int
    fps: float
    count: int
    spread: float = 1.0

    @property
    def name(self) -> str:
        """The name of its tensors."""
        narrow = "" if self.spread == 1 else f"~{self.spread:g}"
        return f"{self.height}x{self.width}x{self.frames}@{self.fps:g}{narrow}"

    @property
    def sound(self) -> int:
        """Audio latents of a clip."""
        return AudioGrid().latent_frames(self.frames, self.fps)


NARROW = 0.4
KINDS = (
    Kind(64, 64, 17, 16, 3072),
    Kind(128, 128, 17, 16, 640),
    Kind(64, 96, 17, 16, 384),
    Kind(64, 64, 25, 16, 256),
    Kind(64, 64, 9, 16, 256),
    Kind(64, 64, 17, 12, 256),
    Kind(64, 64, 17, 24, 256),
    Kind(128, 192, 17, 16, 96),
    Kind(128, 128, 25, 16, 96),
    Kind(64, 64, 17, 16, 3072, NARROW),
    Kind(128, 128, 17, 16, 768, NARROW),
    Kind(64, 96, 17, 16, 192, NARROW),
    Kind(64, 64, 25, 16, 192, NARROW),
    Kind(64, 64, 9, 16, 128, NARROW),
    Kind(64, 64, 17, 12, 128, NARROW),
    Kind(64, 64, 17, 24, 128, NARROW),
    Kind(128, 192, 17, 16, 64, NARROW),
)
FILE = "latents.safetensors"
_PART = 16
_STATISTICS = 2048  # clips whose latents set the scale


@dataclass(frozen=True, slots=True)
class Latents:
    """Clips of one kind: facts by index, raw video latents, raw audio latents."""

    kind: Kind
    facts: Tensor
    video: Tensor
    audio: Tensor


def write_latents(folder: Path, device: torch.device, note: Note) -> Path:
    """Encode clips with the encoders in a folder, kind by kind; goes on after a kill."""
    from safetensors.torch import load_file, save_file

    path = folder / FILE
    tensors: dict[str, Tensor] = load_file(path) if path.is_file() else {}
    video, _ = video_vae.build()
    audio, _ = audio_vae.build()
    trained(folder / "video_vae.state.safetensors", "encoder", video)
    trained(folder / "audio_vae.state.safetensors", "encoder", audio)
    encoders = Encoders(video.to(device), audio.to(device), device)
    known = [index for index, facts in enumerate(every_fact()) if not is_held_out(facts)]
    for number, kind in enumerate(KINDS):
        if f"{kind.name}.video" in tensors:
            continue
        generator = torch.Generator().manual_seed(recipe.SEED * 100 + number)
        picks = torch.randint(len(known), (kind.count,), generator=generator)
        index = torch.tensor(known)[picks]
        parts = [
            encoders.encoded(kind, [every_fact()[i] for i in part.tolist()], generator)
            for part in index.split(_PART)
        ]
        tensors[f"{kind.name}.facts"] = index
        tensors[f"{kind.name}.video"] = torch.cat([part[0] for part in parts]).contiguous()
        tensors[f"{kind.name}.audio"] = torch.cat([part[1] for part in parts]).contiguous()
        with written_beside(path) as unfinished:
            save_file(tensors, unfinished)
        note(f"latents: {kind.count} clips of {kind.name}")
    return path


@dataclass(frozen=True, slots=True)
class Encoders:
    """What turns scenes into latents, and where."""

    video: VideoEncoder
    audio: AudioEncoder
    device: torch.device

    @torch.no_grad()
    def encoded(
        self, kind: Kind, facts: list[Facts], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Render scenes of a kind and encode them; the latents come back to the CPU."""
        scenes = draw(facts, generator, kind.spread).to(self.device)
        pixels = pictures(scenes, (kind.height, kind.width), kind.frames, kind.fps)
        sounds = spectrograms(scenes, 4 * kind.sound - 3)
        with narrow_products(self.device):
            pair = encode(self.video, pixels), self.audio(sounds)
        return pair[0].float().cpu(), pair[1].float().cpu()


def read_latents(folder: Path) -> dict[str, Latents]:
    """Read what `write_latents` wrote so far, by the names of kinds."""
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE)
    found = {}
    for kind in KINDS:
        if f"{kind.name}.video" in tensors:
            parts = [tensors[f"{kind.name}.{part}"] for part in ("facts", "video", "audio")]
            found[kind.name] = Latents(kind, *parts)
    return found


@dataclass(frozen=True, slots=True)
class Scale:
    """Means and deviations of latents: video (C,), audio (C M,) by channel and bin."""

    video_mean: Tensor
    video_std: Tensor
    audio_mean: Tensor
    audio_std: Tensor

    @classmethod
    def of(cls, latents: Latents) -> "Scale":
        """Measure the scale of raw latents."""
        video, audio = latents.video[:_STATISTICS], latents.audio[:_STATISTICS]
        axes = (0, 2, 3, 4)
        return cls(
            video.mean(dim=axes),
            video.std(dim=axes),
            audio.mean(dim=(0, 2)).flatten(),
            audio.std(dim=(0, 2)).flatten().clamp(min=1e-3),
        )

    def video(self, raw: Tensor) -> Tensor:
        """Normalise raw video latents (B, C, F, Y, X)."""
        mean, std = (x.view(-1, 1, 1, 1) for x in (self.video_mean, self.video_std))
        return (raw - mean) / std

    def audio(self, raw: Tensor) -> Tensor:
        """Normalise raw audio latents (B, C, T, M)."""
        shape = (raw.shape[1], 1, raw.shape[3])
        return (raw - self.audio_mean.view(shape)) / self.audio_std.view(shape)
