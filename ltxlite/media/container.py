"""Media containers opened for reading, and FFmpeg's errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import av
import av.error

from ltxlite.errors import MediaError

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

StreamT = TypeVar("StreamT", "VideoStream", "AudioStream")


@contextmanager
def media_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn what FFmpeg raises into a MediaError that names the file and what was being done."""
    try:
        yield
    except av.error.InvalidDataError as error:
        raise MediaError(f"{path}: cannot {doing}; the file is damaged or cut off") from error
    except av.error.FFmpegError as error:
        raise MediaError(f"{path}: cannot {doing} ({error.strerror or error})") from error


@contextmanager
def open_media(path: Path) -> Iterator["InputContainer"]:
    """Open a media file for reading, and close it at the end of the block.

    Raises MediaError if it is missing, unreadable or no media file, or if decoding fails inside.
    """
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    try:
        container = av.open(
            str(path.absolute()),  # a relative "a:b.mp4" would be taken for a protocol
            options={"protocol_whitelist": "file"},  # a playlist must not reach into the network
            metadata_errors="replace",  # tags in another encoding do not spoil the pictures
        )
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(
            f"{path}: is no video or sound file, or a damaged one ({error.strerror})"
        ) from error
    with container, media_errors(path, "read on"):
        yield container


def video_stream(container: "InputContainer", path: Path) -> "VideoStream":
    """Return the first picture stream of a file; raise MediaError if it has none to decode."""
    if not container.streams.video:
        raise MediaError(f"{path}: has no pictures, only sound")
    return _decodable(container.streams.video[0], path)


def sound_stream(container: "InputContainer", path: Path) -> "AudioStream":
    """Return the first sound stream of a file; raise MediaError if it has none to decode."""
    if not container.streams.audio:
        raise MediaError(f"{path}: has no sound track")
    return _decodable(container.streams.audio[0], path)


def decoded_video(
    container: "InputContainer", stream: "VideoStream", path: Path
) -> Iterator["VideoFrame"]:
    """Yield the frames of a video stream; a file cut off in the middle is a MediaError."""
    for packet in container.demux(stream):
        _require_intact(packet, path)
        yield from packet.decode()


def decoded_audio(
    container: "InputContainer", stream: "AudioStream", path: Path
) -> Iterator["AudioFrame"]:
    """Yield the frames of a sound stream; a file cut off in the middle is a MediaError."""
    for packet in container.demux(stream):
        _require_intact(packet, path)
        yield from packet.decode()


def read_metadata(path: Path) -> dict[str, str]:
    """Read the tags of a media file, among them the job that made it.

    Raises MediaError if the file is missing or no media file.
    """
    with open_media(path) as container:
        return dict(container.metadata)


def _decodable(stream: StreamT, path: Path) -> StreamT:
    # PyAV's types do not say it: without a decoder for the codec there is no context.
    if getattr(stream, "codec_context", None) is None:
        raise MediaError(f"{path}: its {stream.type} codec is unknown here; convert it to H.264")
    return stream


def _require_intact(packet: "Packet[VideoStream] | Packet[AudioStream]", path: Path) -> None:
    if packet.is_corrupt:
        raise MediaError(f"{path}: ends in the middle; copy or download the file again")
