"""The small world: its words, and that its clips measure as what they were drawn from."""

import pytest
import torch

from ltxlite.training import scene
from ltxlite.training.measure import facts_of, listen, listen_to, look, together
from ltxlite.training.world import (
    CHOICES,
    Facts,
    every_fact,
    held_out,
    read_caption,
    shown,
    unknown_words,
)

# height, width, frames, frames a second: what the model is trained on, and odd ones.
KINDS = ((64, 64, 17, 16.0), (64, 96, 9, 16.0), (70, 62, 25, 24.0), (128, 128, 17, 12.0))


def test_an_eighth_of_all_captions_is_held_out_and_every_word_is_still_shown() -> None:
    assert len(every_fact()) == 1296 == len(held_out()) + len(shown())
    assert 0.1 < len(held_out()) / 1296 < 0.16
    for name, choice in CHOICES.items():
        for facts in (held_out(), shown()):
            assert {getattr(item, name) for item in facts} == set(choice)


def test_a_caption_reads_back_as_the_facts_it_was_made_of_in_every_phrase() -> None:
    for facts in every_fact()[::97]:
        for phrase in range(3):
            assert read_caption(facts.caption(phrase)) == facts


def test_unknown_words_are_named_once_and_in_order() -> None:
    assert unknown_words("A red boat, a red BOAT on an old sea") == ("boat", "an", "old", "sea")
    assert unknown_words(held_out()[0].caption()) == ()


def test_what_a_prompt_leaves_open_is_taken_from_what_was_seen() -> None:
    seen = every_fact()[5]
    assert read_caption("a green thing") is None
    assert read_caption("a green thing", seen) == Facts(
        "green", seen.shape, seen.direction, seen.background, seen.tone, seen.rhythm
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_attribute_is_measured_in_every_rendered_clip(
    kind: tuple[int, int, int, float],
) -> None:
    height, width, frames, fps = kind
    generator = torch.Generator().manual_seed(height)
    facts = every_fact()[height % 7 :: 47]
    scenes = scene.draw(facts, generator)
    clips = scene.pictures(scenes, (height, width), frames, fps)
    sounds = scene.spectrograms(scenes, 4 * round(frames / fps * 25) - 3)
    for clip, sound, wanted in zip(clips, sounds, facts, strict=True):
        sight, hearing = look(clip.transpose(0, 1), fps), listen(sound)
        assert facts_of(sight, hearing) == wanted
        assert sight.rhythm == wanted.rhythm
        if wanted.rhythm == "pulsing":
            assert together(sight, hearing, fps) > 0.5


def test_waveforms_at_48_khz_measure_as_spectrograms_do() -> None:
    facts = every_fact()[::211]
    scenes = scene.draw(facts, torch.Generator().manual_seed(3))
    for wave, wanted in zip(scene.sounds(scenes, 51_000, 48_000), facts, strict=True):
        hearing = listen_to(wave, 48_000)
        assert (hearing.tone, hearing.rhythm) == (wanted.tone, wanted.rhythm)


def test_blurred_noisy_pictures_still_measure_right() -> None:
    # What a small autoencoder makes of them: edges 3 pixels wide, noise of 3 %.
    generator = torch.Generator().manual_seed(1)
    facts = every_fact()[::131]
    clips = scene.pictures(scene.draw(facts, generator), (64, 64), 17, 16.0)
    for clip, wanted in zip(clips, facts, strict=True):
        frames = torch.nn.functional.avg_pool2d(clip.transpose(0, 1), 3, 1, 1, False, False)
        frames = frames + 0.06 * torch.randn(frames.shape, generator=generator)
        sight = look(frames, 16.0)
        assert (sight.colour, sight.background) == (wanted.colour, wanted.background)
        assert (sight.direction, sight.shape) == (wanted.direction, wanted.shape)


def test_nothing_to_see_or_hear_is_measured_without_an_error() -> None:
    sight, hearing = look(torch.zeros(9, 3, 32, 48), 16.0), listen(torch.full((2, 33, 64), -11.5))
    assert sight.contrast == 0
    assert hearing.rhythm == "steady"


def test_narrow_scenes_stay_near_the_middles_and_pulse_in_two_ways() -> None:
    facts = every_fact()[::3]
    wide, narrow = (
        scene.draw(facts, torch.Generator().manual_seed(5), spread) for spread in (1.0, 0.4)
    )
    middle = (0.21 + 0.28) / 2
    assert (narrow.radius - middle).abs().max() <= 0.4 * 0.035 + 1e-6
    # The same chance, drawn together: each scene lies 0.4 times as far out.
    torch.testing.assert_close(narrow.radius - middle, 0.4 * (wide.radius - middle))
    assert set((narrow.phase / torch.pi).round(decimals=5).tolist()) == {0.0, 1.0}
    assert len(wide.phase.unique()) > 100
