"""Pyramid blends and grown masks against formulas of their own."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ltxlite.media.pyramid import grown, pyramid_blend


def noise(*size: int, seed: int = 1) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [(64, 64), (57, 101), (200, 37), (32, 5)])
def test_masks_of_one_value_give_one_picture(size: tuple[int, int]) -> None:
    inside, outside = noise(2, 3, *size), noise(2, 3, *size, seed=2)
    one, none = torch.ones(2, 1, *size), torch.zeros(2, 1, *size)
    # Seven levels are taken apart and put together again, in fp32.
    torch.testing.assert_close(pyramid_blend(inside, outside, one), inside, rtol=0, atol=2e-6)
    torch.testing.assert_close(pyramid_blend(inside, outside, none), outside, rtol=0, atol=2e-6)


def test_equal_pictures_stay_whatever_the_mask_is() -> None:
    pixels, mask = noise(1, 3, 45, 70), (noise(1, 1, 45, 70, seed=3) + 1) / 2
    torch.testing.assert_close(pyramid_blend(pixels, pixels, mask), pixels, rtol=0, atol=2e-6)


def smoothed(row: np.ndarray) -> np.ndarray:
    return np.convolve(np.pad(row, 2, mode="reflect"), np.array([1, 4, 6, 4, 1]) / 16, "valid")


def test_flat_pictures_pass_into_each_other_over_the_coarsest_level() -> None:
    # What differs is the coarsest level alone: the mask, smoothed and halved twice, and back.
    mask = torch.zeros(1, 1, 16, 64)
    mask[..., 20:] = 1
    found = pyramid_blend(torch.full((1, 3, 16, 64), 0.5), torch.zeros(1, 3, 16, 64), mask, 3)
    row = mask[0, 0, 0].double().numpy()
    for _ in range(2):
        row = smoothed(row).reshape(-1, 2).mean(1)
    for _ in range(2):
        padded = np.concatenate([row[:1], row, row[-1:]])
        # Bilinear at twice the size: quarters between neighbours.
        even, odd = 0.25 * padded[:-2] + 0.75 * row, 0.75 * row + 0.25 * padded[2:]
        row = smoothed(np.stack([even, odd], 1).reshape(-1))
    wanted = torch.from_numpy(0.5 * row).float().expand(3, 16, 64)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-6)
    assert 0.1 < found[0, 0, 0, 19] < 0.4, "the border is soft"


def test_a_mask_grows_by_sixty_fourths_of_the_long_side() -> None:
    mask = torch.zeros(1, 1, 96, 128)
    mask[..., 40:56, 60:64] = 1
    reach = grown(mask, 5)
    # Two pixels a place: rows 40 to 55 are places 20 to 27, columns 60 to 63 places 30 and 31.
    coarse = reach[0, 0, ::2, ::2] > 0.9
    rows, columns = (coarse.any(axis).nonzero().flatten() for axis in (1, 0))
    assert [int(rows[0]), int(rows[-1])] == pytest.approx([15, 32], abs=1)
    assert [int(columns[0]), int(columns[-1])] == pytest.approx([25, 36], abs=1)
    assert torch.equal(grown(mask, 0), mask)
    assert torch.equal(grown(torch.zeros(1, 1, 7, 9), 3), torch.zeros(1, 1, 7, 9))
