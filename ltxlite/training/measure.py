"""Reads the facts back out of a clip: what is seen, where it goes, what is heard."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxlite.models import mel
from ltxlite.training.scene import OVERTONES, Outline, coverage, pixel_middles
from ltxlite.training.world import BACKGROUNDS, COLOURS, SHAPES, TONES, Facts, Rgb

_PULSE_SPREAD = 0.12  # of the size seen or the level heard, above which something pulses
_EDGE = 4  # mel frames at both ends that see the mirrored sound beyond them
# What a shape may look like: a ring drawn with too broad a band is a ring.
_OUTLINES = (*(Outline(number) for number in range(len(SHAPES))), Outline(2, hole=0.4))
_SILENCE = 1e-6  # mean of what may count as something


@dataclass(frozen=True, slots=True)
class Sight:
    """What a picture shows.

    sizes: (F,) pixels covered in each frame.  velocity: (2,) columns and rows a second, in units
    of the shorter side.  contrast: distance of colour and background, 0 where nothing is seen.
    """

    colour: str
    shape: str
    direction: str
    background: str
    rhythm: str
    sizes: Tensor
    velocity: Tensor
    contrast: float


@dataclass(frozen=True, slots=True)
class Hearing:
    """What a sound is like.  levels: (T,) loudness of each mel frame, 100 a second."""

    tone: str
    rhythm: str
    levels: Tensor


def facts_of(sight: Sight, hearing: Hearing) -> Facts:
    """Put together what was seen and heard; the rhythm is the sound's."""
    return Facts(
        sight.colour,
        sight.shape,
        sight.direction,
        sight.background,
        hearing.tone,
        hearing.rhythm,
    )


def look(frames: Tensor, fps: float) -> Sight:
    """Measure a picture: frames (F, 3, H, W) in [-1, 1]."""
    pixels = frames.float().clamp(-1, 1).movedim(1, -1) * 0.5 + 0.5  # (F, H, W, 3)
    ground = _border(pixels).median(dim=0).values
    background, _ = _nearest(ground, BACKGROUNDS)
    away = (pixels - ground).norm(dim=-1)
    contrast = float(away.flatten().quantile(0.98))
    core = pixels[away > 0.75 * contrast]
    colour, _ = _nearest(core.median(dim=0).values if len(core) else ground, COLOURS)
    seen = (away / max(contrast, 0.05)).clamp(0, 1)
    seen = torch.where(seen > 0.35, seen, 0)
    sizes = seen.sum(dim=(1, 2))
    velocity = _velocity(seen, fps)
    return Sight(
        colour=colour,
        shape=_shape(seen),
        direction=_direction(velocity),
        background=background,
        rhythm="pulsing" if _spread(sizes) > _PULSE_SPREAD else "steady",
        sizes=sizes,
        velocity=velocity,
        contrast=contrast,
    )


def listen(spectrogram: Tensor) -> Hearing:
    """Measure a log-mel spectrogram (2, T, 64)."""
    energy = spectrogram.float().exp().mean(dim=0)  # (T, 64)
    levels = energy.square().sum(dim=1).sqrt()  # faint noise in many bins counts little
    loud = energy[levels >= levels.median()].mean(dim=0)
    return Hearing(
        tone=max(TONES, key=lambda name: _likeness(loud, TONES[name])),
        rhythm="pulsing" if _spread(levels[_EDGE:-_EDGE]) > 2 * _PULSE_SPREAD else "steady",
        levels=levels,
    )


def listen_to(waveform: Tensor, rate: int) -> Hearing:
    """Measure a waveform (2, N)."""
    return listen(mel.log_mel(waveform[None].float(), rate)[0])


def together(sight: Sight, hearing: Hearing, fps: float) -> float:
    """Return the correlation of size and loudness over time, -1 to 1: do they pulse as one?"""
    times = torch.arange(len(sight.sizes)) / fps
    at = (times * mel.SAMPLE_RATE / mel.HOP).round().long().clamp(max=len(hearing.levels) - 1)
    pair = torch.stack([sight.sizes.float(), hearing.levels[at].float()])
    return float(torch.corrcoef(pair)[0, 1].nan_to_num())


def _border(pixels: Tensor) -> Tensor:
    sides = (pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1])
    return torch.cat([side.flatten(0, 1) for side in sides])


def _nearest(colour: Tensor, palette: Mapping[str, Rgb]) -> tuple[str, float]:
    distances = {
        name: float((colour - torch.tensor(value)).norm()) for name, value in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]


def _spread(values: Tensor) -> float:
    """Return the standard deviation in units of the mean."""
    if len(values) < 2:
        return 0.0
    return float(values.std() / values.mean().clamp(min=_SILENCE))


def _centres(seen: Tensor) -> Tensor:
    total = seen.sum(dim=(1, 2)).clamp(min=1e-6)
    middles = pixel_middles(*seen.shape[1:])
    return torch.stack([(seen * axis).sum(dim=(1, 2)) / total for axis in middles], dim=-1)


def _velocity(seen: Tensor, fps: float) -> Tensor:
    """Fit a line through the middles of what is seen."""
    times = torch.arange(len(seen)) / fps
    times = times - times.mean()
    return (times[:, None] * _centres(seen)).sum(dim=0) / times.square().sum().clamp(min=1e-9)


def _direction(velocity: Tensor) -> str:
    across, down = (float(part) for part in velocity)
    if abs(across) >= abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


def _shape(seen: Tensor) -> str:
    """Lay each outline, equally large, over the frames where most is seen; the best fit wins."""
    sizes = seen.sum(dim=(1, 2))
    chosen = seen[sizes >= sizes.quantile(0.6)]
    side = min(seen.shape[1:])
    columns, rows = pixel_middles(*seen.shape[1:])
    x, y = _centres(chosen)[:, :, None, None].unbind(1)
    covered = chosen.sum(dim=(1, 2)) / side**2
    fits = []
    for outline in _OUTLINES:
        radius = (covered / outline.area).sqrt()[:, None, None]
        template = coverage(outline, columns - x, rows - y, radius, 1 / side)
        both, either = torch.minimum(template, chosen), torch.maximum(template, chosen)
        fits.append(float((both.sum(dim=(1, 2)) / either.sum(dim=(1, 2))).mean()))
    return SHAPES[_OUTLINES[fits.index(max(fits))].shape]


def _likeness(spectrum: Tensor, pitch: int) -> float:
    """Return the cosine of a mean mel spectrum (64,) and that of a tone."""
    return float(torch.cosine_similarity(spectrum, _spectra()[pitch], dim=0))


def _spectra() -> dict[int, Tensor]:
    times = torch.arange(mel.SAMPLE_RATE // 4) / mel.SAMPLE_RATE
    found = {}
    for pitch in TONES.values():
        parts = (
            loud * torch.sin(2 * torch.pi * pitch * (n + 1) * times)
            for n, loud in enumerate(OVERTONES)
        )
        wave = torch.stack(list(parts)).sum(dim=0)
        found[pitch] = mel.log_mel(wave.expand(1, 2, -1), mel.SAMPLE_RATE).exp().mean(dim=(0, 1, 2))
    return found
