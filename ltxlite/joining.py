"""Clips one after another as one clip: pictures cut, sound cross-faded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ltxlite.conditions import Source
from ltxlite.errors import RequestError
from ltxlite.given.source import source_frames, source_sound
from ltxlite.media.fit import as_pixels
from ltxlite.media.stereo import change_rate
from ltxlite.media.timing import Timing, read_timing
from ltxlite.media.video_reader import iter_frames


@dataclass(frozen=True, slots=True)
class Joint:
    """Clips that shall become one, at the rate of the first.

    size: (height, width) of all of them.  overlap: frames with which each clip shows again what
    the one before it ended with; they are left out of its picture.
    """

    paths: tuple[Path, ...]
    timings: tuple[Timing, ...]
    size: tuple[int, int]
    overlap: int = 0

    @property
    def rate(self) -> Fraction:
        """Frames per second of the whole."""
        return self.timings[0].rate

    @property
    def counts(self) -> tuple[int, ...]:
        """Frames of each clip, at the rate of the whole."""
        return tuple(timing.count(self.rate) for timing in self.timings)

    @property
    def starts(self) -> tuple[int, ...]:
        """The frame of the whole with which each clip's first one coincides."""
        starts = [0]
        for count in self.counts[:-1]:
            starts.append(starts[-1] + count - self.overlap)
        return tuple(starts)

    @property
    def frames(self) -> int:
        """Frames of the whole."""
        return self.starts[-1] + self.counts[-1]


def open_joint(paths: Sequence[Path], overlap: int) -> Joint:
    """Read what must be known of clips to join them.

    Raises RequestError for fewer than two, other sizes, or an overlap as long as a clip.
    """
    if len(paths) < 2:
        raise RequestError("join: wanted two clips or more")
    sizes = {path: tuple(next(iter_frames(path, 0, 1)).shape[:2]) for path in paths}
    for path, size in sizes.items():
        if size != sizes[paths[0]]:
            raise RequestError(
                f"{path}: is {size[1]}x{size[0]}, {paths[0]} is {sizes[paths[0]][1]}x"
                f"{sizes[paths[0]][0]}; wanted one size"
            )
    height, width = sizes[paths[0]]
    joint = Joint(tuple(paths), tuple(map(read_timing, paths)), (height, width), overlap)
    if not 0 <= overlap < min(joint.counts):
        raise RequestError(
            f"--overlap {overlap}: wanted 0 or more, and less than the shortest clip's "
            f"{min(joint.counts)} frames"
        )
    return joint


def joined_frames(joint: Joint) -> Iterator[Tensor]:
    """Yield the frames of the whole, (1, 3, H, W), 8 bits as in their files."""
    clips = zip(joint.paths, joint.timings, joint.counts, strict=True)
    for number, (path, timing, count) in enumerate(clips):
        first = joint.overlap if number else 0
        frames = source_frames(Source(str(path)), timing, joint.rate, first, count)
        yield from map(as_pixels, frames)


def joined_sound(joint: Joint, fade: Fraction) -> tuple[Tensor, int] | None:
    """Return the sound of the whole, (2, N) and its rate; None if no clip has any.

    Where clips overlap, one passes into the other over the middle `fade` seconds of that, at equal
    gain; where they do not, each passes into silence and out of it over half of them.
    """
    sounds = [_sound_of(joint, number) for number in range(len(joint.paths))]
    rates = [rate for sound, rate in filter(None, sounds)]
    if not rates:
        return None
    rate = rates[0]
    whole = torch.zeros(2, round(joint.frames / joint.rate * rate))
    for number, sound in enumerate(sounds):
        if sound is not None:
            begin = round(joint.starts[number] / joint.rate * rate)
            part = _faded(joint, number, change_rate(*sound, rate), round(fade * rate), rate)
            room = whole[:, begin : begin + part.shape[1]]
            room += part[:, : room.shape[1]]
    return whole, rate


def _sound_of(joint: Joint, number: int) -> tuple[Tensor, int] | None:
    source = Source(str(joint.paths[number]))
    sound = source_sound(source, Fraction(0), joint.counts[number] / joint.rate)
    return None if sound is None else (sound.waveform, sound.rate)


def _faded(joint: Joint, number: int, sound: Tensor, fade: int, rate: int) -> Tensor:
    """Return a clip's sound with its ends faded where another clip joins it."""
    overlap = round(joint.overlap / joint.rate * rate)
    length = min(fade, overlap) if overlap else fade // 2
    silent = (overlap - length) // 2 if overlap else 0
    ramp = torch.cat([torch.zeros(silent), (torch.arange(length) + 0.5) / max(length, 1)])
    ramp = torch.cat([ramp, torch.ones(max(overlap - len(ramp), 0))])[: sound.shape[1]]
    sound = sound.clone()
    if number:
        sound[:, : len(ramp)] *= ramp
    if number < len(joint.paths) - 1 and len(ramp):
        leaving = 1 - ramp if overlap else ramp.flip(0)
        sound[:, -len(ramp) :] *= leaving
    return sound
