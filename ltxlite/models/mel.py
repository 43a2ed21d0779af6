"""Turns sound into the log-mel spectrogram that the audio VAE encodes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxlite.errors import MediaError, ShapeError

SAMPLE_RATE = 16000
HOP = 160  # samples between frames: 100 mel frames a second
WINDOW = 1024  # samples of a frame, also the length of its Fourier transform
MEL_BINS = 64
TOP_FREQUENCY = 8000.0  # Hz
CHANNELS = 2
FLOOR = 1e-5  # smallest magnitude before the logarithm

# Slaney's scale: linear below 1 kHz (15 mel), 27 mel per factor 6.4 above it.
_HERTZ_PER_MEL = 200.0 / 3.0
_KNEE_HERTZ = 1000.0
_KNEE_MEL = 15.0
_LOG_STEP = math.log(6.4) / 27.0

# The interpolation filter of the resampler: a sinc under one Hann lobe of 6 zero crossings a side.
_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
# 256 MiB of fp32 taps; 44.1 kHz to 16 kHz needs 0.3 MiB, rates without a common divisor gigabytes.
_MOST_TAPS = 1 << 26


def log_mel(waveform: Tensor, rate: int) -> Tensor:
    """Compute the stereo log-mel spectrogram the audio VAE was trained on.

    waveform: (B, 1 or 2, N) floating point in [-1, 1] at `rate` Hz; mono is doubled, another rate
    is resampled, and sound of 512 samples or less is followed by silence.
    Returns (B, 2, T, 64) fp32 with T = 1 + samples // 160: magnitudes of a centred, mirrored
    1024-point transform under a periodic Hann window, gathered on Slaney's scale, log of at least
    1e-5.
    Raises ShapeError for another channel count or no samples, MediaError for an impossible rate.
    Source: LTX-2 400fd31 audio_vae/ops.py AudioProcessor; torchaudio MelSpectrogram.
    """
    waveform = resample(_as_stereo(waveform).float(), rate, SAMPLE_RATE)
    shortest = WINDOW // 2 + 1  # the mirrored margin must be shorter than the sound
    waveform = F.pad(waveform, (0, max(0, shortest - waveform.shape[-1])))
    batch, channels, samples = waveform.shape
    spectrum = torch.stft(
        waveform.reshape(batch * channels, samples),
        n_fft=WINDOW,
        hop_length=HOP,
        window=torch.hann_window(WINDOW, device=waveform.device),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    magnitude = spectrum.abs().transpose(1, 2)  # (B*2, T, 513)
    mel = magnitude @ mel_filterbank().to(waveform.device)
    return mel.clamp(min=FLOOR).log().reshape(batch, channels, -1, MEL_BINS)


def mel_filterbank() -> Tensor:
    """Build the triangles that gather the 513 frequencies into 64 mel bins.

    Returns (513, 64) fp32: each column rises from one mel point to the next and falls to the one
    after, scaled by 2 / its width in Hz.
    Source: Slaney, Auditory Toolbox (1998); torchaudio melscale_fbanks.
    """
    frequencies = torch.linspace(0.0, TOP_FREQUENCY, WINDOW // 2 + 1)
    points = _mel_to_hertz(torch.linspace(0.0, _hertz_to_mel(TOP_FREQUENCY), MEL_BINS + 2))
    distance = points[None, :] - frequencies[:, None]  # (513, 66)
    widths = points.diff()
    rising = -distance[:, :-2] / widths[:-1]
    falling = distance[:, 2:] / widths[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0.0)
    return triangles * (2.0 / (points[2:] - points[:-2]))


def resample(waveform: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """Resample sound with a Hann-windowed sinc, silence being assumed around it.

    waveform: (B, C, N) fp32 at `source_rate` Hz.
    Returns (B, C, ceil(N * target / source)) fp32; the same tensor if the rates agree.
    Raises MediaError for rates that are not positive or have too small a common divisor.
    Source: torchaudio functional.resample, sinc_interp_hann, width 6, rolloff 0.99.
    """
    source, target = _reduced_rates(source_rate, target_rate)
    if source == target:
        return waveform
    margin = _margin(source, target)
    kernel = _interpolation_kernel(source, target).to(waveform.device)
    batch, channels, samples = waveform.shape
    padded = F.pad(waveform.reshape(batch * channels, 1, samples), (margin, margin + source))
    phases = F.conv1d(padded, kernel, stride=source)  # (B*C, target, samples/source + 1)
    wanted = -(-target * samples // source)
    return phases.transpose(1, 2).reshape(batch, channels, -1)[..., :wanted]


def _as_stereo(waveform: Tensor) -> Tensor:
    """Check the layout and double mono."""
    if waveform.ndim != 3 or waveform.shape[1] not in (1, CHANNELS) or waveform.shape[2] == 0:
        raise ShapeError(
            f"log_mel: got a waveform of shape {tuple(waveform.shape)}, wanted (batch, 1 or 2 "
            "channels, samples); mix other layouts down to stereo first"
        )
    return waveform.expand(-1, CHANNELS, -1)


def _hertz_to_mel(hertz: float) -> float:
    if hertz < _KNEE_HERTZ:
        return hertz / _HERTZ_PER_MEL
    return _KNEE_MEL + math.log(hertz / _KNEE_HERTZ) / _LOG_STEP


def _mel_to_hertz(mel: Tensor) -> Tensor:
    curved = _KNEE_HERTZ * torch.exp(_LOG_STEP * (mel - _KNEE_MEL))
    return torch.where(mel < _KNEE_MEL, mel * _HERTZ_PER_MEL, curved)


def _reduced_rates(source_rate: int, target_rate: int) -> tuple[int, int]:
    """Divide both rates by their common divisor, refusing what would need an enormous filter."""
    if source_rate <= 0 or target_rate <= 0:
        raise MediaError(f"resample: rates must be positive, got {source_rate} to {target_rate} Hz")
    divisor = math.gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    taps = target * (2 * _margin(source, target) + source)
    if taps > _MOST_TAPS:
        raise MediaError(
            f"resample: {source_rate} to {target_rate} Hz needs {taps} filter taps, at most "
            f"{_MOST_TAPS} are allowed; convert the sound to 44100 or 48000 Hz first"
        )
    return source, target


def _margin(source: int, target: int) -> int:
    """Return how many source samples the filter reaches to each side."""
    return math.ceil(_ZERO_CROSSINGS * source / (min(source, target) * _ROLLOFF))


def _interpolation_kernel(source: int, target: int) -> Tensor:
    """Return one filter per output phase, (target, 1, 2 * margin + source)."""
    margin, bandwidth = _margin(source, target), min(source, target) * _ROLLOFF
    # fp32 on purpose: a kernel built in fp64 moves the log-mel of 44.1 kHz sound by 1.2e-4.
    positions = torch.arange(-margin, margin + source, dtype=torch.float32)[None, None] / source
    phases = torch.arange(0, -target, -1, dtype=torch.float32)[:, None, None] / target
    times = ((phases + positions) * bandwidth).clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = torch.cos(times * math.pi / _ZERO_CROSSINGS / 2) ** 2
    angles = times * math.pi
    sinc = torch.where(angles == 0, torch.ones_like(angles), angles.sin() / angles)
    return sinc * (window * (bandwidth / source))
