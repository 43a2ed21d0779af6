"""Prompts one after another as people write them: "a | b | c", or "[0s:4s] a [4s:] b".

Source: features.md H1 (ComfyUI-PromptRelay's bars, Wan2GP's markers). Square brackets of any other
form, such as ID-LoRA's "[0-4s]", stay text.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from ltxlite.conditions import Relay, Segment
from ltxlite.errors import RequestError

# A time is "4s", "25%", "0:05" (minutes and seconds, both sides), or a frame from 1 on.
_TIME = r"\d{1,5}(?:\.\d{1,6})?(?:s|%)|\d{1,4}:\d{1,2}(?:\.\d{1,6})?|\d{1,6}"
_MARKER = re.compile(
    rf"\[\s*(?:(?P<from>{_TIME})\s*:\s*(?P<to>{_TIME})?|:\s*(?P<only>{_TIME}))\s*\]"
)


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a clip is."""

    frames: int
    rate: Fraction

    @property
    def seconds(self) -> float:
        """The whole length."""
        return float(self.frames / self.rate)


def parse_segments(text: str, extent: Extent) -> tuple[str, tuple[Segment, ...]]:
    """Read segments; returns what stands before the first marker, and the segments.

    Raises RequestError for an empty segment.
    """
    markers = list(_MARKER.finditer(text))
    if not markers:
        return "", tuple(_segment(part, text) for part in text.split("|"))
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    segments = []
    for marker, end in zip(markers, ends, strict=True):
        begin, stop = marker["from"], marker["to"] or marker["only"]
        segments.append(
            _segment(
                text[marker.end() : end],
                marker[0],
                0.0 if begin is None else _seconds(begin, extent, first=True),
                None if stop is None else _seconds(stop, extent, first=False),
            )
        )
    return _bare(text[: markers[0].start()]), tuple(segments)


def whole_text(prompt: str, relay: Relay | None) -> str:
    """Return the one text that is encoded: the prompt of all times, then each segment's."""
    return prompt if relay is None else texts_up_to(prompt, relay)[-1]


def texts_up_to(prompt: str, relay: Relay) -> list[str]:
    """Return the text before the first segment, then that up to the end of each."""
    found = [prompt.strip()]
    for segment in relay.segments:
        found.append(f"{found[-1]} {segment.text.strip()}".strip())
    return found


def _segment(
    text: str, where: str, begin: float | None = None, end: float | None = None
) -> Segment:
    bare = _bare(text)
    if not bare:
        raise RequestError(f"--segments: a segment of {where[:60]!r} has no text")
    return Segment(bare, begin, end)


def _bare(text: str) -> str:
    return text.strip().strip("|").strip()


def _seconds(text: str, extent: Extent, first: bool) -> float:
    if text.endswith("s"):
        return float(text[:-1])
    if text.endswith("%"):
        return extent.seconds * float(text[:-1]) / 100
    if ":" in text:
        minutes, seconds = text.split(":")
        return 60 * int(minutes) + float(seconds)
    frame = int(text)
    if not 1 <= frame <= extent.frames:
        raise RequestError(
            f"--segments: frame {frame} of a clip whose frames are 1 to {extent.frames} there"
        )
    return float((frame - first) / extent.rate)  # an end is the last frame that is meant
