"""Pixel values to code values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ltxlite.media.colour import nearest_uint8_rgb, rgb_to_i420, to_uint8_rgb

GOLDEN = Path(__file__).parent / "golden" / "golden" / "pipeline_two_stage_t2v.safetensors"


def test_uint8_frames_equal_the_reference_pipeline_exactly() -> None:
    with safe_open(GOLDEN, "pt") as file:
        pixels, expected = file.get_tensor("pixels_frames"), file.get_tensor("uint8_frames")
    assert torch.equal(to_uint8_rgb(pixels[0].movedim(1, 0)), expected)


def test_every_8_bit_value_survives_the_network_range() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    pixels = (values.float() / 127.5 - 1).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(nearest_uint8_rgb(pixels)[0, ..., 1].flatten(), values)
    assert nearest_uint8_rgb(torch.full((1, 3, 1, 1), -7.0)).sum() == 0


def planes_of(packed: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    luma, blue, red = packed.flatten().split(
        [height * width, height * width // 4, height * width // 4]
    )
    half = (height // 2, width // 2)
    return luma.view(height, width), blue.view(half), red.view(half)


@pytest.mark.parametrize(
    ("rgb", "codes"),
    [  # published 8-bit limited-range BT.709 values of the full colour bars
        ((0, 0, 0), (16, 128, 128)),
        ((1, 1, 1), (235, 128, 128)),
        ((1, 0, 0), (63, 102, 240)),
        ((0, 1, 0), (173, 42, 26)),
        ((0, 0, 1), (32, 240, 118)),
        ((1, 1, 0), (219, 16, 138)),
    ],
)
def test_colour_bars_get_their_published_bt709_codes(
    rgb: tuple[float, ...], codes: tuple[int, ...]
) -> None:
    frame = torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 2, 6)
    planes = planes_of(rgb_to_i420(frame)[0], 2, 6)
    assert tuple(int(plane[0, -1]) for plane in planes) == codes
    assert all(plane.unique().numel() == 1 for plane in planes)


def test_planes_are_the_nearest_codes_of_luma_and_of_2x2_averaged_colour_difference() -> None:
    height, width = 6, 10
    frame = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    red, green, blue = frame[0].double().numpy()
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = [219 * luma + 16]
    for colour, span in ((blue, 1.8556), (red, 1.5748)):
        difference = ((colour - luma) / span).reshape(height // 2, 2, width // 2, 2)
        expected.append(224 * difference.mean(axis=(1, 3)) + 128)
    for plane, exact in zip(planes_of(rgb_to_i420(frame)[0], height, width), expected, strict=True):
        # Half a code from rounding, plus 1e-4 for fp32 on values up to 240.
        assert np.abs(plane.numpy() - exact).max() <= 0.5001
