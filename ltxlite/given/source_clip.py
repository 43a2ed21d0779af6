"""Which frames, latents and samples of an existing clip a job makes anew, and which it keeps.

Pure arithmetic of times; all of it in frames of the job's rate, counted from the clip's first.
Source: LTX-2 400fd31 retake ("outward"); KJNodes LTXV masks ("inward"); features.md I3.
"""

from dataclasses import dataclass
from fractions import Fraction

from ltxlite.conditions import Interval, Source
from ltxlite.geometry import AudioGrid, LatentGrid

# Times in a job file are decimal: what is nearer to a frame's edge than this lies on it.
_DIGITS = 3
EVERYTHING: Interval = (0.0, float(1 << 20))


@dataclass(frozen=True, slots=True)
class Span:
    """Things numbered start..stop-1; empty if stop is not above start."""

    start: int
    stop: int

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing in it."""
        return self.stop <= self.start

    def __contains__(self, number: int) -> bool:
        return self.start <= number < self.stop

    def within(self, count: int) -> "Span":
        """Return the part of it that is among `count` things."""
        return Span(max(self.start, 0), min(self.stop, count))


NOTHING = Span(0, 0)


def picture_interval(source: Source) -> Interval | None:
    """Return the seconds in which the picture is made anew; a mask or denoise alone mean all."""
    if source.video is None and (source.mask is not None or source.denoise is not None):
        return EVERYTHING
    return source.video


def picture_latents(source: Source, frames: int, rate: Fraction, grid: LatentGrid) -> Span:
    """Return the latent frames of a clip of so many pixel frames that are made anew.

    Outward: all that touch the interval; latent k > 0 is shown at pixel frames 8k - 7 to 8k.
    Inward: those that lie in it, its ends being rounded to pixel frames first.
    """
    interval = picture_interval(source)
    if interval is None:
        return NOTHING
    begin, end = (_frames(second, rate) for second in interval)
    count = grid.latent_frames(frames)
    firsts = [grid.first_frame(number) for number in range(count + 1)]
    if source.edge == "outward":
        touched = [k for k in range(count) if firsts[k + 1] > begin and firsts[k] < end]
        return Span(touched[0], touched[-1] + 1) if touched else NOTHING
    rounded = round(begin), round(end)
    start = next((k for k in range(count) if firsts[k] >= rounded[0]), count)
    if rounded[1] >= frames:
        return Span(start, count)
    stop = max(k for k in range(count) if firsts[k] <= rounded[1])
    return Span(start, stop)


def picture_frames(source: Source, frames: int, rate: Fraction, grid: LatentGrid) -> Span:
    """Return the pixel frames of the clip that are made anew: those of `picture_latents`."""
    latents = picture_latents(source, frames, rate, grid)
    if latents.is_empty:
        return NOTHING
    return Span(grid.first_frame(latents.start), grid.first_frame(latents.stop))


def sound_latents(source: Source, count: int, grid: AudioGrid) -> Span:
    """Return the audio latents, of `count`, that are made anew.

    Outward: all that touch the interval; latent j is heard over mel frames 4j - 3 to 4j.  Inward:
    the ends rounded to latents, the last one included.
    """
    if source.audio is None:
        return NOTHING
    if source.edge == "inward":
        start, stop = (round(second * grid.latents_per_second) for second in source.audio)
        return Span(start, stop + 1).within(count)
    begin, end = (round(second * grid.rate / grid.hop, _DIGITS) for second in source.audio)
    touched = [j for j in range(count) if _mel(j + 1, grid) > begin and _mel(j, grid) < end]
    return Span(touched[0], touched[-1] + 1) if touched else NOTHING


def sound_samples(source: Source, count: int, rate: int, grid: AudioGrid) -> Span:
    """Return the samples at `rate` Hz that the remade audio latents are heard over.

    The last latent of a clip also stands for what comes after it.
    """
    latents = sound_latents(source, count, grid)
    if latents.is_empty:
        return NOTHING
    edges = [_mel(number, grid) * grid.hop * rate / grid.rate for number in (latents.start,)]
    stop = _mel(latents.stop, grid) * grid.hop * rate / grid.rate
    end = 1 << 40 if latents.stop == count else round(stop)
    return Span(round(edges[0]), end)


def _frames(second: float, rate: Fraction) -> float:
    return round(second * float(rate), _DIGITS)


def _mel(latent: int, grid: AudioGrid) -> int:
    """Return the mel frame at which a latent begins."""
    return max(0, grid.downsample * latent + 1 - grid.downsample)
