"""A quiet rushing under clean speech, which lips follow better.

Recordings that models learn from have some; what a speech synthesiser gives has none.
Source: features.md G6.
"""

import torch
from torch import Tensor


def with_ambience(waveform: Tensor, level: float, seed: int) -> Tensor:
    """Return sound (2, N) with pink noise of a root mean square of `level` in each channel.

    Deterministic in the seed; 0 returns the waveform itself.
    """
    if level == 0 or waveform.shape[1] == 0:
        return waveform
    return waveform + level * pink_noise(waveform.shape[1], seed)


def pink_noise(samples: int, seed: int) -> Tensor:
    """Return stereo noise (2, N) fp32 of equal power an octave, no offset, root mean square 1."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft(torch.randn(2, samples, generator=generator))
    numbers = torch.arange(spectrum.shape[1], dtype=torch.float32)
    numbers[0] = torch.inf
    noise: Tensor = torch.fft.irfft(spectrum / numbers.sqrt(), samples)
    return noise / noise.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
