"""Prompts by the clock, one a line, as they are written for songs: "0:00-0:12: she walks in".

A line says from when to when, or with + from when on; a later line wins where two meet, and where
there is none the one before holds on. One clip sees it as prompt relay; a video made in windows
takes one entry, or a mixture of two, for each.
Source: features.md H4 and H5 (ALH, Audio Loop Helper).
"""

import itertools
import math
import re
from dataclasses import dataclass

from ltxlite.conditions import Segment
from ltxlite.errors import RequestError
from ltxlite.over_time import Window

_TIME = r"\d{1,4}:\d{1,2}(?:\.\d{1,6})?|\d{1,6}(?:\.\d{1,6})?s?"
_LINE = re.compile(rf"(?P<begin>{_TIME})\s*(?:\+|-\s*(?P<end>{_TIME}))\s*:\s*(?P<text>.+)")
_COMMENTS = ("#", "//")
_FORMS = 'wanted "0:05-0:12: text", "0:12+: text", or seconds as "5-12: text"'


@dataclass(frozen=True, slots=True)
class Schedule:
    """Prompts and their seconds, in the order of their lines."""

    entries: tuple[Segment, ...]

    def parts(self, length: float) -> tuple[Segment, ...]:
        """Return what holds from 0 to `length`, without gaps and overlaps; equal neighbours join.

        A prompt before all entries is the first one.
        """
        edges = {0.0, length}
        for entry in self.entries:
            edges |= {edge for edge in (_begin(entry), _end(entry)) if 0 < edge < length}
        found: list[Segment] = []
        for begin, end in itertools.pairwise(sorted(edges)):
            text = self._at(begin)
            if found and found[-1].text == text:
                begin = _begin(found.pop())
            found.append(Segment(text, begin, end))
        return tuple(found)

    def snapped(self, stride: float) -> "Schedule":
        """Return it with every edge at the nearest multiple of `stride`, without what vanishes.

        Windows begin there, and a window sees one prompt.
        """

        def snap(edge: float) -> float:
            return edge if math.isinf(edge) else math.floor(edge / stride + 0.5) * stride

        moved = [(item.text, snap(_begin(item)), snap(_end(item))) for item in self.entries]
        kept = [item for item in moved if item[1] < item[2]]
        if not kept:
            raise RequestError(f"prompt schedule: no entry lasts as long as half of {stride:g} s")
        return Schedule(tuple(Segment(t, b, None if math.isinf(e) else e) for t, b, e in kept))

    def at_window(self, number: int, stride: float, blend: float = 0.0) -> dict[str, float]:
        """Return the shares of the prompts of a window that begins at number * stride.

        blend: seconds in which a prompt passes into the next, at least a stride; 0 not at all.
        """
        at = number * stride
        parts = self.snapped(stride).parts(at + blend + 2 * stride)
        fade = max(blend, stride) if blend else 0.0
        found: dict[str, float] = {}
        for part in parts:
            window = Window.within(_begin(part), _end(part), _end(parts[-1]))
            if share := window.share(at, fade):
                found[part.text] = found.get(part.text, 0.0) + share
        return found

    def _at(self, seconds: float) -> str:
        for entry in reversed(self.entries):
            if _begin(entry) <= seconds < _end(entry):
                return entry.text
        over = [entry for entry in self.entries if _begin(entry) <= seconds]
        return max(over, key=_begin, default=self.entries[0]).text


def parse_schedule(text: str, where: str) -> Schedule:
    """Read a schedule. Raises RequestError naming the line that cannot be read."""
    entries = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip().removeprefix("\ufeff")
        if not line or line.startswith(_COMMENTS):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise RequestError(f"{where}, line {number}: {line[:40]!r} says no time; {_FORMS}")
        end = None if match["end"] is None else _seconds(match["end"])
        entries.append(Segment(match["text"].strip(), _seconds(match["begin"]), end))
    if not entries:
        raise RequestError(f"{where}: no prompt in it; {_FORMS}")
    return Schedule(tuple(entries))


def _seconds(text: str) -> float:
    minutes, colon, seconds = text.partition(":")
    return 60 * int(minutes) + float(seconds) if colon else float(text.removesuffix("s"))


def _begin(entry: Segment) -> float:
    return entry.begin or 0.0


def _end(entry: Segment) -> float:
    return math.inf if entry.end is None else entry.end
