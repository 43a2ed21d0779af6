"""Colour maps: the mapped picture has the moments of the reference, and little else changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ltxlite.media.colour_match import ColourMap, match_covariance, match_moments

Match = Callable[[Tensor, Tensor], ColourMap]


def pictures(seed: int, frames: int, height: int, width: int) -> Tensor:
    """Return correlated colours (F, 3, H, W) well inside of [-1, 1], fp64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(frames, 3, height, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64) * 0.03
    shift = torch.rand(3, generator=generator, dtype=torch.float64) * 0.4 - 0.2
    return torch.einsum("ij,fjhw->fihw", mix, noise.clamp(-3, 3)) + shift[:, None, None]


def colours(pixels: Tensor) -> Tensor:
    return pixels.movedim(1, 0).flatten(1)


def test_each_channel_gets_mean_and_deviation_of_the_reference() -> None:
    source, reference = pictures(1, 3, 17, 23), pictures(2, 1, 31, 9)
    mapped = colours(match_moments(source, reference)(source))
    wanted = colours(reference)
    # fp64: rounding only.
    assert torch.allclose(mapped.mean(1), wanted.mean(1), atol=1e-12)
    assert torch.allclose(mapped.std(1, correction=0), wanted.std(1, correction=0), atol=1e-12)


def test_the_covariance_map_gives_the_whole_covariance() -> None:
    source, reference = pictures(3, 2, 17, 23), pictures(4, 1, 31, 9)
    mapped = match_covariance(source, reference)(source)
    # The regularisation, 1e-8 on variances of about 1e-3.
    wanted = torch.cov(colours(reference), correction=0)
    assert torch.allclose(torch.cov(colours(mapped), correction=0), wanted, rtol=1e-3, atol=1e-6)
    assert torch.allclose(colours(mapped).mean(1), colours(reference).mean(1), atol=1e-12)


@pytest.mark.parametrize("match", [match_moments, match_covariance])
def test_a_picture_matched_to_itself_stays(match: Match) -> None:
    source = pictures(5, 1, 13, 11)
    # Twice the square root of the regularisation's share.
    assert torch.allclose(match(source, source)(source), source, atol=1e-4)


@pytest.mark.parametrize("match", [match_moments, match_covariance])
def test_a_flat_picture_is_moved_and_stays_finite(match: Match) -> None:
    flat = torch.full((1, 3, 5, 7), 0.25)
    mapped = match(flat, pictures(6, 1, 9, 9).float())(flat)
    assert mapped.dtype == torch.float32
    wanted = colours(pictures(6, 1, 9, 9)).mean(1).float()
    # fp32 arithmetic on values below one.
    assert torch.allclose(mapped[0, :, 0, 0], wanted, atol=1e-5)
