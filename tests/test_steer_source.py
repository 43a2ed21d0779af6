"""States of a stage that is given a clip or a sound: masks, clean tokens, timesteps, positions."""

from fractions import Fraction
from typing import Literal

import pytest
import torch

from ltxlite.conditioning import LatentState, StageContext, States, freeze, start
from ltxlite.conditions import Conditions, Sound, Source
from ltxlite.geometry import (
    AudioGrid,
    ClipShape,
    LatentGrid,
    audio_positions,
    patchify_audio,
    patchify_video,
    video_positions,
)
from ltxlite.given import GivenSound, GivenSource, StageGiven
from ltxlite.steering import steer

RATE = Fraction(24)
SHAPE = ClipShape(4, 2, 3, 26, 24.0)  # 25 frames of 64x96, and their sound
VIDEO, AUDIO = torch.randn(1, 5, 4, 2, 3), torch.randn(1, 2, 26, 4)


def context(number: int = 0) -> StageContext:
    return StageContext(number, SHAPE, 25, RATE, LatentGrid(), AudioGrid())


def states() -> States:
    """Return a stage's states as they are before anything is given: 7 stands for what was there."""
    video = start(torch.full((1, 24, 5), 7.0), video_positions((4, 2, 3), 24.0, LatentGrid()))
    return video, start(torch.full((1, 26, 8), 7.0), audio_positions(26, AudioGrid()))


def steered(source: Source, given: GivenSource | None = None, number: int = 0) -> States:
    given = given or GivenSource(VIDEO, AUDIO)
    conditions = Conditions(source=source)
    return steer(states(), conditions, StageGiven(source=given), context(number))


def mask(state: LatentState) -> list[float]:
    values: list[float] = state.mask[0, :, 0].tolist()
    return values


def test_a_retake_frees_the_latent_frames_of_its_time_and_keeps_the_others_clean() -> None:
    # 0.4 s to 0.6 s are frames 9.6 to 14.4: latent 2 (frames 9 to 16); sound 10 to 15 (4j-3 mel).
    source = Source("x", video=(0.4, 0.6), audio=(0.4, 0.6))
    video, audio = steered(source)
    assert mask(video) == [0.0] * 12 + [1.0] * 6 + [0.0] * 6
    assert mask(audio) == [float(10 <= number <= 15) for number in range(26)]
    for state, latent in ((video, patchify_video(VIDEO)), (audio, patchify_audio(AUDIO))):
        assert torch.equal(state.clean, latent)
        assert torch.equal(state.initial, latent)
        assert not state.frozen
        noise = torch.randn_like(latent)
        noised = state.noised(noise, 1.0)
        free = state.mask.bool().expand_as(latent)
        assert torch.equal(noised[free], noise[free])
        assert torch.equal(noised[~free], latent[~free])
        assert torch.equal(state.blend(noise)[~free], latent[~free])
    before = states()
    assert torch.equal(video.positions, before[0].positions)
    assert (video.tokens, video.target) == (24, 24)


def test_a_stream_that_is_kept_whole_is_frozen() -> None:
    video, audio = steered(Source("x", audio=(0.0, 9.0)))
    assert video.frozen
    assert mask(video) == [0.0] * 24
    assert not audio.frozen
    assert mask(audio) == [1.0] * 26
    video, audio = steered(Source("x", video=(0.0, 9.0)))
    assert audio.frozen
    assert not video.frozen
    assert torch.equal(audio.clean, patchify_audio(AUDIO))


def test_a_later_stage_goes_on_from_the_one_before_where_it_is_free() -> None:
    video, _ = steered(Source("x", video=(0.4, 0.6)), number=1)
    assert torch.equal(video.initial, states()[0].initial)
    assert torch.equal(video.clean, patchify_video(VIDEO))


def test_a_held_stage_keeps_all_of_the_picture_and_the_next_one_frees_it() -> None:
    source = Source("x", video=(0.0, 2.0), held=(1,))
    assert steered(source)[0].frozen
    assert mask(steered(source, number=1)[0]) == [1.0] * 24


