"""Lets a clip hear a voice before it begins, and speak with it."""

from typing import TYPE_CHECKING

from torch import Tensor

from ltxlite.conditioning import LatentState, StageContext, States, append_tokens, voice_positions
from ltxlite.conditions import Conditions, Voice
from ltxlite.geometry import patchify_audio

if TYPE_CHECKING:
    from ltxlite.given import StageGiven


def steer_voice(
    states: States, conditions: Conditions, given: "StageGiven", stage: StageContext
) -> States:
    """Append the voice's tokens to the sound, clean, at times before the clip.

    A stage that hears an echo is given the sound so far in their place.
    Source: LTX-2 400fd31 (dubit: AudioConditionByReferenceLatent); model.md 7.8.
    """
    video, audio = states
    tokens = None
    if given.voice is not None:
        tokens = patchify_audio(given.voice)
    elif conditions.voice is not None:
        tokens = _echo(conditions.voice, audio, stage)
    if tokens is None:
        return states
    positions = voice_positions(tokens.shape[1], stage.audio_grid)
    return video, append_tokens(audio, tokens, positions, strength=1.0)


def _echo(voice: Voice, audio: LatentState, stage: StageContext) -> Tensor | None:
    is_later = stage.number > 0 and stage.number + 1 not in voice.stages
    return audio.initial if voice.echo and is_later else None
