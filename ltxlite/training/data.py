"""Clips with captions to train on: a user's files by a manifest, or scenes of the world.

A manifest is JSON, JSON Lines or CSV with columns `video` (or `media_path`, `video_path`) and
`caption`, and, where sound lies beside the clip, `audio`; or it is a folder of clips with captions
in .txt files of the same name. Nothing is left out silently: what does not fit is reported.
Source: features.md N3.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ltxlite.errors import RequestError
from ltxlite.geometry import LatentGrid
from ltxlite.media.image import fit_cover, load_image
from ltxlite.media.video_reader import read_video, read_video_info
from ltxlite.models import mel
from ltxlite.training import scene
from ltxlite.training.world import Facts

_VIDEO_KEYS = ("video", "media_path", "video_path")
_CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class Clip:
    """One training example.

    pixels: (3, F, H, W) in [-1, 1].  waveform: (2, N) at `rate` Hz, None without sound.
    """

    caption: str
    pixels: Tensor
    waveform: Tensor | None
    rate: int
    fps: float


class Clips(Protocol):
    """What preprocessing reads: as many clips as it says, each made when it is asked for."""

    def __len__(self) -> int:
        """Return how many clips there are."""

    def __getitem__(self, number: int) -> Clip:
        """Return one of them."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size that clips are brought to: width and height multiples of 32, 8 n + 1 frames."""

    width: int
    height: int
    frames: int

    def __post_init__(self) -> None:
        wrong = self.width % _MULTIPLE or self.height % _MULTIPLE or self.width * self.height == 0
        if wrong or self.frames != LatentGrid().snap_frames(self.frames):
            raise RequestError(
                f"bucket {self.width}x{self.height}x{self.frames}: wanted width and height in "
                f"multiples of {_MULTIPLE} and 8n + 1 frames, such as "
                f"{max(1, round(self.width / 32)) * 32}x{max(1, round(self.height / 32)) * 32}x"
                f"{LatentGrid().snap_frames(self.frames)}"
            )


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Read buckets written as "960x544x49;512x512x25"; RequestError for anything else."""
    found = []
    for item in text.split(";"):
        numbers = item.strip().split("x")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise RequestError(f"bucket {item.strip()!r}: wanted WIDTHxHEIGHTxFRAMES")
        found.append(Bucket(*map(int, numbers)))
    return tuple(found)


def choose_bucket(buckets: Sequence[Bucket], size: tuple[int, int, int]) -> Bucket | None:
    """Return the bucket for a clip of (width, height, frames); None if all are too long for it.

    The shape of the picture decides, then the length: the longest that the clip fills.
    """
    width, height, frames = size
    fitting = [bucket for bucket in buckets if bucket.frames <= frames]
    shape = width / height
    return min(
        fitting,
        key=lambda b: (abs(b.width / b.height / shape - 1), -b.frames, -b.width * b.height),
        default=None,
    )


@dataclass(frozen=True, slots=True)
class Example:
    """A line of a manifest."""

    video: Path
    caption: str


def read_manifest(path: Path) -> list[Example]:
    """Read a manifest; relative paths start at its folder.

    Raises RequestError for a line that lacks a clip or a caption, naming it.
    """
    if path.is_dir():
        return list(_beside(path))
    if not path.is_file():
        raise RequestError(f"{path}: no such manifest")
    text = path.read_text(encoding="utf-8")
    try:
        rows = _rows(path.suffix.lower(), text)
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}: not readable as JSON ({error})") from None
    return [_example(path, number, row) for number, row in enumerate(rows, start=1)]


def _rows(suffix: str, text: str) -> list[Any]:
    if suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    loaded = json.loads(text)
    return loaded if isinstance(loaded, list) else [loaded]


def _example(path: Path, number: int, row: Any) -> Example:
    values: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    video = next((values[key] for key in _VIDEO_KEYS if values.get(key)), None)
    caption = values.get("caption")
    if not isinstance(video, str) or not isinstance(caption, str):
        raise RequestError(
            f"{path}, entry {number}: wanted texts under {' or '.join(_VIDEO_KEYS)} and caption, "
            f"got {row!r:.200}"
        )
    return Example(path.parent / video, caption)


def _beside(folder: Path) -> Iterable[Example]:
    for video in sorted(folder.iterdir()):
        if video.suffix.lower() in (*_CLIPS, *_IMAGES):
            caption = video.with_suffix(".txt")
            if not caption.is_file():
                raise RequestError(f"{video}: no caption beside it, wanted {caption.name}")
            yield Example(video, caption.read_text(encoding="utf-8").strip())


class FileClips:
    """Clips of a manifest, each brought to the bucket that fits it best.

    trigger: a word put before every caption.  rejected: a line for each clip that fits no bucket.
    """

    def __init__(
        self, examples: Sequence[Example], buckets: Sequence[Bucket], trigger: str = ""
    ) -> None:
        self.trigger = trigger
        self.rejected: list[str] = []
        self._chosen: list[tuple[Example, Bucket]] = []
        for example in examples:
            size = _size(example.video)
            bucket = choose_bucket(buckets, size)
            if bucket is None:
                self.rejected.append(
                    f"{example.video}: {size[2]} frames are too few for any bucket"
                )
            else:
                self._chosen.append((example, bucket))

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Clip:
        example, bucket = self._chosen[number]
        caption = f"{self.trigger} {example.caption}".strip()
        if example.video.suffix.lower() in _IMAGES:
            picture = fit_cover(load_image(example.video), bucket.height, bucket.width)
            return Clip(caption, picture[:, None], None, mel.SAMPLE_RATE, 24.0)
        clip = read_video(example.video, 0, bucket.frames)
        frames = [fit_cover(frame, bucket.height, bucket.width) for frame in clip.frames]
        rate = clip.audio_rate or mel.SAMPLE_RATE
        return Clip(caption, torch.stack(frames, dim=1), clip.waveform, rate, float(clip.fps))


def _size(path: Path) -> tuple[int, int, int]:
    if path.suffix.lower() in _IMAGES:
        height, width, _ = load_image(path).shape
        return width, height, 1
    info = read_video_info(path)
    return info.width, info.height, info.frames


class WorldClips:
    """Scenes of the world as clips; the same number gives the same clip."""

    def __init__(self, facts: Sequence[Facts], bucket: Bucket, fps: float, seed: int = 0) -> None:
        self.facts, self.bucket, self.fps, self.seed = tuple(facts), bucket, fps, seed

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, number: int) -> Clip:
        facts, bucket = self.facts[number], self.bucket
        generator = torch.Generator().manual_seed(self.seed + number)
        scenes = scene.draw([facts], generator)
        size = (bucket.height, bucket.width)
        pixels = scene.pictures(scenes, size, bucket.frames, self.fps)[0]
        samples = round(bucket.frames / self.fps * mel.SAMPLE_RATE)
        waveform = scene.sounds(scenes, samples)[0]
        return Clip(facts.caption(), pixels, waveform, mel.SAMPLE_RATE, self.fps)
