"""The pictures and sounds of the world: batches of clips drawn from a few numbers each.

Lengths are in units of the picture's shorter side, times in seconds, so that a scene is the same at
every size and frame rate. Where it pulses, the shape swells with the sound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ltxlite.models import mel
from ltxlite.training.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, TONES, Facts

PULSES_PER_SECOND = 2.0  # 8 frames at 16 fps: one latent frame
SMALLEST = 0.65  # radius of a pulsing shape at its smallest, of its largest
STEADY = 0.9  # radius of a steady one
LOUDNESS = 0.35
QUIETEST = 0.02  # amplitude between pulses, of the loudest
# Amplitudes of the overtones. All tones are multiples of 100 Hz and start in phase: at one pitch a
# vocoder repeats itself every mel frame of 10 ms, so that only these do not drift against it.
OVERTONES = (1.0, 0.4, 0.2)
_RADII = (0.21, 0.28)
SPEEDS = (0.32, 0.42)  # shorter sides a second
_WANDER = 0.06
RING_HOLE = 0.5
_TRIANGLE_INSIDE = 0.62  # radius of the inscribed circle, of the shape's


@dataclass(frozen=True, slots=True)
class Scenes:
    """B scenes as numbers.

    colour, background: (B, 3) in [0, 1].  shape: (B,) index.  centre, velocity: (B, 2) columns
    and rows from the picture's middle, at the clip's middle.  radius, phase: (B,).
    pitch: (B,) Hz.  pulsing: (B,) 0 or 1.
    """

    colour: Tensor
    background: Tensor
    shape: Tensor
    centre: Tensor
    velocity: Tensor
    radius: Tensor
    pitch: Tensor
    pulsing: Tensor
    phase: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def to(self, device: torch.device) -> "Scenes":
        """Return the scenes where they are to be rendered."""
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))

    def envelope(self, times: Tensor) -> Tensor:
        """Return how strong the pulses are at times (T,) seconds: (B, T) in [0, 1]."""
        angles = 2 * math.pi * PULSES_PER_SECOND * times + self.phase[:, None]
        return torch.where(self.pulsing[:, None] > 0, 0.5 + 0.5 * angles.cos(), 1.0)


def draw(facts: Sequence[Facts], generator: torch.Generator, spread: float = 1.0) -> Scenes:
    """Draw scenes that the facts describe; place, size, speed and phase are chance.

    spread: how much of their ranges, around the middles, places, sizes and speeds take; below 1
    pulses begin at their loudest or at their faintest.
    """
    count = len(facts)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        chance = 0.5 + spread * (torch.rand(count, *shape, generator=generator) - 0.5)
        return low + (high - low) * chance

    way = torch.tensor([DIRECTIONS[item.direction] for item in facts], dtype=torch.float32)
    return Scenes(
        colour=torch.tensor([COLOURS[item.colour] for item in facts]),
        background=torch.tensor([BACKGROUNDS[item.background] for item in facts]),
        shape=torch.tensor([SHAPES.index(item.shape) for item in facts]),
        centre=uniform(-_WANDER, _WANDER, 2),
        velocity=way * uniform(*SPEEDS)[:, None],
        radius=uniform(*_RADII),
        pitch=torch.tensor([float(TONES[item.tone]) for item in facts]),
        pulsing=torch.tensor([float(item.rhythm == "pulsing") for item in facts]),
        phase=_phase(torch.rand(count, generator=generator), spread),
    )


def _phase(chance: Tensor, spread: float) -> Tensor:
    return 2 * math.pi * (chance if spread == 1 else (2 * chance).floor() / 2)


@dataclass(frozen=True, slots=True)
class Outline:
    """A shape by its number and, of a ring, the hole's share of the radius."""

    shape: int
    hole: float = RING_HOLE

    @property
    def area(self) -> float:
        """What it covers where its radius is 1."""
        areas = (math.pi, 3 * math.sqrt(3) * _TRIANGLE_INSIDE**2, math.pi * (1 - self.hole**2))
        return areas[self.shape]


