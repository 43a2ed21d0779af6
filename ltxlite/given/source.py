"""An existing clip that is given: its frames on the model's grid, encoded for each stage."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ltxlite.conditions import Source
from ltxlite.errors import MediaError, RequestError
from ltxlite.given import GivenSource
from ltxlite.given.footage import Footage, open_footage
from ltxlite.given.footage_latents import encode_footage
from ltxlite.given.sound import encode_waveform
from ltxlite.given.source_fit import Size, source_fit
from ltxlite.given.source_mask import check_mask, region_of
from ltxlite.media.audio import fit_length
from ltxlite.media.image import fit_cover
from ltxlite.media.stereo import StereoSound, read_stereo
from ltxlite.media.timing import Timing, frames_at, read_timing
from ltxlite.media.video_reader import read_video_info
from ltxlite.networks import Networks
from ltxlite.progress import Clock
from ltxlite.request import Request


def check_source(request: Request) -> None:
    """Refuse, before anything is loaded, a source that cannot be read or does not fit the job.

    Raises MediaError or RequestError.
    """
    source = request.conditions.source
    if source is None:
        return
    what = f"source {source.path}"
    if source.whole and request.conditions.sound is not None:
        raise RequestError(f"{what}: is delivered whole, with its own sound; leave --audio out")
    if source.held and max(source.held) > len(request.stages):
        raise RequestError(f"{what}: held in stages {source.held} of {len(request.stages)}")
    for name, interval in (("video", source.video), ("audio", source.audio)):
        if interval is not None and interval[0] >= request.seconds:
            raise RequestError(
                f"{what}: {name} from {interval[0]:g} s on, but the clip has "
                f"{float(request.seconds):.3f} s"
            )
    timing = read_timing(Path(source.path))
    first = next(source_frames(source, timing, request.rate, 0, 1))
    if source.mask is not None:
        check_mask(request, source, first)


def encode_source(
    request: Request, networks: Networks, clock: Clock
) -> Sequence[GivenSource | None]:
    """Encode the existing clip that a request names, at the size of each stage.

    Frames before its beginning and after its end repeat the first and the last one; sound there
    is silence.  Raises MediaError if it cannot be read.
    """
    source = request.conditions.source
    if source is None:
        return [None] * len(request.stages)
    clock.begin("encode source", len(request.stages))
    timing = read_timing(Path(source.path))
    if not timing.is_constant or timing.rate != request.rate:
        kind = f"{float(timing.rate):.6g} fps" if timing.is_constant else "variable frame rate"
        clock.note(f"{source.path}: {kind}, brought to {request.fps} fps by the nearest frames")
    missing = source.offset + request.frames - timing.count(request.rate)
    if missing > 0 and not source.whole:
        clock.note(f"{source.path}: ends {missing} frames before the clip; its last one stays")
    audio = _encode_sound(request, source, networks, clock)
    given = []
    for number, size in enumerate(_sizes(request), start=1):
        video = _encode_picture(request, timing, networks, size)
        region = None
        if source.mask is not None and not source.fill:
            region = region_of(request, source, networks.latent_grid(), size)
        given.append(GivenSource(video, audio, region))
        clock.advance(number)
    return given


def source_frames(
    source: Source, timing: Timing, rate: Fraction, start: int, stop: int
) -> Iterator[Tensor]:
    """Yield the source's frames start..stop-1 at a rate, each (H, W, 3) uint8.

    Numbers before its first and beyond its last frame give these again. On a larger canvas the
    picture's edges are repeated.
    """
    numbers = timing.numbers(rate)
    last = len(numbers) - 1
    wanted = [numbers[min(max(number, 0), last)] for number in range(start, stop)]
    return (on_canvas(frame, source) for frame in frames_at(Path(source.path), wanted))


def source_footage(request: Request, source: Source) -> Footage:
    """Return a source's frames as the clip has them: from its offset on, ends repeated."""
    footage = open_footage(source.path, request.rate)
    numbers = footage.numbers
    if numbers is None:
        raise MediaError(f"source {source.path}: is a still, wanted a video")
    last, wanted = len(numbers) - 1, range(source.offset, source.offset + request.frames)
    shown = tuple(numbers[min(max(number, 0), last)] for number in wanted)
    return replace(footage, numbers=shown)


def on_canvas(frame: Tensor, source: Source) -> Tensor:
    """Return a frame (H, W, 3) on the canvas that a source is to have, its edges repeated."""
    if not any(source.pad):
        return frame
    left, above, right, below = source.pad
    height, width = frame.shape[:2]
    rows = torch.arange(-above, height + below).clamp(0, height - 1)
    columns = torch.arange(-left, width + right).clamp(0, width - 1)
    return frame[rows][:, columns]


def source_sound(source: Source, start: Fraction, duration: Fraction) -> StereoSound | None:
    """Read the source's sound from a second of its picture on, at exactly a length.

    What lies before its beginning or after its end is silence.  None for a silent source.
    """
    path = Path(source.path)
    info = read_video_info(path)
    if info.audio_rate is None:
        return None
    try:
        sound = read_stereo(path, start - info.sound_delay, duration)
    except MediaError:
        if start <= 0:
            raise
        sound = read_stereo(path, 0, Fraction(1, 10))  # the track ends before: all is silence
        sound = StereoSound(sound.waveform[:, :0], sound.rate, sound.remarks)
    return StereoSound(
        fit_length(sound.waveform, round(duration * sound.rate)), sound.rate, sound.remarks
    )


def _encode_picture(request: Request, timing: Timing, networks: Networks, size: Size) -> Tensor:
    """Encode the clip's frames at (height, width)."""
    source = request.conditions.source
    assert source is not None
    frames = source_frames(
        source, timing, request.rate, source.offset, source.offset + request.frames
    )
    encoder = networks.video_encoder()
    pixels = (placed(request, source, frame, size)[None, :, None] for frame in frames)
    return encode_footage(request, networks, encoder, pixels)


def placed(request: Request, source: Source, frame: Tensor, size: Size) -> Tensor:
    """Bring a frame (H, W, 3) to (3, *size): all of it where it must come back, else its middle."""
    if source.whole:
        return source_fit(request, source, (frame.shape[0], frame.shape[1]), size).forth(frame)
    return fit_cover(frame, *size)


def _encode_sound(
    request: Request, source: Source, networks: Networks, clock: Clock
) -> Tensor | None:
    if request.conditions.sound is not None:
        return None  # that replaces the source's
    sound = source_sound(source, source.offset / request.rate, request.seconds)
    if sound is None:
        clock.note(f"{source.path}: has no sound track")
        return None
    for remark in sound.remarks:
        clock.note(f"{source.path}: {remark}")
    count = networks.audio_grid().latent_frames(request.frames, request.rate)
    return encode_waveform(networks, sound.waveform, sound.rate, count)


def _sizes(request: Request) -> list[tuple[int, int]]:
    """Return (height, width) of each stage's frames."""
    sizes = []
    for stage in request.stages:
        height, width = (side * stage.fraction for side in (request.height, request.width))
        sizes.append((int(height), int(width)))
    return sizes
