"""How a job departs from the official way of computing: frozen records of a job file. No torch."""

from dataclasses import dataclass
from typing import Literal

from ltxlite.errors import RequestError

MaskMode = Literal["official", "comfy"]
_LARGEST = 10.0


@dataclass(frozen=True, slots=True)
class Tuning:
    """What branches of the blocks weigh, and what a mask between 0 and 1 means.

    video, audio: by what each stream multiplies what its own layers add to it; audio_to_video,
    video_to_audio: what it hears of the other one.  blocks: ranges (first, last) in which that
    holds, last included; all without any.
    masks: "official" noises a token that is kept in part by that part; "comfy" shows the
    transformer a mixture with the clean token and mixes its answer again, which pulls about twice
    as strongly.  Masks of 0 and 1 are the same in both.
    Raises RequestError for numbers out of bounds.  Source: features.md C8, A6.
    """

    video: float = 1.0
    audio: float = 1.0
    audio_to_video: float = 1.0
    video_to_audio: float = 1.0
    blocks: tuple[tuple[int, int], ...] = ()
    masks: MaskMode = "official"

    def __post_init__(self) -> None:
        for name in ("video", "audio", "audio_to_video", "video_to_audio"):
            value = getattr(self, name)
            if not 0 <= value <= _LARGEST:
                raise RequestError(f"scale of {name}: {value}, wanted 0 to {_LARGEST:g}")
        for first, last in self.blocks:
            if not 0 <= first <= last:
                raise RequestError(f"scales of blocks {first}-{last}: ranges go upwards, from 0")

    def covered(self) -> frozenset[int] | None:
        """Return the blocks that are scaled; None means all."""
        if not self.blocks:
            return None
        return frozenset(n for first, last in self.blocks for n in range(first, last + 1))
