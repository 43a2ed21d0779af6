"""Sparse motion tracks, drawn as the control video of the motion-track IC-LoRA.

A file of tracks is JSON: a list of tracks, each a list of {"x", "y"}, in pixels of the clip.
Source: ComfyUI-LTXVideo (sparse_tracks), restated in features.md F3.
"""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ltxlite.errors import MediaError

Point = tuple[float, float]
Track = tuple[Point, ...]

TRAIL = 50  # frames that a track leaves behind it
_RADII = (2.0, 8.0)  # of the oldest and the newest point, where the short side has 1080 pixels
_SHORT_SIDE = 1080
# From old to new: red, green, blue.
_RAMP = ((0.0, (0, 0, 255)), (1 / 3, (0, 255, 0)), (2 / 3, (255, 255, 0)), (1.0, (255, 0, 0)))
_MOST_BYTES, _MOST_POINTS, _FARTHEST = 16 << 20, 200_000, 1e6


def read_tracks(path: Path) -> tuple[Track, ...]:
    """Read the control points of tracks. Raises MediaError that names what is wrong."""
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    if path.stat().st_size > _MOST_BYTES:
        raise MediaError(f"{path}: tracks of more than {_MOST_BYTES >> 20} MiB")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MediaError(f"{path}: no tracks, which are JSON ({error})") from None
    if not isinstance(values, list) or not values or not all(isinstance(v, list) for v in values):
        raise MediaError(f'{path}: wanted tracks as [[{{"x": 1, "y": 2}}, ...], ...]')
    if sum(map(len, values)) > _MOST_POINTS:
        raise MediaError(f"{path}: has more than {_MOST_POINTS} points")
    tracks = tuple(
        tuple(_point(path, number, point) for point in track)
        for number, track in enumerate(values, start=1)
    )
    if not all(tracks):
        raise MediaError(f"{path}: track {tracks.index(()) + 1} has no points")
    return tracks


def resample(track: Track, count: int) -> list[Point]:
    """Return a track at so many frames: a uniform Catmull-Rom curve through its control points.

    Its ends are doubled; two points give a line, one stands still.
    """
    if len(track) == 1 or count == 1:
        return [track[0]] * count
    spacing = (len(track) - 1) / (count - 1)
    return [_on_curve(track, number * spacing) for number in range(count)]


def draw_tracks(
    tracks: Sequence[Track], chosen: Sequence[int], count: int, size: tuple[int, int]
) -> Iterator[Tensor]:
    """Yield frames (h, w, 3) uint8 of a clip of `count` frames, their short side 1080 pixels.

    chosen: which of them.  size: (height, width) of the clip, in whose pixels the tracks are.
    Colours go blue, green, red: so the LoRA's videos were stored.
    """
    scale = _SHORT_SIDE / min(size)
    canvas = round(size[1] * scale), round(size[0] * scale)
    paths = [[(x * scale, y * scale) for x, y in resample(track, count)] for track in tracks]
    for frame in chosen:
        picture = Image.new("RGB", canvas)
        _draw(ImageDraw.Draw(picture), paths, frame)
        yield torch.from_numpy(np.asarray(picture).copy()).flip(-1)


def _draw(draw: ImageDraw.ImageDraw, paths: Sequence[Sequence[Point]], frame: int) -> None:
    for age in range(min(TRAIL - 1, frame), -1, -1):  # the newest lies on top
        ratio = 1 - age / TRAIL
        radius = _RADII[0] + (_RADII[1] - _RADII[0]) * ratio
        for path in paths:
            x, y = path[frame - age]
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=_colour(ratio))


def _colour(ratio: float) -> tuple[int, int, int]:
    (low, first), (high, second) = next(
        pair for pair in pairwise(_RAMP) if ratio <= pair[1][0] or pair[1][0] == 1
    )
    share = (ratio - low) / (high - low)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _on_curve(track: Track, place: float) -> Point:
    index = min(int(place), len(track) - 2)
    first, last = track[index], track[index + 1]
    t = place - index
    if len(track) == 2:
        return first[0] + (last[0] - first[0]) * t, first[1] + (last[1] - first[1]) * t
    before = track[max(index - 1, 0)]
    after = track[min(index + 2, len(track) - 1)]
    x, y = (
        _catmull_rom((before[axis], first[axis], last[axis], after[axis]), t) for axis in (0, 1)
    )
    return x, y


def _catmull_rom(points: tuple[float, float, float, float], t: float) -> float:
    a, b, c, d = points
    slope, bend, twist = c - a, 2 * a - 5 * b + 4 * c - d, 3 * b - a - 3 * c + d
    return b + (slope * t + bend * t**2 + twist * t**3) / 2


def _point(path: Path, number: int, value: object) -> Point:
    if isinstance(value, dict):
        x, y = value.get("x"), value.get("y")
        if _is_place(x) and _is_place(y):
            return float(x), float(y)
    raise MediaError(f'{path}: track {number} holds {value!r:.40}, wanted {{"x": 1, "y": 2}}')


def _is_place(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) <= _FARTHEST
