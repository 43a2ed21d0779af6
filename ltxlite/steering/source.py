"""Puts an existing clip into the states of a stage: what is kept of it, and what is made anew."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltxlite.conditioning import LatentState, StageContext, States, freeze
from ltxlite.conditions import Conditions, Source
from ltxlite.geometry import patchify_audio, patchify_video
from ltxlite.given.source_clip import picture_latents, sound_latents

if TYPE_CHECKING:
    from ltxlite.given import GivenSource, StageGiven


def steer_source(
    states: States, conditions: Conditions, given: "StageGiven", stage: StageContext
) -> States:
    """Hold picture and sound to a source but where they are made anew.

    Kept tokens are the source's, at mask 0; the others start from the source's in the first stage,
    as far as its first sigma leaves any of it, and from the stage before in later ones. A stream
    of which everything is kept is frozen. Sound that a source lacks is made as without it.
    Source: LTX-2 400fd31 (retake, video to audio); features.md I3 to I5.
    """
    source = conditions.source
    if source is None or given.source is None:
        return states
    video, audio = states
    video = _picture(video, source, given.source, stage)
    if given.source.audio is not None and not audio.frozen:  # by the stage: it is done already
        audio = _sound(audio, source, given.source.audio, stage)
    return video, audio


def _picture(
    state: LatentState, source: Source, given: "GivenSource", stage: StageContext
) -> LatentState:
    latents = picture_latents(source, stage.frames, stage.rate, stage.grid)
    shape = stage.shape
    mask = torch.zeros(shape.frames, shape.rows, shape.columns)
    if stage.number + 1 not in source.held:
        mask[latents.start : latents.stop] = 1
    if given.region is not None:
        mask *= given.region
    if source.first:
        mask[0] = 0
    return _held(state, patchify_video(given.video), mask.flatten(), stage)


def _sound(state: LatentState, source: Source, latent: Tensor, stage: StageContext) -> LatentState:
    remade = sound_latents(source, stage.shape.audio_frames, stage.audio_grid)
    mask = torch.zeros(stage.shape.audio_frames)
    mask[remade.start : remade.stop] = 1
    return _held(state, patchify_audio(latent), mask, stage)


def _held(state: LatentState, tokens: Tensor, mask: Tensor, stage: StageContext) -> LatentState:
    """Return a state with tokens (1, T, C) kept where mask (T,) is 0."""
    tokens = tokens.to(state.clean)
    if not bool(mask.any()):
        return freeze(replace(state, initial=tokens, clean=tokens))
    initial = tokens if stage.number == 0 else state.initial
    mask = mask[None, :, None].to(state.mask).expand_as(state.mask).clone()
    return replace(state, initial=initial, clean=tokens, mask=mask, frozen=False)
