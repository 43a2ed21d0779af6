"""Stages that begin from an existing clip instead of from noise alone."""

from collections.abc import Sequence
from dataclasses import replace

from ltxlite.conditions import Conditions
from ltxlite.errors import RequestError
from ltxlite.request import Stage
from ltxlite.sampling.schedule_text import parse


def partial_stages(stages: Sequence[Stage], conditions: Conditions) -> tuple[Stage, ...]:
    """Return the stages with the first one's schedule begun where a source's `denoise` says.

    It keeps its number of steps; `denoise` 1 leaves it alone.
    Raises RequestError for `denoise` 0, after which there is nothing to do.
    Source: ComfyUI's denoise, a place in the schedule and no sigma: 0.4 begins at 0.877
    (features.md B4).
    """
    source = conditions.source
    if source is None or source.denoise is None or source.denoise == 1:
        return tuple(stages)
    if source.denoise == 0:
        raise RequestError("--denoise 0 leaves the clip as it is; wanted more, 0.3 to 0.6 is usual")
    steps = len(parse(stages[0].sigmas)) - 1
    begun = replace(stages[0], sigmas=f"simple:steps={steps},denoise={source.denoise:g}")
    return (begun, *stages[1:])
