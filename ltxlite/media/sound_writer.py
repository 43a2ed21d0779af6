"""Writes sound without pictures: WAV, FLAC, M4A or MP3, by the file's suffix."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.atomic import written_beside
from ltxlite.media.audio import as_stereo, write_wav
from ltxlite.media.container import media_errors


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a suffix is written: FFmpeg's container, encoder, and sample format it is given."""

    container: str
    codec: str
    samples: str
    bit_rate: int | None = None


_WAV = ".wav"
_KINDS = {
    ".flac": _Kind("flac", "flac", "s16"),
    ".m4a": _Kind("mp4", "aac", "fltp", 192_000),
    ".mp3": _Kind("mp3", "libmp3lame", "fltp", 256_000),
}


def check_sound_file(path: Path) -> None:
    """Raise MediaError for a suffix that no sound is written as, or an encoder that is missing."""
    suffix = path.suffix.lower()
    if suffix == _WAV:
        return
    if suffix not in _KINDS:
        known = ", ".join((_WAV, *_KINDS))
        raise MediaError(f"{path}: sound alone is written as {known}; change the suffix")
    if _KINDS[suffix].codec not in av.codecs_available:
        raise MediaError(f"{path}: this build of PyAV cannot write {suffix}; write a .wav instead")


def write_sound(path: Path, waveform: Tensor, rate: int, metadata: Mapping[str, str]) -> None:
    """Write a waveform (1 or 2 channels, N) in [-1, 1], clamped, at `rate` Hz.

    WAV and FLAC hold 16 bits, rounded to the nearest value. WAV holds no metadata.
    Raises MediaError if the file cannot be written, or its kind is unknown.
    """
    check_sound_file(path)
    suffix = path.suffix.lower()
    stereo = as_stereo(waveform).detach().cpu().float().clamp(-1, 1)
    if suffix == _WAV:
        write_wav(path, stereo, rate)
        return
    kind = _KINDS[suffix]
    with written_beside(path) as unfinished, media_errors(path, "encode"):
        options = {"movflags": "+use_metadata_tags"} if kind.container == "mp4" else {}
        where = str(unfinished.absolute())
        with av.open(where, "w", format=kind.container, options=options) as container:
            container.metadata.update(metadata)
            stream = cast(AudioStream, container.add_stream(kind.codec, rate=rate))
            stream.codec_context.layout = "stereo"
            if kind.bit_rate is not None:
                stream.codec_context.bit_rate = kind.bit_rate
            container.mux([*stream.encode(_frame(stereo, rate, kind)), *stream.encode(None)])


def _frame(stereo: Tensor, rate: int, kind: _Kind) -> AudioFrame:
    if kind.samples == "s16":
        codes = stereo.mul(32768).round().clamp(-32768, 32767)
        samples = codes.T.reshape(1, -1).numpy().astype("<i2")  # interleaved
    else:
        samples = stereo.contiguous().numpy()
    frame = AudioFrame.from_ndarray(samples, format=kind.samples, layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return frame
