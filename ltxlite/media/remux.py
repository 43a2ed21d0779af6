"""A clip with another sound: its pictures copied as they are, not decoded."""

import io
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.video.stream import VideoStream
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.atomic import written_beside
from ltxlite.media.container import media_errors, open_media, video_stream

if TYPE_CHECKING:
    from av.packet import Packet

_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
_AUDIO_BITRATE = 192_000


def replace_sound(
    source: Path, target: Path, sound: tuple[Tensor, int], metadata: Mapping[str, str]
) -> None:
    """Write `source` to `target` with its first picture stream copied packet by packet.

    sound: stereo (2, N) fp32 in [-1, 1] and its rate; it begins with the first picture.
    Raises MediaError for a container that cannot hold the pictures' codec, and as the readers and
    writers do.
    """
    check_copy(source, target)
    with open_media(source) as pictures, written_beside(target) as unfinished:
        stream = video_stream(pictures, source)
        with media_errors(target, f"hold {stream.codec_context.name} pictures; try .mkv"):
            _write(pictures, stream, unfinished, sound, metadata)


def check_copy(source: Path, target: Path) -> None:
    """Raise MediaError, before any work, where the pictures cannot be copied to `target`."""
    if target.suffix.lower() not in _FORMATS:
        raise MediaError(f"{target}: copied pictures go into .mp4, .mov or .mkv; change the suffix")
    with open_media(source) as pictures:
        stream = video_stream(pictures, source)
        with av.open(io.BytesIO(), "w", format=_FORMATS[target.suffix.lower()]) as container:
            _template(container, stream)


def _write(
    pictures: InputContainer,
    stream: VideoStream,
    unfinished: Path,
    sound: tuple[Tensor, int],
    metadata: Mapping[str, str],
) -> None:
    kind = _FORMATS[unfinished.suffix.lower()]
    movflags = {} if kind == "matroska" else {"movflags": "+faststart+use_metadata_tags"}
    with av.open(str(unfinished.absolute()), "w", format=kind, options=movflags) as container:
        container.metadata.update(metadata)
        copied = _template(container, stream)
        coded = container.add_stream("aac", rate=sound[1])
        coded.codec_context.layout = "stereo"
        coded.codec_context.bit_rate = _AUDIO_BITRATE
        for packet in _packets(pictures, stream):
            packet.stream = copied
            container.mux(packet)
        _encode(container, coded, sound)


def _template(container: OutputContainer, stream: VideoStream) -> VideoStream:
    try:
        return container.add_stream_from_template(stream)
    except ValueError:
        raise MediaError(
            f"{stream.codec_context.name} pictures cannot be copied into this container; name a "
            ".mkv with -o, or convert the clip to H.264 first"
        ) from None


def _packets(pictures: InputContainer, stream: VideoStream) -> Iterator["Packet[VideoStream]"]:
    """Yield a stream's packets, the first picture shown at time 0, all with a decoding time.

    Matroska stores none; FFmpeg knows them only from behind the first pictures on.
    """
    waiting: list[Packet[VideoStream]] = []
    for packet in pictures.demux(stream):
        if packet.size == 0:  # the end
            continue
        waiting.append(packet)
        if packet.dts is not None:
            yield from _timed(waiting, stream.start_time or 0)
            waiting = []
    yield from _timed(waiting, stream.start_time or 0)


def _timed(packets: "list[Packet[VideoStream]]", origin: int) -> "list[Packet[VideoStream]]":
    last = packets[-1].dts if packets else None
    if packets and last is None:
        last = packets[-1].pts
    for number, packet in enumerate(packets):
        step = packet.duration or 1
        if last is not None:
            packet.dts = last - (len(packets) - 1 - number) * step - origin
        if packet.pts is not None:
            packet.pts -= origin
    return packets


def _encode(container: OutputContainer, coded: AudioStream, sound: tuple[Tensor, int]) -> None:
    waveform, rate = sound
    frame = AudioFrame.from_ndarray(
        waveform.clamp(-1, 1).contiguous().numpy(), format="fltp", layout="stereo"
    )
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    container.mux([*coded.encode(frame), *coded.encode(None)])
