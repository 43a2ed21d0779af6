"""Trains the latent upscalers: the same scenes encoded at both sizes, or at both frame rates."""

from pathlib import Path

import torch
from torch import Tensor

from ltxlite.media.atomic import written_beside
from ltxlite.models.settings import Settings
from ltxlite.models.upscaler import LatentUpscaler, UpscalerConfig
from ltxlite.training import recipe, video_vae
from ltxlite.training.audio_vae import some_scenes
from ltxlite.training.differentiable import encode, upscale
from ltxlite.training.initial import start
from ltxlite.training.loop import CPU, Loop, Note, Pace, narrow_products, trained
from ltxlite.training.scene import pictures

PACE = Pace(steps=6000, rate=2e-3, decay=0.5)
_PAIRS = 384
_BATCH = 16
_NOISE = 0.15  # of what comes in, in units of its deviation: the first stage's latents have errors
_PART = 16
_SIZE = (64, 64)
_FRAMES, _FPS = 17, 16.0


def build(temporal: bool) -> LatentUpscaler:
    """Build an upscaler with initial weights."""
    settings = recipe.TEMPORAL_UPSCALER if temporal else recipe.UPSCALER
    network = LatentUpscaler(UpscalerConfig.from_settings(Settings(settings, "recipe")))
    generator = torch.Generator().manual_seed(recipe.SEED)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d):
            start(module, 1.0, generator)
    return network


@torch.no_grad()
def write_pairs(folder: Path, temporal: bool, device: torch.device, note: Note) -> Path:
    """Encode scenes twice: small and large, or at half and at full rate."""
    from safetensors.torch import save_file

    path = folder / ("pairs_time.safetensors" if temporal else "pairs_space.safetensors")
    if path.is_file():
        return path
    encoder, _ = video_vae.build()
    trained(folder / "video_vae.state.safetensors", "encoder", encoder)
    encoder.to(device)
    generator = torch.Generator().manual_seed(recipe.SEED)
    before, after = [], []
    for _ in range(0, _PAIRS, _PART):
        scenes = some_scenes(_PART, generator).to(device)
        if temporal:
            kinds = ((_SIZE, 17, _FPS / 2), (_SIZE, 33, _FPS))
        else:
            kinds = ((_SIZE, _FRAMES, _FPS), ((128, 128), _FRAMES, _FPS))
        with narrow_products(device):
            pair = [encode(encoder, pictures(scenes, *kind)).float().cpu() for kind in kinds]
        before.append(pair[0])
        after.append(pair[1])
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as unfinished:
        save_file({"before": _joined(before), "after": _joined(after)}, unfinished)
    note(f"upscaler: {_PAIRS} pairs in {path}")
    return path


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).contiguous()


class UpscalerTraining:
    """The loop's parts: the network, the pairs, one step."""

    temporal = False

    def __init__(self, folder: Path, pace: Pace = PACE, device: torch.device = CPU) -> None:
        from safetensors.torch import load_file

        self.upscaler = build(self.temporal)
        name = "upscaler_time" if self.temporal else "upscaler"
        self.loop = Loop(name, folder, {"upscaler": self.upscaler}, pace, device)
        pairs = load_file(write_pairs(folder, self.temporal, device, print))
        self.before, self.after = (pairs[part].to(device) for part in ("before", "after"))
        self.deviation = self.after.std(dim=(0, 2, 3, 4)).view(-1, 1, 1, 1)

    def run(self, note: Note) -> None:
        """Train to the end."""
        for step in self.loop.steps(note):
            self.loop.learn(self.losses(step), note)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Compute the loss of a step's batch, in units of the latents' deviation."""
        generator, device = self.loop.generator, self.loop.device
        picks = torch.randint(len(self.before), (_BATCH,), generator=generator).to(device)
        given = self.before[picks]
        noise = torch.randn(given.shape, generator=generator).to(device)
        strength = _NOISE * torch.rand(_BATCH, 1, 1, 1, 1, generator=generator).to(device)
        with narrow_products(device):
            made = upscale(self.upscaler, given + strength * self.deviation * noise).float()
        return {"square": ((made - self.after[picks]) / self.deviation).square().mean()}


class TemporalUpscalerTraining(UpscalerTraining):
    """The same for twice the frames."""

    temporal = True
