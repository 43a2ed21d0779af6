"""Reads clips: frames as shown, exact frame rate, the sound that goes with them."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from av.video.frame import VideoFrame
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.audio import read_audio
from ltxlite.media.container import decoded_video, open_media, sound_stream, video_stream

if TYPE_CHECKING:
    from av.stream import Stream

# swscale's default rounds down, on average by 1.2 levels, and repeats chroma in pairs.
# SWS_BICUBIC, SWS_FULL_CHR_H_INT, SWS_ACCURATE_RND: PyAV names the last two only from 17 on.
_ACCURATE = 0x4 | 0x2000 | 0x40000
# FFmpeg's numbers of colour matrices.
_BT709, _UNTAGGED, _BT601 = 1, 2, 5
_STANDARD_DEFINITION_HEIGHT = 576


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a clip's header says.

    frames: as declared, 0 where the container does not say; width, height: as stored, before a
    rotation tag; audio_rate: None without sound; sound_delay: seconds by which the sound starts
    after the picture.
    """

    width: int
    height: int
    frames: int
    fps: Fraction
    audio_rate: int | None
    sound_delay: Fraction
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class VideoClip:
    """A piece of a clip.

    frames: (F, H, W, 3) uint8 RGB; waveform: (channels, N) fp32 from the first of these frames
    to the end of the last (shorter where the track ends), or None; audio_rate: Hz.
    """

    frames: Tensor
    fps: Fraction
    waveform: Tensor | None
    audio_rate: int | None
    metadata: dict[str, str]


def read_video_info(path: Path) -> VideoInfo:
    """Read a clip's header.

    Raises MediaError if the file is missing, no video, or has no frame rate.
    """
    with open_media(path) as container:
        video = video_stream(container, path)
        fps = video.average_rate or video.guessed_rate
        if not fps:
            raise MediaError(f"{path}: has no frame rate; is it a still picture?")
        sound = sound_stream(container, path) if container.streams.audio else None
        return VideoInfo(
            width=video.codec_context.width,
            height=video.codec_context.height,
            frames=video.frames,
            fps=Fraction(fps),
            audio_rate=sound.codec_context.sample_rate if sound else None,
            sound_delay=_start(sound) - _start(video) if sound else Fraction(0),
            metadata=dict(container.metadata),
        )


def iter_frames(path: Path, start: int = 0, end: int | None = None) -> Iterator[Tensor]:
    """Yield frames [start, end) of a clip one at a time, as (H, W, 3) uint8 RGB.

    Decoding begins at the file's beginning, so that frame numbers are exact. Rotation tags are
    applied. Untagged colour is read as BT.601 up to 576 rows and as BT.709 above, as players do.
    High dynamic range is not tone-mapped.
    Raises MediaError if the file is missing, no video, damaged or cut off.
    """
    with open_media(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        for frame in islice(decoded_video(container, stream, path), start, end):
            yield _to_rgb(frame)


def read_video(path: Path, start: int = 0, end: int | None = None) -> VideoClip:
    """Read frames [start, end) of a clip and their sound into memory.

    1080p takes 6.2 MB a frame, twice that while it is put together; `iter_frames` takes one.
    Raises MediaError if the file is missing, no video, damaged, or has no frame in that range.
    """
    info = read_video_info(path)
    frames = list(iter_frames(path, start, end))
    if not frames:
        raise MediaError(
            f"{path}: has no frame from number {start} on; it ends before, or is cut off"
        )
    waveform = None
    if info.audio_rate is not None:
        begin = start / info.fps - info.sound_delay
        waveform, _ = read_audio(path, begin, len(frames) / info.fps)
    return VideoClip(torch.stack(frames), info.fps, waveform, info.audio_rate, info.metadata)


def _start(stream: "Stream") -> Fraction:
    """Return the time in seconds at which a stream begins."""
    if stream.start_time is None or stream.time_base is None:
        return Fraction(0)
    return stream.start_time * stream.time_base


def _to_rgb(frame: VideoFrame) -> Tensor:
    space = frame.colorspace
    if space == _UNTAGGED:
        space = _BT601 if frame.height <= _STANDARD_DEFINITION_HEIGHT else _BT709
    # RGB has no matrix, but PyAV before 17 heeds the source's only where the target's differs.
    array = frame.to_ndarray(
        format="rgb24",
        interpolation=_ACCURATE,
        src_colorspace=space,
        dst_colorspace=_BT601,
    )
    rgb = torch.from_numpy(array)
    quarter_turns = round(frame.rotation / 90) % 4
    return torch.rot90(rgb, quarter_turns).contiguous() if quarter_turns else rgb
