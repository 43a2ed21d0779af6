"""Tile layouts, ramps and blending, against counted layouts and networks without neighbours."""

from collections.abc import Callable

import pytest
import torch
from narrow_vae import narrow_decoder, narrow_encoder
from torch import Tensor

from ltxlite.errors import RequestError, ShapeError
from ltxlite.geometry import LatentGrid
from ltxlite.models import tiling
from ltxlite.models.tiling import (
    Span,
    Tile,
    Tiling,
    blend_weights,
    place,
    ramp,
    space_tiles,
    tiled_decode,
    tiled_encode,
    time_tiles,
)

# fp32 weights: a product of three sums of at most a few of them, each rounded to 6e-8.
TOLERANCE = 1e-6


class LocalDecoder:
    """Repeats each latent over its pixels: no neighbours, so any correct tiling is exact."""

    class config:  # noqa: N801
        grid = LatentGrid()

    def check(self, latent: Tensor) -> None:
        pass

    def __call__(self, latent: Tensor) -> Tensor:
        frames = torch.cat([latent[:, :, :1], latent[:, :, 1:].repeat_interleave(8, 2)], dim=2)
        return frames.repeat_interleave(32, 3).repeat_interleave(32, 4)


class LocalEncoder(LocalDecoder):
    """Averages the pixels of each latent."""

    latent_mean = torch.zeros(1)

    def __call__(self, pixels: Tensor) -> Tensor:
        squares = pixels.unflatten(4, (-1, 32)).unflatten(3, (-1, 32)).mean(dim=(4, 6))
        later = squares[:, :, 1:].unflatten(2, (-1, 8)).mean(dim=3)
        return torch.cat([squares[:, :, :1], later], dim=2)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiles be computed at once, as networks without layers want it."""
    monkeypatch.setattr(tiling, "decode_frames", lambda network, x, _: iter([network(x)]))
    monkeypatch.setattr(
        tiling, "encode_frames", lambda network, parts: network(torch.cat(list(parts), dim=2))
    )


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def test_121_frames_in_tiles_of_80_are_two_stretches_of_73_frames() -> None:
    tiles = time_tiles(16, Span(10, 3))
    assert tiles == [Tile(0, 10, 0, 3), Tile(6, 16, 3, 0, sacrificed=True)]
    placed = place(tiles, 1, 8, in_time=True)
    assert [item.target for item in placed] == [slice(0, 73), slice(48, 121)]


@pytest.mark.parametrize(
    ("length", "span", "edges"),
    [
        (7, Span(), [(0, 7)]),
        (7, Span(7, 3), [(0, 7)]),
        (7, Span(4, 1), [(0, 4), (3, 7)]),
        (8, Span(4, 1), [(0, 4), (3, 7), (6, 8)]),  # the last one is short
        (5, Span(3, 2), [(0, 3), (1, 4), (2, 5)]),
        (5, Span(2, 0), [(0, 2), (2, 4), (4, 5)]),
    ],
)
def test_tiles_cover_an_axis(length: int, span: Span, edges: list[tuple[int, int]]) -> None:
    assert [(tile.start, tile.stop) for tile in space_tiles(length, span)] == edges


def test_ramps_climb_between_zero_and_one_without_reaching_them() -> None:
    assert ramp(4).tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ramp(0).tolist() == []


def test_a_tile_in_time_starts_with_a_frame_of_weight_zero() -> None:
    weights = blend_weights(Tile(6, 16, 3, 0, sacrificed=True), 73, 8)
    assert weights[:3].tolist() == pytest.approx([0, 1 / 25, 2 / 25])
    assert weights[24:].tolist() == pytest.approx([24 / 25] + [1] * 48)
    falling = blend_weights(Tile(0, 10, 0, 3), 73, 8)
    assert falling[48:].tolist() == pytest.approx([1] + [(25 - k) / 25 for k in range(1, 25)])


def test_ramps_that_meet_in_one_tile_multiply() -> None:
    weights = blend_weights(Tile(1, 4, 2, 2), 3, 1)
    assert weights.tolist() == pytest.approx([1 / 3, 2 / 3 * 2 / 3, 1 / 3])


@pytest.mark.parametrize("unit", [1, 8, 32])
@pytest.mark.parametrize("in_time", [False, True])
def test_weights_sum_to_one_everywhere(unit: int, in_time: bool) -> None:
    cut = time_tiles if in_time else space_tiles
    for length in range(1, 14):
        for size in range(2, 6):
            for overlap in range(size):
                placed = place(cut(length, Span(size, overlap)), 1, unit, in_time)
                total = torch.zeros(unit * (length - 1) + 1 if in_time else unit * length)
                for item in placed:
                    total[item.target] += item.weights
                torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=TOLERANCE)


def test_usual_trapezoids_need_no_division_and_steep_overlaps_do() -> None:
    def sums(length: int, span: Span) -> Tensor:
        total = torch.zeros(length)
        for tile in time_tiles(length, span):
            total[tile.start : tile.stop] += blend_weights(tile, tile.stop - tile.start, 1)
        return total

    torch.testing.assert_close(sums(9, Span(4, 2)), torch.ones(9), rtol=0, atol=TOLERANCE)
    assert sums(9, Span(3, 2)).max().item() == pytest.approx(10 / 9)  # 1/3 + 2/3 * 2/3 + 1/3


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((1088, 1920), (448, 768)),
        ((704, 1280), (416, 768)),
        ((1280, 704), (768, 416)),
        ((512, 768), (512, 768)),  # one tile
        ((64, 4096), (96, 768)),  # not below the overlap and one more
    ],
)
def test_automatic_tiles_keep_the_aspect_of_the_picture(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    tiling = Tiling.auto(*size)
    assert (tiling.height, tiling.width) == (Span(wanted[0], 64), Span(wanted[1], 64))
    assert tiling.frames == Span(80, 24)


TILINGS = [
    Tiling(Span(16, 8), Span(64, 32), Span(64, 0)),
    Tiling(Span(24, 16), Span(), Span(96, 64)),
    Tiling(Span(16, 0), Span(64, 32), Span()),
    Tiling(),
]


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("tiling", TILINGS)
def test_tiled_decoding_is_exact_for_a_network_without_neighbours(tiling: Tiling) -> None:
    decoder, latent = LocalDecoder(), noise(2, 3, 6, 3, 5)
    parts = list(tiled_decode(decoder, latent, tiling))  # type: ignore[arg-type]
    assert all(part.shape[2] for part in parts)
    torch.testing.assert_close(
        torch.cat(parts, dim=2), decoder(latent), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(Span(24, 16), Span(96, 64), Span(128, 64)),
        Tiling(Span(32, 16), Span(), Span(96, 64)),
        Tiling(),
    ],
)
def test_tiled_encoding_is_exact_for_a_network_without_neighbours(tiling: Tiling) -> None:
    encoder, pixels = LocalEncoder(), noise(1, 2, 43, 160, 224)  # two frames too many
    got = tiled_encode(encoder, pixels, tiling)  # type: ignore[arg-type]
    torch.testing.assert_close(got, encoder(pixels[:, :, :41]), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.usefixtures("whole")
def test_stretches_come_out_as_soon_as_no_later_tile_touches_them() -> None:
    tiling = Tiling(Span(80, 24))
    parts = tiled_decode(LocalDecoder(), noise(1, 3, 16, 1, 1), tiling)  # type: ignore[arg-type]
    assert [part.shape[2] for part in parts] == [48, 73]


def test_bf16_networks_are_blended_in_fp32() -> None:
    latent = noise(1, 8, 3, 1, 3).bfloat16()
    decoder = narrow_decoder("2.3").bfloat16()
    part = next(tiled_decode(decoder, latent, Tiling(width=Span(64, 32))))
    assert part.dtype == torch.float32
    encoder = narrow_encoder("2.3").bfloat16()
    got = tiled_encode(encoder, noise(1, 3, 1, 32, 128), Tiling(width=Span(96, 64)))
    assert got.dtype == torch.float32
    # One tile of weight one is the plain result; 64 fp32 ULPs are nothing beside bf16's own 4e-3.
    whole = tiled_encode(encoder, noise(1, 3, 1, 32, 64), Tiling())
    torch.testing.assert_close(whole, encoder(noise(1, 3, 1, 32, 64)).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(frames=Span(8, 0)), "tile frames is 8, wanted 0 or a multiple of 8 from 16 on"),
        (Tiling(height=Span(80, 32)), "tile height is 80, wanted 0 or a multiple of 32 from 64"),
        (Tiling(width=Span(64, 64)), "overlap in width is 64, wanted a multiple of 32 below the"),
        (Tiling(width=Span(64, 8)), "tile overlap in width is 8, wanted a multiple of 32"),
        (Tiling(frames=Span(16, -8)), "tile overlap in frames is -8"),
        (Tiling(frames=Span(0, 8)), "tile frames is 0"),
    ],
)
def test_tilings_off_the_grid_are_refused_at_once(tiling: Tiling, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiled_decode(narrow_decoder("2.3"), noise(1, 8, 3, 2, 2), tiling)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(frames=Span(24, 8)), "overlap in frames is 8, wanted at least 16 to encode"),
        (Tiling(height=Span(96, 32)), "overlap in height is 32, wanted at least 64 to encode"),
    ],
)
def test_overlaps_too_small_to_encode_are_refused(tiling: Tiling, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiled_encode(narrow_encoder("2.3"), noise(1, 3, 1, 64, 64), tiling)


@pytest.mark.parametrize(
    "run",
    [
        lambda: tiled_decode(narrow_decoder("2.3"), noise(1, 7, 3, 2, 2), Tiling()),
        lambda: tiled_encode(narrow_encoder("2.3"), noise(1, 3, 1, 48, 64), Tiling()),
    ],
)
def test_wrong_layouts_are_refused_at_once(run: Callable[[], object]) -> None:
    with pytest.raises(ShapeError, match="wanted"):
        run()