def test_a_silent_source_leaves_the_sound_to_the_model() -> None:
    _, audio = steered(Source("x", video=(0.4, 0.6)), GivenSource(VIDEO))
    assert mask(audio) == [1.0] * 26
    assert torch.equal(audio.initial, states()[1].initial)


def test_a_region_frees_its_places_within_the_time_only() -> None:
    region = torch.zeros(4, 2, 3)
    region[:, 1, 2] = 1
    source = Source("x", video=(0.4, 2.0), mask="m.png")
    video, _ = steered(source, GivenSource(VIDEO, AUDIO, region))
    # Place (1, 2) is the sixth of a latent frame; frames 2 and 3 are in the time.
    assert [number for number, value in enumerate(mask(video)) if value] == [17, 23]


def test_denoise_frees_the_picture_and_starts_from_the_clip() -> None:
    video, audio = steered(Source("x", denoise=0.4))
    assert mask(video) == [1.0] * 24
    assert torch.equal(video.initial, patchify_video(VIDEO))
    assert audio.frozen


@pytest.mark.parametrize("number", [0, 1])
def test_given_sound_is_frozen_in_every_stage(number: int) -> None:
    given = StageGiven(sound=GivenSound(AUDIO))
    conditions = Conditions(sound=Sound("a.wav"))
    video, audio = steer(states(), conditions, given, context(number))
    assert audio.frozen
    assert mask(audio) == [0.0] * 26
    assert torch.equal(audio.initial, patchify_audio(AUDIO))
    assert mask(video) == [1.0] * 24
    assert audio.levels().values.tolist() == [0.0]


@pytest.mark.parametrize(("number", "kept"), [(0, True), (1, False)])
def test_partly_denoised_sound_has_one_level_and_goes_on_from_stage_to_stage(
    number: int, kept: bool
) -> None:
    given = StageGiven(sound=GivenSound(AUDIO))
    conditions = Conditions(sound=Sound("a.wav", denoise=0.25, output="decoded"))
    _, audio = steer(states(), conditions, given, context(number))
    assert audio.levels().values.tolist() == [0.25]
    assert not audio.frozen
    assert torch.equal(audio.clean, patchify_audio(AUDIO))
    assert torch.equal(audio.initial, patchify_audio(AUDIO)) == kept


def test_sound_that_a_later_stage_freezes_stays_as_the_first_one_made_it() -> None:
    video, audio = states()
    held = (video, freeze(audio))
    partly = Conditions(sound=Sound("a.wav", denoise=0.25))
    retaken = Conditions(source=Source("x", video=(0.4, 0.6), audio=(0.4, 0.6)))
    for conditions, given in (
        (partly, StageGiven(sound=GivenSound(AUDIO))),
        (retaken, StageGiven(source=GivenSource(VIDEO, AUDIO))),
    ):
        _, steered_audio = steer(held, conditions, given, context(1))
        assert steered_audio.frozen
        assert torch.equal(steered_audio.clean, audio.clean)


def test_given_sound_goes_before_the_source_s_own() -> None:
    other = torch.randn(1, 2, 26, 4)
    given = StageGiven(source=GivenSource(VIDEO, AUDIO), sound=GivenSound(other))
    conditions = Conditions(source=Source("x", denoise=0.4), sound=Sound("a.wav"))
    _, audio = steer(states(), conditions, given, context())
    assert torch.equal(audio.clean, patchify_audio(other))


@pytest.mark.parametrize("edge", ["outward", "inward"])
def test_the_edge_decides_whether_touched_latents_are_free(
    edge: Literal["outward", "inward"],
) -> None:
    # Frames 2 to 20: latents 1 to 3 are touched, latent 2 alone lies inside.
    source = Source("x", video=(2 / 24, 20 / 24), edge=edge)
    freed = {number // 6 for number, value in enumerate(mask(steered(source)[0])) if value}
    assert freed == ({1, 2, 3} if edge == "outward" else {2})
