"""What a clip consists of in the end: what was made, and what is kept of the files it was made to.

A source's frames outside of what was made anew are those of its file, and so are its samples; they
do not pass through a network.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxlite.conditions import Source
from ltxlite.geometry import AudioGrid, LatentGrid
from ltxlite.given.filling import filled
from ltxlite.given.sound import delivered_original
from ltxlite.given.source import source_frames, source_sound
from ltxlite.given.source_clip import Span, picture_frames, sound_samples
from ltxlite.given.source_fit import Size, magnified
from ltxlite.given.source_mask import mask_frames, region_of
from ltxlite.media.colour_match import ColourMap, match_moments
from ltxlite.media.fit import Fit, as_pixels
from ltxlite.media.image import fit_cover
from ltxlite.media.stereo import change_rate, splice
from ltxlite.media.timing import Timing, read_timing
from ltxlite.request import Request

Sound = tuple[Tensor, int]
Mixer = Callable[[int, Tensor, Tensor], Tensor]
FADE = Fraction(1, 50)  # seconds over which kept sound passes into made sound
_COMPARED = 8  # kept frames by which colours are matched
_FEATHER = 8  # pixels over which a masked picture passes into a made one, inside the mask


@dataclass(frozen=True, slots=True)
class Grids:
    """How pixels and samples scale to latents."""

    picture: LatentGrid
    sound: AudioGrid


@dataclass(frozen=True, slots=True)
class Edit:
    """How a clip that was made lies in the source that it was made from.

    frames: of the source that are delivered, start..stop-1; below 0 and beyond its end they are
    made.  remade: the clip's own frames that are delivered.  own: (height, width) of the source's
    frames; size: the same, magnified.
    """

    source: Source
    timing: Timing
    frames: Span
    remade: Span
    own: Size
    size: Size

    @property
    def copies_picture(self) -> bool:
        """Tell whether the source's picture can be copied as it is stored."""
        return self.source.whole and self.remade.is_empty


def edit_of(request: Request, grids: Grids) -> Edit | None:
    """Return how a request's clip lies in its source; None without one.

    Raises MediaError if the source cannot be read.
    """
    source = request.conditions.source
    if source is None:
        return None
    timing = read_timing(Path(source.path))
    remade = picture_frames(source, request.frames, request.rate, grids.picture)
    first = next(iter(source_frames(source, timing, request.rate, 0, 1)))
    frames = Span(source.offset, source.offset + request.frames)
    if source.whole:
        frames = _whole(source, timing.count(request.rate), remade, request.rate)
    own = first.shape[0], first.shape[1]
    return Edit(source, timing, frames, remade, own, magnified(source, own))


def delivered_size(request: Request, edit: Edit | None) -> tuple[int, int]:
    """Return (width, height) of the clip as it is written: even, as H.264 wants it."""
    if edit is None or not edit.source.whole:
        left, above, right, below = request.output.cut
        uncut = request.width - left - right, request.height - above - below
        return request.output.crop or uncut
    return edit.size[1] // 2 * 2, edit.size[0] // 2 * 2


def delivered_frames(
    request: Request, edit: Edit | None, made: Iterator[Tensor], grids: Grids
) -> Iterator[Tensor]:
    """Yield the frames of the clip (f, 3, H, W) in about [-1, 1].

    made: all frames of the clip that was made, in pieces (f, 3, H, W).  Frames of a source are
    those of its file, bit for bit once they are 8 bits again.
    """
    if edit is None:
        return made
    return _composed(request, edit, made, grids)


def delivered_sound(request: Request, edit: Edit | None, made: Sound, grids: Grids) -> Sound | None:
    """Return the sound of the clip: what was made, what was given, or one inside the other.

    None: the source is silent, and no sound was asked for.
    """
    given = delivered_original(request, made)
    if given is not None:
        return given
    if edit is None or request.conditions.sound is not None:
        return made
    return _spliced(request, edit, made, grids)


def _whole(source: Source, count: int, remade: Span, rate: Fraction) -> Span:
    """Return the source's frames and what was made before its first and after its last."""
    if source.video is None or remade.is_empty:
        return Span(0, count)
    begin, end = (source.offset + round(second * rate) for second in map(Fraction, source.video))
    first = max(begin, source.offset + remade.start)
    return Span(min(0, first), max(count, min(end, source.offset + remade.stop)))


def _composed(
    request: Request, edit: Edit, made: Iterator[Tensor], grids: Grids
) -> Iterator[Tensor]:
    source, frames = edit.source, edit.frames
    kept = source_frames(source, edit.timing, request.rate, frames.start, frames.stop)
    size = (request.height, request.width)
    fit, mixed = Fit.inside(edit.size, size), _mixer(request, edit, grids)
    singles = (piece[index : index + 1] for piece in made for index in range(len(piece)))
    colours, reached = _Colours(), 0
    for number, original in enumerate(kept, start=frames.start - source.offset):
        if number not in edit.remade:
            pixels = _kept_pixels(request, edit, original)
            colours.keep(number, pixels)
            yield pixels
            continue
        while reached <= number:
            frame = next(singles).float()
            frame = fit.back(frame).cpu() if source.whole else frame.cpu()
            colours.compare(reached, frame)
            reached += 1
        if source.match:
            frame = colours.matched(frame)
        yield mixed(number, original, frame)


