"""Pixels, latents and tokens: sizes, snapping, patchifying and positions.

Source of all rules: LTX-2 400fd31 (ltx_core.types, patchifiers), restated in our own terms.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ltxlite.errors import RequestError


@dataclass(frozen=True, slots=True)
class LatentGrid:
    """How a video VAE scales: pixel frames per latent frame, pixels per latent row and column."""

    time: int = 8
    space: int = 32

    def latent_frames(self, frames: int) -> int:
        """Return the latent frames of a clip; the first latent frame is a single pixel frame."""
        return (frames - 1) // self.time + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """Return the pixel frames that `latent_frames` decode to."""
        return (latent_frames - 1) * self.time + 1

    def first_frame(self, latent_frame: int) -> int:
        """Return the first pixel frame that a latent frame covers."""
        return 0 if latent_frame == 0 else 1 + self.time * (latent_frame - 1)

    def latent_index(self, frame: int) -> int:
        """Return the latent frame that holds a pixel frame."""
        return (frame + self.time - 1) // self.time

    def snap_frames(self, frames: int) -> int:
        """Return the largest legal frame count (8n + 1) not above `frames`."""
        if frames < 1:
            raise RequestError(f"frames is {frames}; a clip has at least one frame")
        return self.pixel_frames(self.latent_frames(frames))

    def snap_size(self, pixels: int, multiple: int) -> int:
        """Return the legal size nearest to `pixels` (ties go up), at least one multiple."""
        return max(multiple, (2 * pixels + multiple) // (2 * multiple) * multiple)


def size_multiple(scales: Iterable[Fraction], space: int) -> int:
    """Return what final width and height must be multiples of, so that every stage fits its grid.

    scales: of the stages, as fractions of the final size.  space: pixels per latent row; 1/2 with
    32 gives 64, 1/4 gives 128, 2/3 (an x1.5 upscaler) gives 96.
    """
    needs = (scale.denominator * space // math.gcd(space, scale.numerator) for scale in scales)
    return math.lcm(*needs, space)


@dataclass(frozen=True, slots=True)
class AudioGrid:
    """How the audio VAE scales: samples per second, per mel frame, mel frames per latent."""

    rate: int = 16000
    hop: int = 160
    downsample: int = 4

    @property
    def latents_per_second(self) -> float:
        """Latent frames in a second of sound: 25 for every released model."""
        return self.rate / self.hop / self.downsample

    def latent_frames(self, frames: int, fps: float | Fraction) -> int:
        """Return the audio latents of a clip of `frames` pictures; halves round to even."""
        return round(frames / float(fps) * self.latents_per_second)


@dataclass(frozen=True, slots=True)
class ClipShape:
    """The latent shape of one stage: video grid, audio length, frame rate."""

    frames: int
    rows: int
    columns: int
    audio_frames: int
    fps: float

    @property
    def video_tokens(self) -> int:
        """Video tokens of the stage, conditioning tokens not counted."""
        return self.frames * self.rows * self.columns


def patchify_video(latent: Tensor) -> Tensor:
    """Turn a video latent (B, C, F, Y, X) into tokens (B, F*Y*X, C), frame slowest."""
    return latent.flatten(2).transpose(1, 2)


def unpatchify_video(tokens: Tensor, shape: ClipShape) -> Tensor:
    """Turn the first F*Y*X tokens (B, T, C) back into a latent (B, C, F, Y, X)."""
    target = tokens[:, : shape.video_tokens].transpose(1, 2)
    return target.reshape(*target.shape[:2], shape.frames, shape.rows, shape.columns)


def patchify_audio(latent: Tensor) -> Tensor:
    """Turn an audio latent (B, C, T, M) into tokens (B, T, C*M), mel bin fastest."""
    return latent.transpose(1, 2).flatten(2)


def unpatchify_audio(tokens: Tensor, frames: int, channels: int) -> Tensor:
    """Turn the first `frames` audio tokens (B, T, C*M) back into a latent (B, C, T, M)."""
    return tokens[:, :frames].reshape(tokens.shape[0], frames, channels, -1).transpose(1, 2)


def video_positions(
    shape: tuple[int, int, int], fps: float, grid: LatentGrid, causal: bool = True
) -> Tensor:
    """Return the [start, end) bounds of every video token.

    shape: latent (F, Y, X).  Returns (1, 3, F*Y*X, 2) fp32: seconds, pixel rows, pixel columns.
    With `causal` the clip's first latent frame spans one pixel frame and the rest follow it.
    """
    scales = (grid.time, grid.space, grid.space)
    axes = [
        torch.arange(count, dtype=torch.float32) * scale
        for count, scale in zip(shape, scales, strict=True)
    ]
    starts = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    ends = starts + torch.tensor(scales, dtype=torch.float32)[:, None]
    bounds = torch.stack([starts, ends], dim=-1)
    if causal:
        bounds[0] = (bounds[0] + 1 - grid.time).clamp(min=0)
    bounds[0] = bounds[0] / fps
    return bounds[None]


def audio_positions(frames: int, grid: AudioGrid, first: int = 0) -> Tensor:
    """Return the [start, end) seconds of audio tokens first .. first+frames-1: (1, 1, T, 2) fp32.

    The encoder is causal: token i ends where its last mel frame, 4i, ends.
    """
    index = torch.arange(first, first + frames, dtype=torch.float32)
    edges = torch.stack([index, index + 1], dim=-1) * grid.downsample
    mel = (edges + 1 - grid.downsample).clamp(min=0)
    return (mel * grid.hop / grid.rate)[None, None]


def midpoints(bounds: Tensor) -> Tensor:
    """Return the middle of [start, end) bounds: (B, A, T, 2) to (B, A, T)."""
    return (bounds[..., 0] + bounds[..., 1]) / 2
