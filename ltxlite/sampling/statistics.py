"""Holds the picture's latent channels to a mean and a deviation: AdaIN and StatNorm.

Latents are (B, F, P, C): frames, places of a frame, channels; fp32.
Source: ComfyUI-LTXVideo 5ceea73 (latent_norm), restated in features.md K1 to K3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxlite.sampling.settings import Statistics

_FLAT = 1e-8  # a channel that deviates less is moved, not stretched
# Quantiles sort copies: 16 channels of 1920x1088x121 take 2 MB, and torch refuses 2^24 values.
_CHANNELS = 16


@dataclass(frozen=True, slots=True)
class ChannelControl:
    """What a stage does about its picture's channels, bound to what they are to follow.

    frames, target: of the clip's own tokens, which come first; others are left alone.
    reference: (1, f, P, C) what AdaIN follows; None where the settings follow nothing.
    """

    settings: Statistics
    frames: int
    target: int
    reference: Tensor | None = None

    def predicted(self, x0: Tensor, step: int) -> Tensor:
        """Return a prediction (B, T, C) of a step, from 0, with the step's share of control."""
        said = self.settings
        return self._controlled(x0, _at(said.adain_steps, step), _at(said.statnorm_steps, step))

    def finished(self, x: Tensor) -> Tensor:
        """Return a stage's result (B, T, C) with the stage's share of control."""
        return self._controlled(x, self.settings.adain, self.settings.statnorm)

    def _controlled(self, tokens: Tensor, adain: float, statnorm: float) -> Tensor:
        if not adain and not statnorm:
            return tokens
        own = tokens[:, : self.target]
        latent = own.unflatten(1, (self.frames, -1))
        if adain:
            assert self.reference is not None
            latent = match_channels(latent, self.reference, adain, self.settings.per_frame)
        if statnorm:
            percentile, clip = self.settings.percentile, self.settings.clip
            latent = normalise_channels(latent, statnorm, percentile, clip)
        return torch.cat([latent.flatten(1, 2), tokens[:, self.target :]], dim=1)


def match_channels(
    latent: Tensor, reference: Tensor, factor: float, per_frame: bool = False
) -> Tensor:
    """Bring each channel's mean and deviation a share of the way to a reference's (AdaIN).

    reference: (1 or B, f, p, C) of any size; with `per_frame` of as many frames, or of one.
    """
    mean, deviation = _moments(latent, per_frame)
    wanted, wanted_deviation = _moments(reference, per_frame)
    scale = torch.where(deviation > _FLAT, wanted_deviation / deviation.clamp(min=_FLAT), 1.0)
    return torch.lerp(latent, (latent - mean) * scale + wanted, factor)


def normalise_channels(
    latent: Tensor, factor: float, percentile: float = 95.0, clip: bool = False
) -> Tensor:
    """Bring each channel a share of the way to mean 0 and deviation 1 (StatNorm).

    Both are measured on the values within the central `percentile`; clip: cut those beyond it.
    """
    flat = latent.flatten(1, 2)
    parts = [_normalised(part, percentile, clip) for part in flat.split(_CHANNELS, dim=2)]
    return torch.lerp(latent, torch.cat(parts, dim=2).view_as(latent), factor)


def _normalised(values: Tensor, percentile: float, clip: bool) -> Tensor:
    """Normalise channels (B, N, c)."""
    tail = (1 - percentile / 100) / 2
    edges = torch.tensor([tail, 1 - tail], dtype=values.dtype, device=values.device)
    low, high = torch.quantile(values, edges, dim=1, keepdim=True)
    inside = (values >= low) & (values <= high)
    count = inside.sum(1, keepdim=True)
    mean = (values * inside).sum(1, keepdim=True) / count.clamp(min=1)
    variance = ((values - mean).square() * inside).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    deviation = variance.sqrt()
    scale = torch.where(deviation > _FLAT, 1 / deviation.clamp(min=_FLAT), 1.0)
    found = values.clamp(low, high) if clip else values
    normalised: Tensor = (found - mean) * scale
    return normalised


def _moments(latent: Tensor, per_frame: bool) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased deviation, (B, F or 1, 1, C); one value deviates by nothing."""
    axes = (2,) if per_frame else (1, 2)
    count = latent.shape[2] * (1 if per_frame else latent.shape[1])
    mean = latent.mean(axes, keepdim=True)
    variance = (latent - mean).square().sum(axes, keepdim=True) / max(count - 1, 1)
    return mean, variance.sqrt()


def _at(factors: tuple[float, ...], step: int) -> float:
    return factors[min(step, len(factors) - 1)] if factors else 0.0