def _kept_pixels(request: Request, edit: Edit, original: Tensor) -> Tensor:
    """Return a source's frame (H, W, 3) as it is delivered: (1, 3, height, width) in [-1, 1]."""
    if not edit.source.whole:
        return fit_cover(original, request.height, request.width)[None]
    if edit.size == edit.own:
        return as_pixels(original)
    return Fit(*edit.size, *edit.size, *edit.size).forth(original)[None]


def _mixer(request: Request, edit: Edit, grids: Grids) -> Mixer:
    """Return how a made frame is put into the source's (H, W, 3), by the number of the frame."""
    source = edit.source
    if source.fill:
        masks = mask_frames(request, source, edit.own)

        def blended(_: int, original: Tensor, made: Tensor) -> Tensor:
            mask = F.interpolate(next(masks)[None, None], edit.size, mode="nearest")
            kept = _kept_pixels(request, edit, original)
            return filled(made, kept, mask, source, is_last=True)

        return blended
    if source.mask is not None:
        regions = _regions(request, edit, grids)
        return lambda number, original, made: torch.lerp(
            _kept_pixels(request, edit, original), made, regions[number]
        )
    return lambda _number, _original, made: made


class _Colours:
    """What coding does to colours, seen on kept frames right before what is made anew."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        self._decoded: dict[int, Tensor] = {}
        self._map: ColourMap | None = None

    def keep(self, number: int, pixels: Tensor) -> None:
        """Remember a kept frame (1, 3, H, W) of the clip as it is in the file."""
        self._kept[number] = pixels
        self._kept.pop(number - _COMPARED, None)

    def compare(self, number: int, frame: Tensor) -> None:
        """Remember it as it was decoded."""
        if self._map is None and number in self._kept:
            self._decoded[number] = frame

    def matched(self, frame: Tensor) -> Tensor:
        """Return a made frame with the difference undone; as it is where nothing was kept."""
        if self._map is None and self._decoded:
            decoded = torch.cat(list(self._decoded.values()))
            self._map = match_moments(decoded, torch.cat([self._kept[n] for n in self._decoded]))
            self._decoded.clear()
        return frame if self._map is None else self._map(frame)


def _regions(request: Request, edit: Edit, grids: Grids) -> "_Shares":
    size = (request.height, request.width)
    region = region_of(request, edit.source, grids.picture, size)
    return _Shares(region, edit, size, grids.picture)


class _Shares:
    """By frame, how much of each pixel is made anew: 0 outside of the latent places that are."""

    def __init__(self, region: Tensor, edit: Edit, size: tuple[int, int], grid: LatentGrid) -> None:
        self._region, self._edit, self._size, self._grid = region, edit, size, grid

    def __getitem__(self, frame: int) -> Tensor:
        """Return (1, 1, H, W) for one frame of the clip."""
        places = self._region[self._grid.latent_index(frame)][None, None]
        pixels = places.repeat_interleave(self._grid.space, 2).repeat_interleave(
            self._grid.space, 3
        )
        if self._edit.source.whole:
            fit = Fit.inside(self._edit.size, self._size)
            pixels = pixels[..., : fit.rows, : fit.columns]
            pixels = F.interpolate(pixels, self._edit.size, mode="nearest")
        return _feathered(pixels)


def _feathered(mask: Tensor) -> Tensor:
    """Soften the inside of a mask's border; outside it stays 0. Picture borders are no border."""
    width = 2 * _FEATHER + 1
    padded = F.pad(mask, (_FEATHER,) * 4, mode="replicate")
    shrunk = -F.max_pool2d(-padded, width, stride=1)
    again = F.pad(shrunk, (_FEATHER,) * 4, mode="replicate")
    return F.avg_pool2d(again, width, stride=1) * mask


def _spliced(request: Request, edit: Edit, made: Sound, grids: Grids) -> Sound | None:
    start = edit.frames.start / request.rate
    duration = (edit.frames.stop - edit.frames.start) / request.rate
    if edit.copies_picture:
        duration = edit.timing.end
    waveform, rate = made
    sound = source_sound(edit.source, start, duration)
    if sound is None and not edit.source.whole:
        return made
    if sound is None and edit.source.audio is None:
        return None
    if sound is None:
        original = torch.zeros(2, round(duration * rate))
    else:
        original, rate = sound.waveform, sound.rate
    count = grids.sound.latent_frames(request.frames, request.rate)
    remade = sound_samples(edit.source, count, rate, grids.sound)
    if remade.is_empty:
        return original, rate
    part = change_rate(waveform.cpu().float(), made[1], rate)[:, remade.start : remade.stop]
    begin = round((edit.source.offset / request.rate - start) * rate) + remade.start
    return splice(original, part, begin, round(FADE * rate)), rate
