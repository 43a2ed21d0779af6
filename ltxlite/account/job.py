"""What the account must know of a job: sizes and guidance, no prompts and no paths."""

from dataclasses import dataclass, field
from math import prod

from ltxlite.geometry import ClipShape
from ltxlite.models.connector import CONTEXT_LENGTH
from ltxlite.sampling.samplers import SAMPLERS
from ltxlite.sampling.settings import Guidance

Extent = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class StageJob:
    """One stage: its latent shape, guidance and sampler.

    upscaler: what brings the picture to its size ("x2").  images: latent frames of the clip that
    are given as encoded images.  avoided: whether text attention of picture and sound leads away
    from a second prompt.  relayed: whether tokens see their own part of the prompt.
    timed: whether LoRA files change over the clip.
    appended: extents (frames, rows, columns) of latents beside the clip's.  weighted: whether some
    of them are seen at a weight.  held: whether parts of a source are kept.  strengths: how many
    different ones given tokens have.  encoded: extents that the video encoder sees for the stage;
    sound: latent frames that the audio encoder makes.  voice: tokens appended to the sound's own.
    identity: whether a pass without them leads away.  partly: whether only some of the sound is
    made.
    """

    shape: ClipShape
    video: Guidance = field(default_factory=Guidance)
    audio: Guidance = field(default_factory=Guidance)
    sampler: str = "euler"
    steps: int = 8
    upscaler: str | None = None
    images: int = 0
    avoided: tuple[bool, bool] = (False, False)
    relayed: bool = False
    timed: bool = False
    appended: tuple[Extent, ...] = ()
    weighted: bool = False
    held: bool = False
    strengths: int = 1
    encoded: tuple[Extent, ...] = ()
    sound: int = 0
    voice: int = 0
    identity: bool = False
    partly: bool = False

    @property
    def encodes(self) -> tuple[Extent, ...]:
        """Return what the video encoder sees, each extent once."""
        image = ((1, self.shape.rows, self.shape.columns),) if self.images else ()
        return tuple(dict.fromkeys((*self.encoded, *image)))

    @property
    def tokens(self) -> int:
        """Video tokens, appended ones too."""
        return self.shape.video_tokens + sum(prod(extent) for extent in self.appended)

    @property
    def evaluations(self) -> int:
        """How often the transformer is asked."""
        return SAMPLERS[self.sampler].evaluations(self.steps)

    @property
    def levels(self) -> int:
        """Distinct noise levels that tokens may have: given ones are at 0, or by strength."""
        given = self.images or self.appended or self.held or self.voice or self.partly
        return (self.evaluations + 1) * (1 + self.strengths if given else 1)

    @property
    def has_picture(self) -> bool:
        """Tell whether it makes more than sound."""
        return self.shape.video_tokens > 0


@dataclass(frozen=True, slots=True)
class Job:
    """A whole job: final pixels, stages, and the tokens of each prompt that is encoded."""

    width: int
    height: int
    stages: tuple[StageJob, ...]
    prompts: tuple[int, ...] = (CONTEXT_LENGTH,)
