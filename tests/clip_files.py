"""Media files as people have them, made with FFmpeg's encoders: clips, sound, masks."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

TICKS = 90_000  # a second, of the clips' time base


def picture(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """Draw a frame that tells its number: a gradient and a bar that moves."""
    rows, columns = np.mgrid[:height, :width]
    frame = np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 90], axis=-1)
    left = number * 5 % width
    frame[:, left : left + 6] = (250, 240, 20)
    return frame.astype(np.uint8)


def tone(channels: int, seconds: float, rate: int) -> NDArray[np.float32]:
    """Return (channels, N): a different pitch in each channel, at a third of full scale."""
    times = np.arange(round(seconds * rate)) / rate
    voices = [np.sin(2 * math.pi * (220 + 110 * index) * times) / 3 for index in range(channels)]
    return np.stack(voices).astype(np.float32)


def write_clip(
    path: Path,
    times: Sequence[Fraction],
    size: tuple[int, int],
    sound: tuple[NDArray[np.float32], int] | None = None,
) -> Path:
    """Write a lossless H.264 clip whose frames appear at these seconds.

    size: (width, height).  sound: stereo and rate, as AAC.
    """
    with av.open(str(path), "w") as container:
        options = {"crf": "0", "preset": "ultrafast"}
        rate = ((len(times) - 1) / times[-1]).limit_denominator(1001)
        stream = cast(VideoStream, container.add_stream("libx264", rate=rate, options=options))
        stream.width, stream.height = size
        # Without loss of colour too, so that every frame differs from the next.
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        voice = None if sound is None else _sound_stream(container, "aac", sound, "stereo")
        for number, time in enumerate(times):
            frame = VideoFrame.from_ndarray(picture(number, size[1], size[0]), format="rgb24")
            frame.pts, frame.time_base = round(time * TICKS), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice is not None and sound is not None:
            _write_sound(container, voice, sound, "stereo")
    return path


def steady(count: int, fps: Fraction) -> list[Fraction]:
    """Return the times of a clip at a constant rate."""
    return [number / fps for number in range(count)]


def write_sound(
    path: Path, codec: str, sound: tuple[NDArray[np.float32], int], layout: str
) -> Path:
    """Write a sound file: pcm_s16le, libmp3lame or aac; layout mono, stereo or 5.1."""
    with av.open(str(path), "w") as container:
        stream = _sound_stream(container, codec, sound, layout)
        _write_sound(container, stream, sound, layout)
    return path


def _sound_stream(
    container: OutputContainer, codec: str, sound: tuple[NDArray[np.float32], int], layout: str
) -> AudioStream:
    stream = cast(AudioStream, container.add_stream(codec, rate=sound[1]))
    stream.codec_context.layout = layout
    return stream


def _write_sound(
    container: OutputContainer,
    stream: AudioStream,
    sound: tuple[NDArray[np.float32], int],
    layout: str,
) -> None:
    waveform, rate = sound
    frame = AudioFrame.from_ndarray(waveform, format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    resampler = av.AudioResampler(stream.codec_context.format, layout, rate)
    for piece in (*resampler.resample(frame), *resampler.resample(None)):
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))


def read_pngs(folder: Path) -> Tensor:
    """Read the frames of an output folder: (F, H, W, 3) uint8."""
    from ltxlite.media.image import load_image

    return torch.stack([load_image(path) for path in sorted(folder.glob("frame_*.png"))])
