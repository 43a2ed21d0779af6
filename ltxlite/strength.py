"""How strongly a LoRA acts, by stream, block, step and time: a record, its text, its flags.

No torch here: a job file holds these records.
"""

import math
import re
from dataclasses import dataclass

from ltxlite.errors import RequestError

_STREAMS = ("video", "audio", "cross")
_RANGED = ("blocks", "steps", "segments")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?(?::(.+))?")
_TIME = r"\d{1,5}(?:\.\d{1,6})?"
_TIMES = re.compile(rf"({_TIME})s?-(?:({_TIME})s?)?(?::(.+))?")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
# Of module names, ours (blocks.3.audio.feed_forward) and those of files (..3.audio_ff) alike.
_CROSS = re.compile(r"audio_to_video|video_to_audio|av_ca_|cross_adaln|gate_adaln")
_AUDIO = re.compile(r"(?:^|\.)audio[._]")
_BLOCK = re.compile(r"(?:transformer_)?blocks\.(\d+)\.")
_LARGEST = 100.0
_FORMS = (
    "wanted 0.8, or video=0.8,audio=0.3,cross=1, or blocks=0-23:0.5, steps=0-3, seconds=0-4:0.8, "
    "segments=2, fade=0.5, joined by commas"
)
_Ranges = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, slots=True)
class Strength:
    """The factor of a LoRA's terms: by stream, times those of the ranges that apply.

    video, audio: of each stream's own layers.  cross: of the attentions between the streams.
    blocks: ranges (first, last, factor), last included; where there are some, the LoRA is off
    everywhere else.  steps: the same of a stage's steps, from 0.  seconds: of the clip's time,
    (from, to, factor), to None is its end; segments: of its prompt relay, from 1.  fade: seconds
    in which it comes and goes at their edges.
    Raises RequestError for ranges that overlap and numbers out of bounds.
    """

    video: float = 1.0
    audio: float = 1.0
    cross: float = 1.0
    blocks: _Ranges = ()
    steps: _Ranges = ()
    seconds: tuple[tuple[float, float | None, float], ...] = ()
    segments: _Ranges = ()
    fade: float = 0.0

    def __post_init__(self) -> None:
        ranges = (*self.blocks, *self.steps, *self.seconds, *self.segments)
        for value in (self.video, self.audio, self.cross, *(item[2] for item in ranges)):
            if not math.isfinite(value) or abs(value) > _LARGEST:
                raise RequestError(f"LoRA strength {value}: wanted {-_LARGEST:g} to {_LARGEST:g}")
        for name in ("blocks", "steps", "segments"):
            _check_rising(name, getattr(self, name), 1 if name == "segments" else 0)
        _check_times(self.seconds)
        if self.seconds and self.segments:
            raise RequestError("LoRA strength: both seconds and segments say when; give one")
        if self.fade and not self.varies:
            raise RequestError("LoRA strength: fade without seconds or segments")
        if not 0 <= self.fade <= 3600:
            raise RequestError(f"LoRA strength: fade is {self.fade} s, wanted 0 to 3600")

    @property
    def varies(self) -> bool:
        """Whether it differs between moments of the clip."""
        return bool(self.seconds or self.segments)

    @classmethod
    def of(cls, value: "float | Strength") -> "Strength":
        """Return a plain number as a strength that is the same everywhere."""
        return value if isinstance(value, Strength) else cls(value, value, value)

    @classmethod
    def parse(cls, text: str) -> "Strength":
        """Read items joined by commas: a number for all, stream=number, blocks=0-23:number, ...

        What is not named has the number for all, or 1.  Raises RequestError telling the forms.
        """
        everywhere: float | None = None
        numbers: dict[str, float] = {}
        ranges: dict[str, list[tuple[int, int, float]]] = {name: [] for name in _RANGED}
        seconds: list[tuple[float, float | None, float]] = []
        for item in text.split(","):
            name, equals, value = item.strip().partition("=")
            if not equals and everywhere is None:
                everywhere = _number(name, text)
            elif name in ranges:
                ranges[name].append(_range(value, name, text))
            elif name == "seconds":
                seconds.append(_times(value, text))
            elif name in (*_STREAMS, "fade") and name not in numbers:
                numbers[name] = _number(value, text)
            else:
                raise RequestError(f"LoRA strength {text!r}: {item.strip()!r} is amiss; {_FORMS}")
        rest = 1.0 if everywhere is None else everywhere
        video, audio, cross = (numbers.get(name, rest) for name in _STREAMS)
        blocks, steps, segments = (tuple(sorted(ranges[name])) for name in _RANGED)
        times = tuple(sorted(seconds, key=lambda item: item[0]))
        fade = numbers.get("fade", 0.0)
        return cls(video, audio, cross, blocks, steps, times, segments, fade)

    def at(self, module: str) -> float:
        """Return the factor for a module of the transformer, named as in the network or in files.

        Layers outside all blocks belong to a stream and to no range.
        """
        values = {"video": self.video, "audio": self.audio, "cross": self.cross}
        return values[stream_of(module)] * self._in_range(module)

    def at_step(self, step: int) -> float:
        """Return the factor for a step of a stage, from 0."""
        return _factor(self.steps, step)

    def __str__(self) -> str:
        values = (self.video, self.audio, self.cross)
        same = len(set(values)) == 1
        pairs = zip(_STREAMS, values, strict=True)
        items = [f"{values[0]:g}"] if same else [f"{name}={value:g}" for name, value in pairs]
        for name in _RANGED:
            items += [f"{name}={a}-{b}:{value:g}" for a, b, value in getattr(self, name)]
        for begin, end, value in self.seconds:
            items.append(f"seconds={begin:g}-{'' if end is None else f'{end:g}'}:{value:g}")
        return ",".join([*items, f"fade={self.fade:g}"] if self.fade else items)

    def _in_range(self, module: str) -> float:
        if not self.blocks:
            return 1.0
        match = _BLOCK.match(module)
        return 0.0 if match is None else _factor(self.blocks, int(match[1]))


