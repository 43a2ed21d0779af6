"""What the account must know of a job: sizes and guidance, no prompts and no paths."""

from dataclasses import dataclass, field

from ltxlite.geometry import ClipShape
from ltxlite.models.connector import CONTEXT_LENGTH
from ltxlite.sampling.samplers import SAMPLERS
from ltxlite.sampling.settings import Guidance


@dataclass(frozen=True, slots=True)
class StageJob:
    """One stage: its latent shape, guidance and sampler.

    upscaler: what brings the picture to its size ("x2").  images: latent frames of the clip that
    are given as encoded images.
    """

    shape: ClipShape
    video: Guidance = field(default_factory=Guidance)
    audio: Guidance = field(default_factory=Guidance)
    sampler: str = "euler"
    steps: int = 8
    upscaler: str | None = None
    images: int = 0

    @property
    def evaluations(self) -> int:
        """How often the transformer is asked."""
        return SAMPLERS[self.sampler].evaluations(self.steps)

    @property
    def levels(self) -> int:
        """Distinct noise levels that tokens may have: given ones are at 0."""
        return (self.evaluations + 1) * (2 if self.images else 1)


@dataclass(frozen=True, slots=True)
class Job:
    """A whole job: final pixels, stages, and the tokens of each prompt that is encoded."""

    width: int
    height: int
    stages: tuple[StageJob, ...]
    prompts: tuple[int, ...] = (CONTEXT_LENGTH,)
