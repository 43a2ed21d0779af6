"""When the frames of a clip are shown, and the same clip at a constant rate.

Phones and screen recorders store frames as they come; a model wants them evenly spaced.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.container import open_media, video_stream
from ltxlite.media.video_reader import iter_frames

_USUAL_RATES = tuple(
    Fraction(*pair)
    for pair in (
        *((24000, 1001), (24, 1), (25, 1), (30000, 1001), (30, 1)),
        *((48, 1), (50, 1), (60000, 1001), (60, 1)),
    )
)
# Half of what lies between 23.976 and 24.
_USUAL_WITHIN = Fraction(1, 2000)
_MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True, slots=True)
class Timing:
    """When a clip's frames are shown.

    starts: the seconds at which they appear, the first at 0.  end: when the last one goes.  rate:
    frames per second, exact; of a clip of variable rate the average, simplified.
    """

    starts: tuple[Fraction, ...]
    end: Fraction
    rate: Fraction

    @property
    def is_constant(self) -> bool:
        """Tell whether every frame appears where its number at the clip's rate says."""
        slack = Fraction(1, 2) / self.rate
        places = (abs(start - number / self.rate) for number, start in enumerate(self.starts))
        return max(places) < slack

    def count(self, fps: Fraction) -> int:
        """Return how many frames the clip has at a constant rate."""
        return max(1, round(self.end * fps))

    def numbers(self, fps: Fraction) -> list[int]:
        """Return, for each frame at a constant rate, the number of the frame nearest in time.

        At a clip's own constant rate that is 0, 1, 2 ...; of two equally near the earlier counts.
        """
        return [self._nearest(number / fps) for number in range(self.count(fps))]

    def _nearest(self, moment: Fraction) -> int:
        after = bisect_left(self.starts, moment)
        if after == 0:
            return 0
        if after == len(self.starts):
            return after - 1
        before = after - 1
        is_after = self.starts[after] - moment < moment - self.starts[before]
        return after if is_after else before


def read_timing(path: Path) -> Timing:
    """Read when a clip's frames are shown, from its packets; nothing is decoded.

    Raises MediaError if the file is missing, no video, or has no times.
    """
    with open_media(path) as container:
        stream = video_stream(container, path)
        packets = [
            (packet.pts, packet.duration or 0)
            for packet in container.demux(stream)
            if packet.pts is not None and not packet.is_discard
        ]
        unit = stream.time_base
        hints = [Fraction(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    if not packets or unit is None:
        raise MediaError(f"{path}: its frames have no times; convert it to an mp4 first")
    packets.sort()
    starts = tuple((pts - packets[0][0]) * unit for pts, _ in packets)
    if len(starts) == 1:
        shown = packets[0][1] * unit or (1 / hints[0] if hints else Fraction(1, 25))
        return Timing(starts, shown, hints[0] if hints else 1 / shown)
    rate = _rate(starts, unit, hints)
    timing = Timing(starts, len(starts) / rate, rate)
    if timing.is_constant:  # how long the last frame is shown, many writers get wrong
        return timing
    return Timing(starts, starts[-1] + (packets[-1][1] * unit or 1 / rate), rate)


def _rate(starts: tuple[Fraction, ...], unit: Fraction, hints: list[Fraction]) -> Fraction:
    """Return the rate whose frames these are, to a tick of the file; else the average."""
    # A header's average is off by what the last frame's duration is.
    usual = [rate for rate in hints if rate in _USUAL_RATES]
    simple = [rate.limit_denominator(1001) for rate in hints]
    for rate in (*usual, *_USUAL_RATES, *simple, *hints):
        if _fits(rate, starts, unit):
            return rate
    for rate in _USUAL_RATES:  # copied from a file that counts milliseconds
        if _fits(rate, starts, _MILLISECOND):
            return rate
    average = (len(starts) - 1) / starts[-1] if starts[-1] else Fraction(25)
    nearest = min(_USUAL_RATES, key=lambda usual: abs(usual - average))
    if abs(nearest - average) <= nearest * _USUAL_WITHIN:
        return nearest
    return average.limit_denominator(1001)


def _fits(rate: Fraction, starts: tuple[Fraction, ...], slack: Fraction) -> bool:
    """Tell whether frames at a rate would begin then; from the far end, where it is seen first."""
    numbers = range(len(starts) - 1, -1, -1)
    return all(abs(number / rate - starts[number]) <= slack for number in numbers)


def frames_at(path: Path, numbers: list[int]) -> Iterator[Tensor]:
    """Yield the frames of a clip with these rising numbers, some of them several times.

    Each is (H, W, 3) uint8 RGB as `iter_frames` gives it.
    Raises MediaError if the clip ends before the last of them.
    """
    if not numbers:
        return
    first, at = numbers[0], numbers[0] - 1
    decoded = iter_frames(path, first, numbers[-1] + 1)
    frame: Tensor | None = None
    for number in numbers:
        while at < number:
            frame, at = next(decoded, None), at + 1
        if frame is None:
            raise MediaError(f"{path}: ends before its frame {number}; it is damaged or cut off")
        yield frame
