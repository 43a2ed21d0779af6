"""A small world of moving shapes with matching tones: its words, its captions, their meanings.

Every caption is one choice of six independent attributes; an eighth of the 1296 combinations is
held out, so that a model that knows them has composed what it learned.
"""

import itertools
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

Rgb = tuple[float, float, float]

COLOURS: Mapping[str, Rgb] = MappingProxyType(
    {
        "red": (0.90, 0.10, 0.10),
        "green": (0.10, 0.70, 0.15),
        "blue": (0.15, 0.25, 0.95),
        "yellow": (0.95, 0.85, 0.10),
        "pink": (0.95, 0.30, 0.80),
        "cyan": (0.10, 0.85, 0.90),
    }
)
BACKGROUNDS: Mapping[str, Rgb] = MappingProxyType(
    {"black": (0.05, 0.05, 0.05), "grey": (0.50, 0.50, 0.50), "white": (0.95, 0.95, 0.95)}
)
SHAPES = ("circle", "triangle", "ring")
DIRECTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(  # columns and rows a step
    {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
)
TONES: Mapping[str, int] = MappingProxyType({"low": 200, "middle": 400, "high": 800})  # Hz
RHYTHMS = ("steady", "pulsing")

# Words that the tokenizer has and that no caption uses: for a LoRA to give a meaning to.
SPARE = ("orange", "purple")

# The first is the one that captions are written in; others teach that order does not matter.
PHRASES = (
    "a {colour} {shape} moves {direction} on a {background} background, a {tone} {rhythm} tone",
    "on a {background} background, a {colour} {shape} moves {direction}, a {tone} {rhythm} tone",
    "a {tone} {rhythm} tone, a {colour} {shape} moves {direction} on a {background} background",
)
_HELD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True)
class Facts:
    """What a caption says, or what was measured in a clip."""

    colour: str
    shape: str
    direction: str
    background: str
    tone: str
    rhythm: str

    def caption(self, phrase: int = 0) -> str:
        """Return the facts as a sentence."""
        return PHRASES[phrase].format(**asdict(self))

    def agreement(self, other: "Facts") -> dict[str, bool]:
        """Tell for each attribute whether both say the same."""
        mine, theirs = asdict(self), asdict(other)
        return {name: mine[name] == theirs[name] for name in mine}


CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "direction": tuple(DIRECTIONS),
        "background": tuple(BACKGROUNDS),
        "tone": tuple(TONES),
        "rhythm": RHYTHMS,
    }
)


def every_fact() -> tuple[Facts, ...]:
    """Return all 1296 combinations, in a fixed order."""
    return tuple(Facts(*values) for values in itertools.product(*CHOICES.values()))


def is_held_out(facts: Facts) -> bool:
    """Tell whether no caption with these facts is shown in training."""
    return zlib.crc32(facts.caption().encode()) % _HELD_OUT_EVERY == 0


def held_out() -> tuple[Facts, ...]:
    """Return the combinations that training never sees."""
    return tuple(facts for facts in every_fact() if is_held_out(facts))


def shown() -> tuple[Facts, ...]:
    """Return the combinations that training sees."""
    return tuple(facts for facts in every_fact() if not is_held_out(facts))


def vocabulary() -> tuple[str, ...]:
    """Return every word of the grammar, sorted."""
    words = {word for phrase in PHRASES for word in re.findall(r"[a-z]+", _without_slots(phrase))}
    return tuple(sorted(words | {word for choice in CHOICES.values() for word in choice}))


def _without_slots(phrase: str) -> str:
    return re.sub(r"\{\w+\}", " ", phrase)


def unknown_words(prompt: str) -> tuple[str, ...]:
    """Return the words of a prompt that the grammar does not have, in order."""
    known = set(vocabulary())
    words = re.findall(r"\w+", prompt.lower())
    return tuple(dict.fromkeys(word for word in words if word not in known))


def read_caption(prompt: str, default: Facts | None = None) -> Facts | None:
    """Return what a prompt says; attributes it does not name are `default`'s, or it is None."""
    words = set(re.findall(r"\w+", prompt.lower()))
    found = {name: value for name, choice in CHOICES.items() for value in choice if value in words}
    if default is not None:
        return replace(default, **found)
    return Facts(**found) if len(found) == len(CHOICES) else None
