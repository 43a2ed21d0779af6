"""The prediction of decoding against the account of the real code, and the choice it serves."""

import dataclasses
import itertools

import pytest
import torch

from ltxlite.errors import BudgetError
from ltxlite.memory.meter import ActivationMeter
from ltxlite.models.rolling import decode_frames
from ltxlite.models.tiling import Span, Tiling, space_tiles
from ltxlite.models.video_vae import VideoDecoder
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.models.window import (
    GROUP_LADDER,
    Clip,
    DecodeWindow,
    choose_window,
    classical_window,
    decode_need,
    narrower,
)

RELEASED = VideoVAEConfig.released("2.3")
HD: Clip = (16, 34, 60)  # 1920x1088, 121 frames
UHD: Clip = (16, 68, 120)


def account(family: str, clip: Clip, group_bytes: int, dtype: torch.dtype) -> int:
    """Return the peak of decoding with the released network, without its weights and the latent."""
    with torch.device("meta"):
        decoder = VideoDecoder(VideoVAEConfig.released(family)).to(dtype)
        latent = torch.empty(1, 128, *clip, dtype=dtype)
    with ActivationMeter() as meter:
        for frames in decode_frames(decoder, latent, group_bytes):
            del frames
    return meter.peak_bytes


@pytest.mark.parametrize(
    ("family", "clip", "group_bytes", "dtype"),
    [
        ("2.3", (16, 34, 60), 64 << 20, torch.bfloat16),
        ("2.3", (16, 15, 23), 64 << 20, torch.float32),
        ("2.3", (17, 15, 23), 16 << 20, torch.bfloat16),
        ("2.3", (7, 9, 11), 1, torch.bfloat16),
        ("2.0", (16, 17, 24), 32 << 20, torch.bfloat16),
        ("2.0", (14, 9, 11), 2 << 20, torch.bfloat16),
        ("2.3", (1, 34, 60), 64 << 20, torch.bfloat16),
        ("2.0", (1, 7, 9), 64 << 20, torch.float32),
    ],
)
def test_the_need_is_predicted_within_5_percent(
    family: str, clip: Clip, group_bytes: int, dtype: torch.dtype
) -> None:
    counted = account(family, clip, group_bytes, dtype)
    need = decode_need(VideoVAEConfig.released(family), clip, group_bytes, dtype.itemsize)
    assert need == pytest.approx(counted, rel=0.055)  # 5.1 % above at the most, for 2.0
    assert counted <= need * 1.05


@pytest.mark.parametrize("latents", [2, 5])
def test_short_clips_need_no_more_than_predicted(latents: int) -> None:
    clip = (latents, 8, 12)
    for group_bytes in (2 << 20, 8 << 20):
        counted = account("2.3", clip, group_bytes, torch.bfloat16)
        assert counted <= 1.05 * decode_need(RELEASED, clip, group_bytes)


def test_the_largest_groups_that_fit_are_chosen() -> None:
    needs = [decode_need(RELEASED, HD, group_bytes) for group_bytes in GROUP_LADDER]
    assert needs == sorted(needs, reverse=True)
    for group_bytes, need in zip(GROUP_LADDER[:4], needs, strict=False):
        window = choose_window(RELEASED, HD, int(need * 1.051))
        assert (window.group_bytes, window.need_bytes) == (group_bytes, need)
        assert window.is_whole and window.host_bytes == 0
    assert choose_window(RELEASED, HD, 1 << 40).group_bytes == GROUP_LADDER[0]


@pytest.mark.parametrize("clip", [HD, UHD, (31, 45, 80), (16, 90, 33)])
@pytest.mark.parametrize("budget", [2 << 30, 1 << 30, 600 << 20, 300 << 20])
def test_tiles_fit_their_budget_and_overlap_by_128_pixels(clip: Clip, budget: int) -> None:
    window = choose_window(RELEASED, clip, budget)
    assert window.need_bytes * 1.05 <= budget
    sizes = []
    for length, span in zip(clip[1:], (window.rows, window.columns), strict=True):
        tiles = space_tiles(length, span)
        assert len(tiles) == 1 or span.overlap == 4
        assert all(tile.rise + tile.fall <= tile.stop - tile.start for tile in tiles)
        sizes.append([tile.stop - tile.start for tile in tiles])
    assert window.need_bytes == decode_need(
        RELEASED, (clip[0], max(sizes[0]), max(sizes[1])), window.group_bytes
    )
    areas = [rows * columns for rows in sizes[0] for columns in sizes[1]]
    frames = 8 * clip[0] - 7
    assert window.host_bytes == (sum(areas) - areas[0]) * 32 * 32 * frames * 3 * 2


