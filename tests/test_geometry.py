"""Sizes, frames and grids."""

from fractions import Fraction

import pytest
import torch

from ltxlite.errors import RequestError
from ltxlite.geometry import (
    AudioGrid,
    ClipShape,
    LatentGrid,
    patchify_audio,
    patchify_video,
    size_multiple,
    unpatchify_audio,
    unpatchify_video,
)

GRID = LatentGrid()


def test_frames_snap_down_to_8n_plus_1() -> None:
    assert [GRID.snap_frames(n) for n in (1, 8, 9, 16, 17, 120, 121, 128)] == [
        *(1, 1, 9, 9, 17, 113, 121, 121)
    ]
    with pytest.raises(RequestError, match="at least one frame"):
        GRID.snap_frames(0)


def test_latent_frames_cover_the_frames_they_should() -> None:
    # 25 frames are 4 latents, not 25 // 8 (features.md A1).
    assert [GRID.latent_frames(n) for n in (1, 9, 25, 121)] == [1, 2, 4, 16]
    assert [GRID.first_frame(k) for k in (0, 1, 3)] == [0, 1, 17]
    assert [GRID.latent_index(p) for p in (0, 1, 8, 9, 16, 17)] == [0, 1, 1, 2, 2, 3]
    assert all(GRID.latent_frames(GRID.pixel_frames(k)) == k for k in range(1, 40))


def test_sizes_snap_to_the_nearest_multiple_ties_up() -> None:
    assert [GRID.snap_size(n, 64) for n in (1, 63, 95, 96, 97, 720, 1080)] == [
        *(64, 64, 64, 128, 128, 704, 1088)
    ]


@pytest.mark.parametrize(
    ("scales", "multiple"),
    [(["1"], 32), (["1/2", "1"], 64), (["1/4", "1/2", "1"], 128), (["2/3", "1"], 96)],
)
def test_the_multiple_makes_every_stage_legal(scales: list[str], multiple: int) -> None:
    fractions = [Fraction(scale) for scale in scales]
    assert size_multiple(fractions, 32) == multiple
    for size in (multiple, 3 * multiple):
        assert all((size * fraction) % 32 == 0 for fraction in fractions)


@pytest.mark.parametrize(
    ("frames", "fps", "latents"),
    [(121, 24, 126), (121, 25, 121), (241, 24, 251), (257, 25, 257), (497, 25, 497)],
)
def test_sound_is_as_long_as_the_picture(frames: int, fps: int, latents: int) -> None:
    assert AudioGrid().latent_frames(frames, Fraction(fps)) == latents


def test_patchify_and_back_is_the_identity_and_drops_appended_tokens() -> None:
    video = torch.arange(2 * 5 * 3 * 2 * 4.0).reshape(2, 5, 3, 2, 4)
    tokens = patchify_video(video)
    assert torch.equal(tokens[1, 2 * 8 + 1 * 4 + 3], video[1, :, 2, 1, 3])
    shape = ClipShape(3, 2, 4, 7, 24.0)
    longer = torch.cat([tokens, tokens[:, :3]], dim=1)
    assert torch.equal(unpatchify_video(longer, shape), video)
    audio = torch.arange(2 * 3 * 7 * 4.0).reshape(2, 3, 7, 4)
    tokens = patchify_audio(audio)
    assert torch.equal(tokens[1, 5], audio[1, :, 5].flatten())
    assert torch.equal(unpatchify_audio(torch.cat([tokens, tokens], dim=1), 7, 3), audio)
