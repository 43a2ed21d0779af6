"""What a clip is made to hear, as frozen records: sound that it follows, a voice to speak with.

No torch, no files opened.  Source: features.md G2, G5 to G9, F6.
"""

from dataclasses import dataclass
from typing import Literal

from ltxlite.errors import RequestError
from ltxlite.record_checks import check_path, check_share, check_stages, check_start

SoundOutput = Literal["original", "decoded"]
Padding = Literal["silence", "prefix", "error"]

VOICE_SECONDS = 121 / 25  # what ID-LoRAs were trained with; features.md G7
SHORTEST_VOICE, LONGEST_VOICE = 0.1, 120.0  # seconds
_LOUDEST_AMBIENCE = 0.25


@dataclass(frozen=True, slots=True)
class Sound:
    """Sound that is given: the clip is made to it.

    start: second of the file at which the clip begins.  denoise: 0 keeps it as it is, 1 replaces
    it.  output: what the clip sounds like, the file itself or what the model makes of it.
    heard: another file that people hear in its place, the song of which it is the voice alone.
    ambience: how loud a rushing is added for the model, never for people; 0.01 is 40 dB below
    full scale.  pad: what follows a file that ends before the clip: silence, sound that is made,
    or nothing, which is refused.
    """

    path: str
    start: float = 0.0
    denoise: float = 0.0
    output: SoundOutput = "original"
    heard: str | None = None
    ambience: float = 0.0
    pad: Padding = "silence"

    def __post_init__(self) -> None:
        what = f"sound {self.path}"
        check_path(what, self.path)
        check_share(f"{what}: denoise", self.denoise)
        check_start(what, self.start)
        if not 0 <= self.ambience <= _LOUDEST_AMBIENCE:
            raise RequestError(
                f"{what}: ambience {self.ambience:g}, wanted 0 to {_LOUDEST_AMBIENCE}; 0.01 is "
                "usual"
            )
        if self.heard is not None:
            check_path("sound", self.heard)
            if self.output != "original":
                raise RequestError(
                    f"{what}: people hear {self.heard}, not what the model makes of it; leave one "
                    "of them out"
                )


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice to speak with: sound that is heard before the clip begins, and is no part of it.

    start, seconds: the part of the file that is taken.  identity: how far the clip is led away
    from how it would be without the voice, 0 not at all and without a further pass; span: in which
    part of the schedule, 0 to 1.  stages: those that hear it, from 1.  echo: later ones hear, in
    its place, the sound as it is by then.  Source: features.md G7 (ID-LoRA), F6 (Dub-It).
    """

    path: str
    start: float = 0.0
    seconds: float = VOICE_SECONDS
    identity: float = 3.0
    span: tuple[float, float] = (0.0, 1.0)
    stages: tuple[int, ...] = (1,)
    echo: bool = False

    def __post_init__(self) -> None:
        what = f"voice {self.path}"
        check_path(what, self.path)
        check_start(what, self.start)
        if not SHORTEST_VOICE <= self.seconds <= LONGEST_VOICE:
            raise RequestError(
                f"{what}: {self.seconds:g} s of it, wanted {SHORTEST_VOICE:g} to {LONGEST_VOICE:g}"
            )
        if not 0 <= self.identity <= 100:
            raise RequestError(f"{what}: identity guidance {self.identity:g}, wanted 0 to 100")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise RequestError(
                f"{what}: identity guidance from {self.span[0]:g} to {self.span[1]:g} of the "
                "schedule, wanted 0 to 1, the first one less"
            )
        check_stages(what, self.stages)
