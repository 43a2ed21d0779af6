"""Writes a clip: frames and sound in, one mp4 out."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import av
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.atomic import written_beside
from ltxlite.media.audio import fit_length
from ltxlite.media.background import Background
from ltxlite.media.colour import rgb_to_i420, to_unit_range
from ltxlite.media.container import media_errors
from ltxlite.media.output import VideoSettings, delivered, delivered_sound

# FFmpeg's numbers: AVCOL_RANGE_MPEG, and BT.709 as matrix, primaries and transfer alike.
_LIMITED_RANGE = 1
_BT709 = 1
# use_metadata_tags: without it mp4 keeps only the dozen tags that iTunes knows.
_MOVFLAGS = "+faststart+use_metadata_tags"


class VideoWriter:
    """Takes a clip's frames and sound in pieces, in order; made by `create_video`."""

    def __init__(self, file: "_Mp4File", settings: VideoSettings, background: Background) -> None:
        self._file = file
        self._settings = settings
        self._background = background

    def write(self, frames: Tensor) -> None:
        """Append frames (F, 3, H, W) in [-1, 1], any float type, on any device.

        Colour is converted where the frames lie, frame by frame in fp32; encoding happens on
        another thread, and the call waits while two pieces are still to be encoded.
        Raises MediaError if the frames do not fit the settings, or encoding failed before.
        """
        cropped = delivered(frames, self._settings)
        planes = [rgb_to_i420(to_unit_range(frame[None]))[0].cpu() for frame in cropped]
        self._background.submit(partial(self._file.add_frames, planes))

    def write_audio(self, waveform: Tensor) -> None:
        """Append sound (1 or 2 channels, N) in [-1, 1] at the settings' audio rate.

        It may come before, between or after the frames. At the end it is cut, or continued with
        silence, to the duration of the frames.
        Raises MediaError if the settings announce no sound, for more than two channels, or NaN.
        """
        stereo = delivered_sound(waveform, self._settings)
        self._background.submit(partial(self._file.add_sound, stereo))


@contextmanager
def create_video(path: Path, settings: VideoSettings) -> Iterator[VideoWriter]:
    """Open an mp4 for writing; it appears as `path` when the block ends, and only without error.

    H.264 in 4:2:0, BT.709 limited range and tagged so, at exactly `settings.fps`; AAC stereo of
    exactly frames / fps seconds; the index in front, so that playback starts while downloading.
    Raises MediaError if the place cannot be written, an encoder is missing, no frame was written,
    or sound was announced and did not come.
    Source: LTX-2 400fd31 writes int(fps), leaves sound as long as it is, and rounds down in bf16.
    """
    if path.suffix.lower() not in (".mp4", ".m4v", ".mov"):
        raise MediaError(f"{path}: clips are written as .mp4 or .mov; change the suffix")
    with (
        written_beside(path) as unfinished,
        _Mp4File(unfinished, path, settings) as file,
        Background() as background,
    ):
        yield VideoWriter(file, settings, background)
        background.finish()
        file.finish()


