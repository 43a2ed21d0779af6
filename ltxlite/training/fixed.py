"""The parts of a vocoder that are not learned: filters, a Fourier basis, mel filters."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ltxlite.models.mel import mel_filterbank


def anti_aliasing_filter(shape: tuple[int, ...]) -> Tensor:
    """Return the vocoder's 12-tap Kaiser-windowed sinc; source: vae-audio-media.md 4.2."""
    taps = shape[-1]
    window = torch.kaiser_window(taps, periodic=False, beta=4.664)
    times = torch.arange(taps) - (taps - 1) / 2
    values = window * torch.sinc(0.5 * times)
    return (values / values.sum()).expand(shape).clone()


def fourier_basis(shape: tuple[int, ...]) -> Tensor:
    """Return Hann-windowed cosines, then negative sines: (2 * bins, 1, window)."""
    bins, window = shape[0] // 2, shape[2]
    angles = 2 * math.pi * torch.outer(torch.arange(bins), torch.arange(window)) / window
    basis = torch.cat([angles.cos(), -angles.sin()]) * torch.hann_window(window)
    return basis[:, None]


def mel_basis(shape: tuple[int, ...]) -> Tensor:
    """Return the audio front end's mel filters at fewer frequencies: (mel bins, bins)."""
    filters = mel_filterbank()
    step = (filters.shape[0] - 1) // (shape[1] - 1)
    return filters[::step].T.contiguous()


# By the last part of the name in the module.
FIXED: Mapping[str, Callable[[tuple[int, ...]], Tensor]] = MappingProxyType(
    {
        "latent_mean": torch.zeros,
        "latent_std": torch.ones,
        "up_filter": anti_aliasing_filter,
        "down_filter": anti_aliasing_filter,
        "transform": fourier_basis,
        "mel_basis": mel_basis,
    }
)


def freeze_fixed(network: nn.Module) -> None:
    """Give the fixed parts of a network their values and keep them from learning."""
    with torch.no_grad():
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            make = FIXED.get(name.rpartition(".")[2])
            if make is not None:
                value.copy_(make(tuple(value.shape)))
                value.requires_grad_(False)
