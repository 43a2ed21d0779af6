"""Sound of any layout and rate, as two channels at a rate that files can hold."""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
from av.audio.frame import AudioFrame
from torch import Tensor

from ltxlite.media.audio import as_stereo, fit_length, read_audio
from ltxlite.media.container import media_errors, open_media, sound_stream

# What AAC can be coded at, but for 8 kHz and below, which players mistrust.
_FILE_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025)
_USUAL_RATE = 48000
_SIDE = math.sqrt(0.5)  # -3 dB for centre and surround channels, ITU-R BS.775


@dataclass(frozen=True, slots=True)
class StereoSound:
    """Sound as clips have it.

    waveform: (2, N) fp32; rate: Hz; remarks: what was done to bring it here, for people.
    """

    waveform: Tensor
    rate: int
    remarks: tuple[str, ...] = ()


def read_stereo(
    path: Path, start: float | Fraction = 0, duration: float | Fraction | None = None
) -> StereoSound:
    """Read the first sound track of a file as stereo, at its own rate if files can hold it.

    Mono is doubled; surround is mixed down by ITU-R BS.775 (centre and surround at -3 dB, no low
    frequency effects), and made quieter where that exceeds full scale.
    start, duration: as for `read_audio`, whose MediaErrors it raises.
    """
    waveform, rate = read_audio(path, start, duration)
    remarks = []
    if waveform.shape[0] > 2:
        names = _channel_names(path)
        waveform = mix_down(waveform, names)
        remarks.append(f"{len(names)} channels ({' '.join(names)}) are mixed down to stereo")
    if rate not in _FILE_RATES:
        remarks.append(f"{rate} Hz, resampled to {_USUAL_RATE} Hz")
        waveform, rate = change_rate(as_stereo(waveform), rate, _USUAL_RATE), _USUAL_RATE
    return StereoSound(as_stereo(waveform), rate, tuple(remarks))


def mix_down(waveform: Tensor, names: tuple[str, ...]) -> Tensor:
    """Mix surround (channels, N) down to stereo (2, N).

    names: FFmpeg's of the channels: FL, FR, FC, LFE, SL, BR ...
    """
    weights = torch.tensor([_weights(name) for name in names])  # (channels, 2)
    mixed = weights.T @ waveform
    return mixed / max(1.0, float(mixed.abs().max()))


def change_rate(waveform: Tensor, source: int, target: int) -> Tensor:
    """Resample stereo (2, N) from `source` to `target` Hz: round(N * target / source) samples."""
    if source == target:
        return waveform
    frame = AudioFrame.from_ndarray(waveform.contiguous().numpy(), format="fltp", layout="stereo")
    frame.sample_rate, frame.time_base, frame.pts = source, Fraction(1, source), 0
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=target)
    with media_errors(Path("sound"), f"be brought from {source} to {target} Hz"):
        pieces = [*resampler.resample(frame), *resampler.resample(None)]
    resampled = torch.cat([torch.from_numpy(piece.to_ndarray()) for piece in pieces], dim=1)
    return fit_length(resampled, round(waveform.shape[1] * target / source))


def splice(original: Tensor, made: Tensor, begin: int, fade: int) -> Tensor:
    """Replace a part of a sound by another, cross-fading inside of that part.

    original: (2, N); made: (2, M) for samples [begin, begin + M) of it, M cut at its end.  fade:
    samples over which each end passes from one to the other, at equal gain; none where the part
    reaches the end of `original`. All samples outside of the part stay bit for bit.
    """
    result = original.clone()
    part = result[:, begin : begin + made.shape[1]]
    made = made[:, : part.shape[1]]
    length = part.shape[1]
    fade = min(fade, length // 2)
    share = torch.ones(length)
    if fade:
        ramp = (torch.arange(fade) + 0.5) / fade
        if begin > 0:
            share[:fade] = ramp
        if begin + length < original.shape[1]:
            share[-fade:] = ramp.flip(0)
    part.copy_(torch.where(share == 1, made, torch.lerp(part, made, share)))
    return result


def _channel_names(path: Path) -> tuple[str, ...]:
    with open_media(path) as container:
        layout = sound_stream(container, path).codec_context.layout
        return tuple(channel.name for channel in layout.channels)


def _weights(name: str) -> tuple[float, float]:
    """Return how much of a channel goes left and right."""
    if name.startswith("LFE"):
        return (0.0, 0.0)
    gain = 1.0 if name in ("FL", "FR") else _SIDE
    if name.endswith("L"):
        return (gain, 0.0)
    if name.endswith("R"):
        return (0.0, gain)
    return (_SIDE, _SIDE)
