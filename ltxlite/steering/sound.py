"""Puts given sound into the states of a stage."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ltxlite.conditioning import StageContext, States, freeze
from ltxlite.conditions import Conditions
from ltxlite.geometry import patchify_audio

if TYPE_CHECKING:
    from ltxlite.given import StageGiven


def steer_sound(
    states: States, conditions: Conditions, given: "StageGiven", stage: StageContext
) -> States:
    """Hold the sound to what is given, in every stage: frozen, or denoised from a part of noise.

    Frozen, its sigma reads 0, so that the picture follows it. With `denoise` d the mask is d for
    all tokens that the file fills, and 1 behind its end; later stages begin from what the earlier
    ones made of it.
    Source: LTX-2 400fd31 (a2v); the solid mask of ComfyUI; Wan2GP's prefix (features.md G2, G5).
    """
    sound = conditions.sound
    if sound is None or given.sound is None:
        return states
    video, audio = states
    tokens = patchify_audio(given.sound.latent).to(audio.clean)
    known = audio.target if given.sound.known is None else given.sound.known
    if sound.denoise == 0 and known == audio.target:
        return video, freeze(replace(audio, initial=tokens, clean=tokens))
    if audio.frozen and stage.number > 0:  # by the stage: it keeps what the first one made of it
        return states
    initial = tokens if stage.number == 0 else audio.initial
    mask = torch.full_like(audio.mask, sound.denoise)
    mask[:, known:] = 1
    return video, replace(audio, initial=initial, clean=tokens, mask=mask, frozen=False)
