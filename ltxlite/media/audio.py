"""Sound: files to waveforms and back."""

import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ltxlite.errors import MediaError
from ltxlite.media.atomic import written_beside
from ltxlite.media.container import decoded_audio, open_media, sound_stream

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.container import InputContainer


def read_audio(
    path: Path, start: float | Fraction = 0, duration: float | Fraction | None = None
) -> tuple[Tensor, int]:
    """Read the first sound track of a file: the waveform (channels, N) fp32, and its rate in Hz.

    Any container, codec, sample format and rate that FFmpeg reads; integers come out in [-1, 1).
    start, duration: seconds from the track's first sample; a negative start puts silence before
    it; a file that ends early gives fewer samples (`fit_length` pads).
    Raises MediaError if the file is missing, damaged, without sound, or silent by ending too soon.
    """
    with open_media(path) as container:
        rate = sound_stream(container, path).codec_context.sample_rate
        first = round(start * rate)
        last = None if duration is None else first + round(duration * rate)
        pieces = list(_cut(_decoded(container, path), first, last))
    if not pieces:
        raise MediaError(
            f"{path}: has no sound from second {float(start):g} on; it ends before, or is empty"
        )
    waveform = torch.cat(pieces, dim=1)
    return F.pad(waveform, (-first, 0)) if first < 0 else waveform, rate


def write_wav(path: Path, waveform: Tensor, rate: int) -> None:
    """Write a waveform as 16-bit PCM, rounded to the nearest value.

    waveform: (channels, N) in [-1, 1], clamped; rate: Hz.  Sound that was read from 16 bits is
    written as the same codes.
    Raises MediaError if the file cannot be written.
    """
    codes = waveform.detach().cpu().float().mul(32768).round().clamp(-32768, 32767)
    interleaved = codes.T.contiguous().numpy().astype("<i2")
    with written_beside(path) as partial, wave.open(str(partial), "wb") as file:
        file.setnchannels(waveform.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(interleaved.tobytes())


def as_stereo(waveform: Tensor) -> Tensor:
    """Return a waveform (1 or 2 channels, N) with two channels; mono is doubled.

    Raises MediaError for more channels: which of them to hear is not ours to choose.
    """
    if waveform.ndim != 2 or waveform.shape[0] not in (1, 2):
        raise MediaError(
            f"sound of shape {tuple(waveform.shape)}: wanted (1 or 2 channels, samples); "
            "mix surround sound down to stereo first"
        )
    return waveform.expand(2, -1)


def fit_length(waveform: Tensor, samples: int) -> Tensor:
    """Cut a waveform (..., N) to `samples`, or append silence up to it."""
    return F.pad(waveform, (0, samples - waveform.shape[-1]))


def _decoded(container: "InputContainer", path: Path) -> Iterator[Tensor]:
    """Yield the track's samples as (channels, n) fp32 pieces."""
    # swresample knows that u8 is centred at 128; dividing by hand, the official code forgets it.
    resampler = av.AudioResampler(format="fltp")
    for frame in decoded_audio(container, sound_stream(container, path), path):
        yield from _planar(resampler, frame, path)
    yield from _planar(resampler, None, path)


def _planar(
    resampler: av.AudioResampler, frame: "AudioFrame | None", path: Path
) -> Iterator[Tensor]:
    try:
        pieces = resampler.resample(frame)
    except ValueError as error:
        raise MediaError(f"{path}: its sound changes format half-way ({error})") from error
    for piece in pieces:
        yield torch.from_numpy(piece.to_ndarray().astype(np.float32, copy=False))


def _cut(pieces: Iterator[Tensor], first: int, last: int | None) -> Iterator[Tensor]:
    """Yield the parts of consecutive pieces that lie in samples [first, last), stop after."""
    position = 0
    for piece in pieces:
        if last is not None and position >= last:
            return
        kept = piece[:, max(first - position, 0) : None if last is None else last - position]
        position += piece.shape[1]
        if kept.shape[1]:
            yield kept
