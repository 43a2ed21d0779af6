"""How much of a card each phase of a job needs, before anything is loaded.

The networks' own code runs at full size on the meta device under the allocation meter, from prompt
to frames: nothing is estimated that can be counted. One layer of each kind stands for all, since
they are alike; what looks at values is computed on the CPU and then moved. Weights are not counted
while they run: they lie where the plan puts them.
"""

from collections.abc import Sequence

from ltxlite.account.inputs import components_of, job_of
from ltxlite.account.job import Job, StageJob
from ltxlite.account.media import (
    image_phase,
    picture_phase,
    pixel_phases,
    sound_encoder_phase,
    sound_phases,
    upscale_phase,
)
from ltxlite.account.phase import Component, Components, Levers, Phase
from ltxlite.account.stage import stage_phases
from ltxlite.account.text import text_phases
from ltxlite.checkpoint.lora import Lora
from ltxlite.networks import Networks
from ltxlite.request import Request

__all__ = [
    "Component",
    "Components",
    "Job",
    "Levers",
    "Phase",
    "StageJob",
    "account",
    "components_of",
    "job_of",
    "phases",
    "text_phases",
]


def account(
    networks: Networks, request: Request, loras: Sequence[Lora] = (), levers: Levers | None = None
) -> tuple[Phase, ...]:
    """Account for a request on the user's files, of which only headers are read.

    Prompts are taken to be as long as they may be.  Raises RequestError for sizes off the grid.
    """
    levers = levers or Levers(networks.dtype)
    return phases(components_of(networks, loras), job_of(request, networks), levers)


def phases(
    components: Components,
    job: Job,
    levers: Levers | None = None,
    text: Sequence[Phase] | None = None,
) -> tuple[Phase, ...]:
    """Account for every phase of a job, in their order.

    components: by the names of `networks.NAMINGS`, each upscaler as "upscaler x2".  text: what
    `text_phases` says, where it is known: sizes and chunks change nothing of it.
    Deterministic, reads no file, takes a second or two of one core.
    """
    levers = levers or Levers()
    found = list(text or text_phases(components, job.prompts, levers))
    found += given_phases(components, job, levers)
    for number, stage in enumerate(job.stages, start=1):
        if stage.upscaler is not None:
            before = job.stages[number - 2].shape
            if stage.upscaler == "pixels":
                found += pixel_phases(components, number, before, stage, levers)
            else:
                found.append(upscale_phase(components, number, before, stage.upscaler, levers))
        found += stage_phases(components, number, stage, levers)
    last = job.stages[-1].shape
    found += sound_phases(components, last, levers)
    if job.stages[-1].has_picture:
        found.append(picture_phase(components, last, levers))
    return tuple(found)


def given_phases(components: Components, job: Job, levers: Levers) -> list[Phase]:
    """Account for the encoding of all that a job is given; it comes before the first stage."""
    found = [
        image_phase(components, number, stage, levers)
        for number, stage in enumerate(job.stages, start=1)
        if stage.encodes
    ]
    if job.stages[0].sound:
        found.append(sound_encoder_phase(components, job.stages[0], levers))
    return found
