"""How much of a window of time is there at a moment: all of it inside, some where it fades.

No torch here. What fades out of one window as another fades in adds up to one.
Source: features.md H3 and H5 (raised cosine, as ALH's ConditioningBlend has it).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """From `begin` up to `end`, in any unit of time; None: it never begins, or never ends."""

    begin: float | None
    end: float | None

    @classmethod
    def within(cls, begin: float, end: float | None, length: float) -> "Window":
        """Return a window of something so long: where both begin or end, nothing fades."""
        opens = None if begin <= 0 else begin
        return cls(opens, None if end is None or end >= length else end)

    def share(self, at: float, fade: float = 0.0) -> float:
        """Return how much of it is there, 0 to 1; fade: the width of its edges."""
        begun = 1.0 if self.begin is None else rise(at - self.begin, fade)
        over = 0.0 if self.end is None else rise(at - self.end, fade)
        return begun - over


def rise(since: float, fade: float) -> float:
    """Return how far something has come in, so long after the middle of its rise."""
    if fade == 0:
        return float(since >= 0)
    done = min(max(since / fade + 0.5, 0.0), 1.0)
    return 0.5 * (1 - math.cos(math.pi * done))
