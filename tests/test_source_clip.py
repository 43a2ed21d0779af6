"""Intervals of a source as latents, frames and samples, against published vectors and positions."""

from fractions import Fraction

import pytest
import torch

from ltxlite.conditioning import mask_interval, start
from ltxlite.conditions import Source
from ltxlite.geometry import AudioGrid, LatentGrid, audio_positions, video_positions
from ltxlite.given.source_clip import (
    EVERYTHING,
    Span,
    picture_frames,
    picture_latents,
    sound_latents,
    sound_samples,
)

GRID, SOUND = LatentGrid(), AudioGrid()
INTERVALS = [(0.0, 0.04), (0.3, 0.31), (2.0, 4.0), (1.0, 1.375), (3.9, 9.0), (0.0, 40.0)]


def retake(begin: float, end: float, edge: str = "outward") -> Source:
    span = (begin, end)
    return Source("x.mp4", video=span, audio=span, edge=edge)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frames", "fps", "interval", "latents"),
    [
        (121, 25, (2, 4), (8, 13)),  # features.md part D, computed from KJNodes
        (121, 24, (2, 4), (7, 12)),
        (121, 25, (0, 5), (0, 16)),
        (497, 25, (1.0, 19.88), (4, 63)),
    ],
)
def test_inward_latents_are_those_of_the_published_vectors(
    frames: int, fps: int, interval: tuple[float, float], latents: tuple[int, int]
) -> None:
    source = retake(*interval, edge="inward")
    assert picture_latents(source, frames, Fraction(fps), GRID) == Span(*latents)


@pytest.mark.parametrize("fps", [Fraction(24), Fraction(24000, 1001), Fraction(50)])
@pytest.mark.parametrize("interval", INTERVALS)
def test_outward_latents_are_those_whose_positions_overlap(
    fps: Fraction, interval: tuple[float, float]
) -> None:
    # The reference: the official retake rule on token positions.
    positions = video_positions((16, 1, 1), float(fps), GRID)
    state = mask_interval(start(torch.zeros(1, 16, 3), positions), *interval)
    span = picture_latents(retake(*interval), 121, fps, GRID)
    assert [number in span for number in range(16)] == (state.mask[0, :, 0] == 1).tolist()


@pytest.mark.parametrize("interval", INTERVALS)
def test_outward_sound_is_the_latents_whose_positions_overlap(
    interval: tuple[float, float],
) -> None:
    state = start(torch.zeros(1, 126, 3), audio_positions(126, SOUND))
    state = mask_interval(state, *interval)
    span = sound_latents(retake(*interval), 126, SOUND)
    assert [number in span for number in range(126)] == (state.mask[0, :, 0] == 1).tolist()


def test_inward_sound_has_one_latent_more_and_is_cut_at_the_end() -> None:
    # KJNodes: [round(25 a), round(25 b) + 1), clamped; a = b at the end of the clip is empty.
    assert sound_latents(retake(1, 2, "inward"), 126, SOUND) == Span(25, 51)
    assert sound_latents(retake(19.88, 19.881, "inward"), 497, SOUND).is_empty
    assert sound_latents(retake(4, 9, "inward"), 126, SOUND) == Span(100, 126)


def test_remade_frames_are_all_that_remade_latents_show() -> None:
    # 2 s at 24 fps begin at frame 48, which latent 6 (41 to 48) shows; 4 s at 96, before 12's end.
    assert picture_frames(retake(2, 4), 121, Fraction(24), GRID) == Span(41, 97)
    assert picture_frames(retake(2, 4, "inward"), 121, Fraction(24), GRID) == Span(49, 89)
    assert picture_frames(Source("x"), 121, Fraction(24), GRID).is_empty


def test_a_time_on_the_edge_of_a_frame_does_not_touch_the_frame_before() -> None:
    # 25 frames are latents 0 to 3; the time of frame 25 in float is a little off at 23.976 fps.
    rate = Fraction(24000, 1001)
    assert picture_latents(retake(25 / float(rate), 9), 121, rate, GRID) == Span(4, 16)


def test_a_mask_or_a_denoise_alone_mean_the_whole_clip() -> None:
    whole = Span(0, 4)
    assert picture_latents(Source("x", mask="m.png"), 25, Fraction(24), GRID) == whole
    assert picture_latents(Source("x", denoise=0.4), 25, Fraction(24), GRID) == whole
    assert sound_latents(Source("x", denoise=0.4), 26, SOUND).is_empty


def test_remade_samples_begin_and_end_with_their_latents() -> None:
    # Latents 25 to 50: mel frames 97 to 201 of 160 samples at 16 kHz, so 0.97 s to 2.01 s.
    source = retake(1, 2)
    span = sound_latents(source, 126, SOUND)
    assert (span.start, span.stop) == (25, 51)
    assert sound_samples(source, 126, 44_100, SOUND) == Span(42_777, 88_641)
    last = sound_samples(Source("x", audio=EVERYTHING), 126, 48_000, SOUND)
    assert last.start == 0
    assert last.stop > 126 * 48_000
