"""The mel front end against formulas evaluated in double precision."""

import math

import pytest
import torch
from torch import Tensor

from ltxlite.errors import MediaError, ShapeError
from ltxlite.models.mel import log_mel, mel_filterbank, resample


def slaney_hertz(mel: float) -> float:
    return 200 * mel / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def filterbank_in_double() -> Tensor:
    """Evaluate each triangle point by point."""
    top = 15 + 27 * math.log(8) / math.log(6.4)
    points = [slaney_hertz(top * index / 65) for index in range(66)]
    bank = torch.zeros(513, 64, dtype=torch.float64)
    for row in range(513):
        hertz = row * 8000 / 512
        for column in range(64):
            low, peak, high = points[column : column + 3]
            height = min((hertz - low) / (peak - low), (high - hertz) / (high - peak))
            bank[row, column] = max(height, 0) * 2 / (high - low)
    return bank


def log_mel_in_double(wave: Tensor) -> Tensor:
    """Fourier-transform mirrored, windowed frames one by one; wave: (N,)."""
    wave = wave.double()
    mirrored = torch.cat([wave[1:513].flip(0), wave, wave[-513:-1].flip(0)])
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(1024, dtype=torch.float64) / 1024)
    frames = [mirrored[160 * index : 160 * index + 1024] for index in range(1 + len(wave) // 160)]
    magnitude = torch.fft.rfft(torch.stack(frames) * window).abs()
    return (magnitude @ filterbank_in_double()).clamp(min=1e-5).log()


def resampled_in_double(wave: Tensor, source: int, target: int) -> Tensor:
    """Sum the windowed sinc over all samples for each output; wave: (N,)."""
    band = 0.99 * min(source, target)
    outputs = torch.arange(-(-target * len(wave) // source), dtype=torch.float64)
    inputs = torch.arange(len(wave), dtype=torch.float64)
    times = ((inputs / source)[None] - (outputs / target)[:, None]) * band
    window = torch.cos(math.pi * times.clamp(-6, 6) / 12) ** 2
    return (torch.sinc(times) * window * band / source) @ wave.double()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)) * 0.2


def test_filterbank_equals_the_triangles_evaluated_in_double() -> None:
    # fp32 mel points near 8 kHz are good to 5e-4 Hz; a slope is at most 1/31 per Hz, times 2/86.
    torch.testing.assert_close(mel_filterbank().double(), filterbank_in_double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("samples", [513, 1601, 3203])
def test_log_mel_equals_a_transform_in_double(samples: int) -> None:
    wave = noise(2, 2, samples)
    spectrogram = log_mel(wave, 16000)
    assert spectrogram.shape == (2, 2, 1 + samples // 160, 64)
    for batch in range(2):
        for channel in range(2):
            wanted = log_mel_in_double(wave[batch, channel])
            # fp32 transforms are good to 1e-6 of the loudest bin; the quietest is 1e-3 of it.
            torch.testing.assert_close(
                spectrogram[batch, channel].double(), wanted, atol=2e-4, rtol=0
            )


def test_silence_is_the_logarithm_of_the_floor() -> None:
    assert torch.equal(
        log_mel(torch.zeros(1, 2, 800), 16000), torch.full((1, 2, 6, 64), 1e-5).log()
    )


def test_mono_is_doubled() -> None:
    wave = noise(1, 1, 900)
    assert torch.equal(log_mel(wave, 16000), log_mel(wave.repeat(1, 2, 1), 16000))


def test_short_sound_is_followed_by_silence() -> None:
    wave = noise(1, 2, 77)
    padded = torch.nn.functional.pad(wave, (0, 513 - 77))
    assert torch.equal(log_mel(wave, 16000), log_mel(padded, 16000))


@pytest.mark.parametrize(
    ("source", "target"), [(44100, 16000), (48000, 16000), (22050, 16000), (16000, 44100)]
)
def test_resampling_equals_the_sum_in_double(source: int, target: int) -> None:
    wave = noise(1, 2, 997)
    result = resample(wave, source, target)
    # The fp32 kernel's arguments reach 6 * 441, so its taps are good to about 1e-4 of the peak.
    for channel in range(2):
        wanted = resampled_in_double(wave[0, channel], source, target)
        torch.testing.assert_close(result[0, channel].double(), wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("samples", "wanted"), [(1, 1), (3, 1), (4, 2), (998, 333), (1000, 334)])
def test_resampled_length_is_rounded_up(samples: int, wanted: int) -> None:
    assert resample(noise(1, 2, samples), 48000, 16000).shape == (1, 2, wanted)


def test_equal_rates_return_the_same_tensor() -> None:
    wave = noise(1, 2, 10)
    assert resample(wave, 44100, 44100) is wave


def test_log_mel_of_another_rate_resamples_first() -> None:
    wave = noise(1, 2, 5001)
    assert torch.equal(log_mel(wave, 44100), log_mel(resample(wave, 44100, 16000), 16000))


def test_other_layouts_and_rates_are_refused() -> None:
    for shape in [(2, 800), (1, 6, 800), (1, 2, 0)]:
        with pytest.raises(ShapeError, match="wanted"):
            log_mel(torch.zeros(shape), 16000)
    with pytest.raises(MediaError, match="positive"):
        log_mel(torch.zeros(1, 2, 800), 0)
    with pytest.raises(MediaError, match="filter taps"):
        resample(torch.zeros(1, 2, 800), 44101, 16000)
