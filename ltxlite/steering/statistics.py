"""What a stage's picture is to stay like: the reference that AdaIN follows."""

import torch
from torch import Tensor

from ltxlite.conditioning import LatentState, StageContext
from ltxlite.conditions import Conditions, Source
from ltxlite.errors import RequestError
from ltxlite.geometry import patchify_video
from ltxlite.given import StageGiven
from ltxlite.given.source_clip import picture_latents
from ltxlite.request import Request
from ltxlite.sampling.settings import Statistics
from ltxlite.sampling.statistics import ChannelControl


def check_statistics(request: Request) -> None:
    """Refuse a first stage that is to follow something and has nothing. Raises RequestError."""
    conditions = request.conditions
    if request.stages[0].statistics.follows and not has_first_reference(conditions):
        raise RequestError(
            "adain in stage 1: it begins from noise alone; give it an image or a source to "
            "follow, or leave it to later stages"
        )


def has_first_reference(conditions: Conditions) -> bool:
    """Tell whether AdaIN has something to follow in the first stage."""
    return conditions.source is not None or bool(conditions.images)


def channel_control(
    settings: Statistics,
    conditions: Conditions,
    given: StageGiven,
    begun: Tensor,
    stage: StageContext,
) -> ChannelControl | None:
    """Bind a stage's settings to their reference; None where they change nothing.

    begun: the picture (1, C, F, Y, X) that the stage begins from.
    """
    if not settings.is_active:
        return None
    reference = None
    if settings.follows:
        latent = begun
        if stage.number == 0:
            latent = _first_reference(conditions, given, stage, settings.per_frame).to(begun)
        reference = patchify_video(latent).unflatten(1, (latent.shape[2], -1))
    return ChannelControl(settings, stage.shape.frames, stage.shape.video_tokens, reference)


def controlled(control: ChannelControl | None, x: Tensor, state: LatentState) -> Tensor:
    """Return a stage's result (B, T, C) after its control; what is kept stays as it is."""
    if control is None:
        return x
    return torch.where(state.mask == 0, state.clean.to(x), control.finished(x))


def _first_reference(
    conditions: Conditions, given: StageGiven, stage: StageContext, per_frame: bool
) -> Tensor:
    source = conditions.source
    if source is not None and given.source is not None:
        return given.source.video if per_frame else _kept(source, given.source.video, stage)
    return given.images[0][:, :, :1]


def _kept(source: Source, video: Tensor, stage: StageContext) -> Tensor:
    """Return the frames of a source that are kept; all of them where none is."""
    remade = picture_latents(source, stage.frames, stage.rate, stage.grid)
    kept = [number for number in range(video.shape[2]) if number not in remade]
    return video[:, :, kept] if kept else video