def coverage(outline: Outline, x: Tensor, y: Tensor, radius: Tensor, pixel: float) -> Tensor:
    """Return how much of each pixel a shape covers, in [0, 1].

    x, y: columns and rows from the shape's centre; with radius they broadcast to the result.
    pixel: a pixel's side.
    """
    if outline.shape == SHAPES.index("triangle"):
        slanted = math.sqrt(3) / 2 * x.abs() - 0.5 * y
        outside = torch.maximum(slanted, y) - _TRIANGLE_INSIDE * radius
    else:
        outside = (x.square() + y.square()).sqrt_() - radius
        if outline.shape == SHAPES.index("ring"):
            band = (1 - outline.hole) / 2 * radius
            outside = (outside + band).abs_() - band
    return outside.div_(-pixel).add_(0.5).clamp_(0, 1)


def pixel_middles(
    height: int, width: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return columns (W,) and rows (H, 1) of pixels' middles, from the middle of the picture."""
    side = min(height, width)
    columns = (torch.arange(width, device=device) + 0.5 - width / 2) / side
    rows = (torch.arange(height, device=device) + 0.5 - height / 2) / side
    return columns, rows[:, None]


def masks(scenes: Scenes, size: tuple[int, int], frames: int, fps: float) -> Tensor:
    """Return how much of each pixel the shapes cover: (B, F, H, W); size is (height, width)."""
    device = scenes.centre.device
    times = torch.arange(frames, device=device) / fps
    middle = (frames - 1) / 2 / fps
    centres = scenes.centre[:, None] + scenes.velocity[:, None] * (times - middle)[:, None]
    swell = SMALLEST + (1 - SMALLEST) * scenes.envelope(times)
    steady = torch.full_like(swell, STEADY)
    radius = scenes.radius[:, None] * torch.where(scenes.pulsing[:, None] > 0, swell, steady)
    columns, rows = pixel_middles(*size, device)
    x, y = (centres[..., axis, None, None] for axis in (0, 1))
    covered = torch.empty(len(scenes), frames, *size, device=device)
    for number in range(len(SHAPES)):
        own = scenes.shape == number
        places = (columns - x[own], rows - y[own])
        covered[own] = coverage(
            Outline(number), *places, radius[own][..., None, None], 1 / min(size)
        )
    return covered


def paint(scenes: Scenes, covered: Tensor) -> Tensor:
    """Colour masks (B, F, H, W): pixels (B, 3, F, H, W) in [-1, 1]."""
    colour, background = (x[:, :, None, None, None] for x in (scenes.colour, scenes.background))
    return (background + (colour - background) * covered[:, None]) * 2 - 1


def pictures(scenes: Scenes, size: tuple[int, int], frames: int, fps: float) -> Tensor:
    """Render clips: (B, 3, F, H, W) in [-1, 1]."""
    return paint(scenes, masks(scenes, size, frames, fps))


def sounds(scenes: Scenes, samples: int, rate: int = mel.SAMPLE_RATE) -> Tensor:
    """Render waveforms: (B, 2, N) in [-1, 1]."""
    count = torch.arange(samples, device=scenes.pitch.device)
    wave = torch.zeros(len(scenes), samples, device=count.device)
    for number, loud in enumerate(OVERTONES, start=1):
        # Whole numbers, so that every period is the same to the last bit: in fp32 the phase of
        # 2400 Hz is off by 1e-3 after a second, which is loud beside a logarithm's floor.
        cycles = (number * scenes.pitch.long()[:, None] * count) % rate
        wave += loud * torch.sin(2 * math.pi * cycles / rate)
    strength = QUIETEST + (1 - QUIETEST) * scenes.envelope(count / rate)
    mono = LOUDNESS * strength * wave
    return mono[:, None].expand(-1, mel.CHANNELS, -1)


def spectrograms(scenes: Scenes, frames: int) -> Tensor:
    """Render log-mel spectrograms (B, 2, T, 64) of sounds that are T mel frames long."""
    return mel.log_mel(sounds(scenes, (frames - 1) * mel.HOP), mel.SAMPLE_RATE)
