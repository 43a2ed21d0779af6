"""How strongly a LoRA acts, by stream and by block: a record, its text, and flags that hold it.

No torch here: a job file holds these records.
"""

import math
import re
from dataclasses import dataclass

from ltxlite.errors import RequestError

_STREAMS = ("video", "audio", "cross")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?(?::(.+))?")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
# Of module names, ours (blocks.3.audio.feed_forward) and those of files (..3.audio_ff) alike.
_CROSS = re.compile(r"audio_to_video|video_to_audio|av_ca_|cross_adaln|gate_adaln")
_AUDIO = re.compile(r"(?:^|\.)audio[._]")
_BLOCK = re.compile(r"(?:transformer_)?blocks\.(\d+)\.")
_LARGEST = 100.0
_FORMS = "wanted 0.8, or video=0.8,audio=0.3,cross=1, or blocks=0-23:0.5, joined by commas"


@dataclass(frozen=True, slots=True)
class Strength:
    """The factor of a LoRA's terms: by stream, times that of the block's range.

    video, audio: of each stream's own layers.  cross: of the attentions between the streams.
    blocks: ranges (first, last, factor), last included; where there are some, the LoRA is off
    everywhere else.  Raises RequestError for ranges that overlap and numbers out of bounds.
    """

    video: float = 1.0
    audio: float = 1.0
    cross: float = 1.0
    blocks: tuple[tuple[int, int, float], ...] = ()

    def __post_init__(self) -> None:
        for value in (self.video, self.audio, self.cross, *(item[2] for item in self.blocks)):
            if not math.isfinite(value) or abs(value) > _LARGEST:
                raise RequestError(f"LoRA strength {value}: wanted {-_LARGEST:g} to {_LARGEST:g}")
        end = -1
        for first, last, _ in sorted(self.blocks):
            if not end < first <= last:
                raise RequestError(
                    f"LoRA strength for blocks {first}-{last}: ranges go upwards and do not overlap"
                )
            end = last

    @classmethod
    def of(cls, value: "float | Strength") -> "Strength":
        """Return a plain number as a strength that is the same everywhere."""
        return value if isinstance(value, Strength) else cls(value, value, value)

    @classmethod
    def parse(cls, text: str) -> "Strength":
        """Read items joined by commas: a number for all, stream=number, blocks=0-23:number.

        What is not named has the number for all, or 1.  Raises RequestError telling the forms.
        """
        everywhere: float | None = None
        streams: dict[str, float] = {}
        blocks: list[tuple[int, int, float]] = []
        for item in text.split(","):
            name, equals, value = item.strip().partition("=")
            if not equals and everywhere is None:
                everywhere = _number(name, text)
            elif name == "blocks":
                blocks.append(_range(value, text))
            elif name in _STREAMS and name not in streams:
                streams[name] = _number(value, text)
            else:
                raise RequestError(f"LoRA strength {text!r}: {item.strip()!r} is amiss; {_FORMS}")
        rest = 1.0 if everywhere is None else everywhere
        video, audio, cross = (streams.get(name, rest) for name in _STREAMS)
        return cls(video, audio, cross, tuple(sorted(blocks)))

    def at(self, module: str) -> float:
        """Return the factor for a module of the transformer, named as in the network or in files.

        Layers outside all blocks belong to a stream and to no range.
        """
        values = {"video": self.video, "audio": self.audio, "cross": self.cross}
        return values[stream_of(module)] * self._in_range(module)

    def __str__(self) -> str:
        values = (self.video, self.audio, self.cross)
        same = len(set(values)) == 1
        pairs = zip(_STREAMS, values, strict=True)
        items = [f"{values[0]:g}"] if same else [f"{name}={value:g}" for name, value in pairs]
        return ",".join(items + [f"blocks={a}-{b}:{value:g}" for a, b, value in self.blocks])

    def _in_range(self, module: str) -> float:
        if not self.blocks:
            return 1.0
        match = _BLOCK.match(module)
        if match is None:
            return 0.0
        number = int(match[1])
        return next((value for a, b, value in self.blocks if a <= number <= b), 0.0)


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


def _range(text: str, whole: str) -> tuple[int, int, float]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise RequestError(f"LoRA strength {whole!r}: {text!r} is no range of blocks; {_FORMS}")
    factor = 1.0 if match[3] is None else _number(match[3], whole)
    return int(match[1]), int(match[2] or match[1]), factor
