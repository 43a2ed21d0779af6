"""Writes the finished clip: frames and sound as they are decoded, or beside copied pictures."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltxlite.delivery import (
    Edit,
    Grids,
    Sound,
    delivered_frames,
    delivered_size,
    delivered_sound,
    edit_of,
)
from ltxlite.media.audio import fit_length, write_wav
from ltxlite.media.colour_match import match_covariance
from ltxlite.media.frame_writer import FrameWriter, create_frames
from ltxlite.media.image import load_image
from ltxlite.media.output import VideoSettings
from ltxlite.media.remux import replace_sound
from ltxlite.media.sound_writer import check_sound_file, write_sound
from ltxlite.media.video_writer import VideoWriter, create_video
from ltxlite.progress import Clock
from ltxlite.request import Request

JOB_TAG = "ltxlite_job"


@dataclass(frozen=True, slots=True)
class Made:
    """What the decoders give: pieces (f, 3, H, W) in about [-1, 1]; waveform (2, N) and rate."""

    frames: Iterator[Tensor]
    sound: Sound


@dataclass(frozen=True, slots=True)
class Written:
    """What the clip is like in the end: its frames, and (width, height)."""

    frames: int
    size: tuple[int, int]


def check_output(request: Request) -> None:
    """Refuse, before any work, a place that cannot hold sound alone, colours of no picture.

    Raises MediaError.
    """
    if request.output.match is not None:
        load_image(Path(request.output.match))
    if not request.picture:
        check_sound_file(Path(request.output.path))


def write_sound_alone(request: Request, sound: Sound) -> Written:
    """Write a job that makes no picture, as long as it says."""
    waveform, rate = sound
    exact = fit_length(waveform.cpu().float(), round(request.seconds * rate))
    write_sound(Path(request.output.path), exact, rate, _tags(request))
    if request.output.wav is not None:
        write_wav(Path(request.output.wav), exact, rate)
    return Written(request.frames, (0, 0))


def write_clip(request: Request, made: Made, grids: Grids, clock: Clock) -> Written:
    """Write the clip where the request says, as its frames come.

    Where all of a source's picture is kept, it is copied as it is stored, and nothing is decoded.
    """
    edit = edit_of(request, grids)
    sound = _trimmed(request, delivered_sound(request, edit, made.sound, grids))
    if edit is not None and edit.copies_picture and sound and Path(request.output.path).suffix:
        clock.note(f"{edit.source.path}: its picture is copied as it is stored")
        replace_sound(Path(edit.source.path), Path(request.output.path), sound, _tags(request))
        written = Written(len(edit.timing.starts), (edit.size[1], edit.size[0]))
    else:
        frames = without_first(delivered_frames(request, edit, made.frames, grids), request)
        frames = recoloured(frames, request)
        count = _write(request, edit, frames, sound, clock)
        written = Written(count, delivered_size(request, edit))
    if request.output.wav is not None and sound is not None:
        write_wav(Path(request.output.wav), *sound)
    return written


def without_first(frames: Iterator[Tensor], request: Request) -> Iterator[Tensor]:
    """Yield pieces (f, 3, H, W) less the frames that the request trims off the beginning."""
    left = request.output.trim
    for piece in frames:
        kept = piece[left:]
        left = max(0, left - len(piece))
        if len(kept):
            yield without_borders(kept, request)


def recoloured(frames: Iterator[Tensor], request: Request) -> Iterator[Tensor]:
    """Yield pieces (f, 3, H, W), each frame with the colours of the picture that is asked for.

    Frame by frame, so that a drift over the clip goes too. Source: features.md K (ColorMatch, mkl).
    """
    output = request.output
    if output.match is None:
        yield from frames
        return
    reference = load_image(Path(output.match)).movedim(-1, 0)[None].float() / 127.5 - 1
    for piece in frames:
        mapped = [match_covariance(frame[None].cpu(), reference)(frame) for frame in piece]
        yield piece.lerp(torch.stack(mapped), output.match_share)


def without_borders(frames: Tensor, request: Request) -> Tensor:
    """Return frames (f, 3, H, W) less the borders that the request cuts off; a view."""
    left, above, right, below = request.output.cut
    height, width = frames.shape[-2:]
    return frames[..., above : height - below, left : width - right]


def _trimmed(request: Request, sound: Sound | None) -> Sound | None:
    if sound is None or not request.output.trim:
        return sound
    waveform, rate = sound
    return waveform[:, round(request.output.trim / request.rate * rate) :], rate


def _write(
    request: Request,
    edit: Edit | None,
    frames: Iterator[Tensor],
    sound: Sound | None,
    clock: Clock,
) -> int:
    done = 0
    with _writer(request, edit, None if sound is None else sound[1]) as writer:
        if sound is not None:
            writer.write_audio(sound[0])
        for piece in frames:
            writer.write(piece)
            done += len(piece)
            clock.advance(min(done, request.frames))
    return done


def _writer(
    request: Request, edit: Edit | None, rate: int | None
) -> AbstractContextManager[VideoWriter | FrameWriter]:
    width, height = delivered_size(request, edit)
    settings = VideoSettings(
        width=width,
        height=height,
        fps=request.rate,
        audio_rate=rate,
        crf=request.output.crf,
        metadata=_tags(request),
    )
    path = Path(request.output.path)
    if path.suffix:
        return create_video(path, settings)
    return create_frames(path, settings)


def _tags(request: Request) -> dict[str, str]:
    return {JOB_TAG: request.to_json(), "comment": request.prompt[:200]}
