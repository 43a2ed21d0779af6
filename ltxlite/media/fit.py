"""Pictures of any size on a model's grid, and back: nothing is lost, nothing is stretched."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Fit:
    """How pictures of one size lie inside another one, at the top left, mirrored on to its edges.

    height, width: of the pictures.  rows, columns: what they are scaled to, never larger.
    grid_height, grid_width: of the model's frames.
    Source: LTX-2 400fd31, the padding of the HDR pipeline (vae-audio-media.md 6).
    """

    height: int
    width: int
    rows: int
    columns: int
    grid_height: int
    grid_width: int

    @classmethod
    def inside(cls, size: tuple[int, int], grid_size: tuple[int, int]) -> "Fit":
        """Fit pictures of a size into frames of the model's size, both (height, width)."""
        (height, width), (grid_height, grid_width) = size, grid_size
        scale = min(grid_height / height, grid_width / width, 1.0)
        rows = min(max(round(height * scale), 1), grid_height)
        columns = min(max(round(width * scale), 1), grid_width)
        return cls(height, width, rows, columns, grid_height, grid_width)

    def forth(self, frame: Tensor) -> Tensor:
        """Bring a picture (H, W, 3) uint8 to the model: (3, grid height, grid width) in [-1, 1]."""
        pixels = frame.movedim(-1, 0)[None].float() / 127.5 - 1
        scaled = _scaled(pixels, self.rows, self.columns)
        return _padded(scaled, self.grid_height - self.rows, self.grid_width - self.columns)[0]

    def back(self, frames: Tensor) -> Tensor:
        """Bring the model's frames (F, 3, H, W) back to the pictures' size."""
        return _scaled(frames[..., : self.rows, : self.columns], self.height, self.width)


def _scaled(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """Scale (F, 3, H, W), antialiased where it shrinks; the same values where it does neither."""
    if tuple(pixels.shape[-2:]) == (rows, columns):
        return pixels
    return F.interpolate(
        pixels.float(), (rows, columns), mode="bicubic", align_corners=False, antialias=True
    ).clamp(-1, 1)


def _padded(pixels: Tensor, below: int, right: int) -> Tensor:
    """Mirror the picture at its lower and right edge; repeat the edge where it is too small."""
    rows, columns = pixels.shape[-2:]
    mode = "reflect" if below < rows and right < columns else "replicate"
    if not below and not right:
        return pixels
    return F.pad(pixels, (0, right, 0, below), mode=mode)


def as_pixels(frame: Tensor) -> Tensor:
    """Return a picture (H, W, 3) uint8 as a writer takes it: (1, 3, H, W) in [-1, 1].

    Written as 8 bits it gives the same values again: x / 127.5 - 1 is good to 1e-7.
    """
    return (frame.movedim(-1, 0)[None].to(torch.float32)) / 127.5 - 1