def test_a_smaller_budget_never_computes_less() -> None:
    work = []
    for budget in range(200, 9000, 400):
        window = choose_window(RELEASED, UHD, budget << 20)
        rows, columns = space_tiles(68, window.rows), space_tiles(120, window.columns)
        areas = [(r.stop - r.start) * (c.stop - c.start) for r in rows for c in columns]
        work.append(sum(areas))
    assert work == sorted(work, reverse=True)
    assert work[-1] == 68 * 120 < work[0]


def test_what_cannot_fit_is_refused_with_what_it_takes() -> None:
    with pytest.raises(BudgetError, match=r"16 latent frames of 34x60 need 8[0-9] MiB.*got 50 MiB"):
        choose_window(RELEASED, HD, 50 << 20)
    with pytest.raises(BudgetError, match=r"finished tiles.* and 100 MiB; free memory"):
        choose_window(RELEASED, UHD, 4 << 30, host_bytes=100 << 20)


def test_the_host_may_limit_the_tiles_instead() -> None:
    free = choose_window(RELEASED, UHD, 4 << 30)
    tight = choose_window(RELEASED, UHD, 5 << 30, host_bytes=free.host_bytes - 1)
    assert 0 < tight.host_bytes < free.host_bytes
    assert tight.columns == Span(62, 4)  # two tiles instead of three


def test_wider_numbers_need_as_much_more() -> None:
    assert decode_need(RELEASED, HD, 1, 4) == 2 * decode_need(RELEASED, HD, 1, 2)
    narrow = dataclasses.replace(RELEASED, decoder_width=64)
    # The latent's own channels and the pixels' stay, which is little.
    assert decode_need(narrow, HD, 1) == pytest.approx(decode_need(RELEASED, HD, 1) / 2, rel=0.01)


def test_the_official_tiles_need_what_their_largest_tile_does() -> None:
    window = classical_window(RELEASED, HD, Tiling.auto(1088, 1920), 32 << 20)
    assert (window.frames, window.columns) == (Span(10, 3), Span(24, 2))
    assert window.rows == Span(14, 2)  # 24 x 34 / 60, rounded
    assert window.is_classical and not window.is_whole
    # Tiles after the first begin with a frame more; the account of one is the oracle.
    counted = account("2.3", (11, 14, 24), 32 << 20, torch.bfloat16)
    assert window.need_bytes == pytest.approx(counted, rel=0.055)
    # Two stretches of 81 frames in fp32.
    assert window.host_bytes == 2 * 81 * 1088 * 1920 * 3 * 4


def test_a_clip_within_one_tile_needs_no_more_than_the_clip() -> None:
    clip: Clip = (3, 5, 7)
    window = classical_window(RELEASED, clip, Tiling.auto(160, 224), 1 << 20, 4)
    assert window.need_bytes == decode_need(RELEASED, clip, 1 << 20, 4)


@pytest.mark.parametrize("clip", [HD, (3, 5, 7)])
def test_windows_grow_narrower_until_nothing_needs_less(clip: Clip) -> None:
    window, needs = DecodeWindow(GROUP_LADDER[0]), [decode_need(RELEASED, clip, GROUP_LADDER[0])]
    with pytest.raises(BudgetError, match="decode: "):
        for _ in range(99):
            window = narrower(RELEASED, clip, window)
            needs.append(window.need_bytes)
    assert 2 <= len(needs) < 40
    # choose_window keeps 5 % for what the account may be above its prediction.
    assert all(less * 21 // 20 <= more * 9 // 10 for more, less in itertools.pairwise(needs))
    assert clip != HD or not window.is_whole


def test_classical_tiles_stay_what_they_are_as_their_groups_shrink() -> None:
    window = classical_window(RELEASED, HD, Tiling.auto(1088, 1920), GROUP_LADDER[0])
    smaller = narrower(RELEASED, HD, window)
    kept = ("frames", "rows", "columns", "host_bytes")
    assert all(getattr(smaller, name) == getattr(window, name) for name in kept)
    assert smaller.group_bytes < window.group_bytes
    assert smaller.need_bytes <= 0.9 * window.need_bytes
    with pytest.raises(BudgetError, match="make them smaller"):
        for _ in range(9):
            window = narrower(RELEASED, HD, window)
