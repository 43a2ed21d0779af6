"""What a job is given besides text, as its stages see it: pictures, clips and sound, encoded.

encode: from the request's files to these records.  pictures, sound, voice, source: what each kind
needs.
takes: which frames of which file, where, and what is refused.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class GivenReference:
    """A reference clip as one stage sees it.

    latent: (1, C, f, y, x).  downscale, temporal: what fraction of size and frames it has.
    weight: (f y x,) attention between its tokens and the clip, None for all of it.
    """

    latent: Tensor
    strength: float
    downscale: int = 1
    temporal: int = 1
    weight: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GivenSource:
    """A clip as a stage is given it: normalised latents, fp32, on the CPU.

    video: (1, C, F, Y, X).  audio: (1, C, T, M), None for a silent source.  region: (F, Y, X), 1
    where the picture is made anew, None for everywhere.
    """

    video: Tensor
    audio: Tensor | None = None
    region: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GivenSound:
    """A sound as a stage is given it: the normalised latent (1, C, T, M), fp32, on the CPU.

    known: how many of its first frames the file fills, None all; what comes after is made.
    """

    latent: Tensor
    known: int | None = None


@dataclass(frozen=True, slots=True)
class StageGiven:
    """What one stage is given: normalised latents (1, C, f, Y, X), fp32, on the CPU.

    images, guides: one latent for each of the request, in its order.  references: those that this
    stage sees.  source, sound: None where the request names none.  voice: the latent (1, C, t, M)
    of the voice that this stage hears.
    """

    images: tuple[Tensor, ...] = ()
    guides: tuple[Tensor, ...] = ()
    references: tuple[GivenReference, ...] = ()
    source: GivenSource | None = None
    sound: GivenSound | None = None
    voice: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What the stages of a job are given; nothing at all for a job of text alone."""

    stages: tuple[StageGiven, ...] = ()

    def of(self, number: int) -> StageGiven:
        """Return what stage number `number`, from 0, is given."""
        return self.stages[number] if self.stages else StageGiven()