def stream_of(module: str) -> str:
    """Return "video", "audio" or "cross" for a module of the transformer.

    Source: the groups of WanGP (features.md N1); its rest goes to the stream that it serves.
    """
    if _CROSS.search(module):
        return "cross"
    return "audio" if _AUDIO.search(module) else "video"


def parse_stages(text: str) -> tuple[Strength, ...]:
    """Read one strength a stage: numbers joined by commas, or any strengths joined by `;`."""
    numbers = text.split(",")
    if ";" not in text and all(_NUMBER.fullmatch(number.strip()) for number in numbers):
        return tuple(Strength.parse(number) for number in numbers)
    return tuple(Strength.parse(part) for part in text.split(";"))


def parse_lora(text: str) -> tuple[str, tuple[Strength, ...]]:
    """Split PATH or PATH:STRENGTHS, also where the path is C:\\x.safetensors.

    Raises RequestError for a strength that cannot be read.
    """
    start = 2 if _DRIVE.match(text) else 0
    while (colon := text.find(":", start)) >= 0:
        rest = text[colon + 1 :]
        if not re.search(r"[\\/]|\.safetensors", rest):
            return text[:colon], parse_stages(rest)
        start = colon + 1
    return text, (Strength(),)


def _number(text: str, whole: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise RequestError(f"LoRA strength {whole!r}: {text!r} is no number; {_FORMS}")
    return float(text)


def _range(text: str, name: str, whole: str) -> tuple[int, int, float]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise RequestError(f"LoRA strength {whole!r}: {text!r} is no range of {name}; {_FORMS}")
    factor = 1.0 if match[3] is None else _number(match[3], whole)
    return int(match[1]), int(match[2] or match[1]), factor


def _times(text: str, whole: str) -> tuple[float, float | None, float]:
    match = _TIMES.fullmatch(text)
    if match is None:
        raise RequestError(f"LoRA strength {whole!r}: {text!r} is no range of seconds; {_FORMS}")
    factor = 1.0 if match[3] is None else _number(match[3], whole)
    return float(match[1]), None if match[2] is None else float(match[2]), factor


def _factor(ranges: _Ranges, number: int) -> float:
    """Return the factor of the range that a number is in, 0 beside them, 1 without any."""
    if not ranges:
        return 1.0
    return next((value for first, last, value in ranges if first <= number <= last), 0.0)


def _check_rising(name: str, ranges: _Ranges, least: int) -> None:
    end = least - 1
    for first, last, _ in sorted(ranges):
        if first < least:
            raise RequestError(f"LoRA strength for {name} {first}-{last}: they count from {least}")
        if not end < first <= last:
            raise RequestError(
                f"LoRA strength for {name} {first}-{last}: ranges go upwards and do not overlap"
            )
        end = last


def _check_times(ranges: tuple[tuple[float, float | None, float], ...]) -> None:
    end = 0.0
    for begin, stop, _ in sorted(ranges, key=lambda item: item[0]):
        if not end <= begin < (math.inf if stop is None else stop):
            shown = "" if stop is None else f"{stop:g}"
            raise RequestError(
                f"LoRA strength for seconds {begin:g}-{shown}: ranges go upwards and do not overlap"
            )
        end = math.inf if stop is None else stop
