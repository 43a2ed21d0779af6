"""Brings the colours of one picture to those of another by a linear map."""

from dataclasses import dataclass

import torch
from torch import Tensor

_FLAT = 1e-4  # a deviation below this, of a range of 2, is none


@dataclass(frozen=True, slots=True)
class ColourMap:
    """Maps colours c to matrix (3, 3) @ c + offset (3,); fp64."""

    matrix: Tensor
    offset: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map pixels (..., 3, H, W) in [-1, 1]; they are clamped to it again, in their dtype."""
        matrix, offset = (item.to(pixels) for item in (self.matrix, self.offset))
        mapped = torch.einsum("ij,...jhw->...ihw", matrix, pixels) + offset[:, None, None]
        return mapped.clamp(-1, 1)


def match_moments(source: Tensor, reference: Tensor) -> ColourMap:
    """Return the map that gives each channel of a source the mean and deviation of a reference.

    source, reference: (F, 3, H, W), of any sizes.  A channel without deviation is only moved.
    Source: Reinhard et al., Color Transfer between Images (2001), without its colour space.
    """
    mean, spread = _moments(source)
    wanted, wanted_spread = _moments(reference)
    deviation, target = spread.diagonal().sqrt(), wanted_spread.diagonal().sqrt()
    scale = torch.where(deviation > _FLAT, target / deviation.clamp(min=_FLAT), 1.0)
    return ColourMap(scale.diag(), wanted - scale * mean)


def match_covariance(source: Tensor, reference: Tensor) -> ColourMap:
    """Return the linear map of least change that gives a source a reference's mean and covariance.

    source, reference: as for `match_moments`.
    Source: Pitie and Kokaram, The linear Monge-Kantorovitch linear colour mapping (2007).
    """
    mean, spread = _moments(source)
    wanted, target = _moments(reference)
    regular = spread + torch.eye(3, dtype=torch.float64) * _FLAT**2  # grey clips have no colour
    root = _power(regular, 0.5)
    inverse = _power(regular, -0.5)
    matrix = inverse @ _power(root @ target @ root, 0.5) @ inverse
    return ColourMap(matrix, wanted - matrix @ mean)


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (3,) and covariance (3, 3) over all pixels, fp64."""
    colours = pixels.movedim(-3, 0).flatten(1).double()
    return colours.mean(1), torch.cov(colours, correction=0)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    powers: Tensor = values.clamp(min=1e-18).pow(exponent)
    result: Tensor = vectors * powers @ vectors.T
    return result