class _Mp4File:
    """The container and its streams; used by one thread at a time."""

    def __init__(self, unfinished: Path, path: Path, settings: VideoSettings) -> None:
        self._path = path
        self._settings = settings
        self._frames = 0
        with media_errors(path, "start the clip"):
            self._container = av.open(
                str(unfinished.absolute()), "w", format="mp4", options={"movflags": _MOVFLAGS}
            )
        try:
            self._container.metadata.update(settings.metadata)
            self._video = _add_video(self._container, settings)
            self._sound = None if settings.audio_rate is None else _Sound(self._container, settings)
            with media_errors(path, "start the clip; check codec, preset and audio rate"):
                self._container.start_encoding()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        # Reached before `finish` only on the way out of an error, which matters more than ours.
        with contextlib.suppress(av.FFmpegError):
            self._container.close()

    def add_frames(self, planes: Iterable[Tensor]) -> None:
        """Encode packed I420 frames (3H/2, W), then the sound that goes with them."""
        for plane in planes:
            frame = VideoFrame.from_ndarray(plane.numpy(), format="yuv420p")
            frame.pts, frame.time_base = self._frames, 1 / self._settings.fps
            self._frames += 1
            self._encode(self._video, frame)
        self._encode_sound()

    def add_sound(self, stereo: Tensor) -> None:
        """Take sound (2, N), and encode what is due."""
        if self._sound is not None:
            self._sound.append(stereo)
            self._encode_sound()

    def finish(self) -> None:
        """Encode what is left, and complete the file."""
        if not self._frames:
            raise MediaError(f"{self._path}: no frame was written, nothing to save")
        if self._sound is not None:
            self._sound.end_at(self._settings.samples(self._frames), self._path)
            self._encode_sound()
            self._encode(self._sound.stream, None)
        self._encode(self._video, None)
        with media_errors(self._path, "complete the clip"):
            self._container.close()

    def _encode_sound(self) -> None:
        """Encode sound up to the last frame: a file mixed in time needs no seeking to play."""
        if self._sound is not None:
            for frame in self._sound.due(self._settings.samples(self._frames)):
                self._encode(self._sound.stream, frame)

    def _encode(
        self, stream: VideoStream | AudioStream, frame: VideoFrame | AudioFrame | None
    ) -> None:
        with media_errors(self._path, "encode"):
            self._container.mux(stream.encode(frame))  # type: ignore[arg-type]


class _Sound:
    """The sound that came and is not encoded yet."""

    def __init__(self, container: OutputContainer, settings: VideoSettings) -> None:
        self.rate = settings.audio_rate or 0
        self.stream = cast(AudioStream, _add_stream(container, "aac", self.rate, {}))
        self.stream.codec_context.layout = "stereo"
        self.stream.codec_context.bit_rate = settings.audio_bitrate
        self._waiting = torch.zeros(2, 0)
        self._encoded = 0

    def append(self, stereo: Tensor) -> None:
        self._waiting = torch.cat([self._waiting, stereo], dim=1)

    def end_at(self, samples: int, path: Path) -> None:
        """Cut or pad so that the whole track has that many samples."""
        if not self._encoded + self._waiting.shape[1]:
            raise MediaError(f"{path}: audio_rate is set, but no sound was written; set it to None")
        self._waiting = fit_length(self._waiting, samples - self._encoded)

    def due(self, samples: int) -> Iterator[AudioFrame]:
        """Yield what waits of the track's first `samples`, as a frame."""
        count = min(samples - self._encoded, self._waiting.shape[1])
        if count <= 0:
            return
        frame = AudioFrame.from_ndarray(
            self._waiting[:, :count].contiguous().numpy(), format="fltp", layout="stereo"
        )
        frame.sample_rate, frame.pts = self.rate, self._encoded
        frame.time_base = Fraction(1, self.rate)
        self._waiting = self._waiting[:, count:]
        self._encoded += count
        yield frame


def _add_video(container: OutputContainer, settings: VideoSettings) -> VideoStream:
    options = {
        "crf": str(settings.crf),
        "preset": settings.preset,
        # Chroma averaged over 2x2 pixels is sited at their centre, not at the left as by default.
        "x264-params": "chromaloc=1",
    }
    stream = cast(VideoStream, _add_stream(container, settings.codec, settings.fps, options))
    stream.width, stream.height, stream.pix_fmt = settings.width, settings.height, "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / settings.fps
    # PyAV's default cuts frames into slices, which costs quality; frame threads do not.
    context.thread_type = "FRAME"
    context.color_range = _LIMITED_RANGE
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    return stream


def _add_stream(
    container: OutputContainer, codec: str, rate: Fraction | int, options: dict[str, str]
) -> Stream:
    if codec not in av.codecs_available:
        raise MediaError(
            f"this build of PyAV has no encoder {codec!r}; install PyAV's own wheel "
            "(pip install --force-reinstall av), or write PNG frames and WAV instead"
        )
    return container.add_stream(codec, rate=rate, options=options)
