"""Decoding as a window says: tiles beside the same tiles decoded at once and blended in fp32."""

import errno
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow_vae import narrow_decoder
from torch import Tensor

from ltxlite.errors import BudgetError, ShapeError
from ltxlite.models import tiled_window
from ltxlite.models.rolling import decode_frames
from ltxlite.models.tiled_window import decode_window
from ltxlite.models.tiling import Span, Tiling, tiled_decode
from ltxlite.models.window import DecodeWindow, choose_window

WINDOWS = [
    DecodeWindow(1, Span(), Span(4, 2)),
    DecodeWindow(50_000, Span(3, 1), Span(3, 1)),
    DecodeWindow(200_000, Span(2, 1), Span()),
]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def official(window: DecodeWindow, latent: Tensor) -> Tensor:
    """Decode the same tiles, whole in time."""
    pixels = [Span(32 * span.size, 32 * span.overlap) for span in (window.rows, window.columns)]
    return torch.cat(list(tiled_decode(narrow_decoder("2.3"), latent, Tiling(Span(), *pixels))), 2)


@pytest.mark.parametrize(
    ("window", "on_disk"), [(WINDOWS[0], True), (WINDOWS[1], True), (WINDOWS[2], False)]
)
def test_tiles_roll_one_after_the_other(
    window: DecodeWindow, on_disk: bool, tmp_path: Path
) -> None:
    latent = noise(2, 8, 2, 4, 5)
    folder = tmp_path if on_disk else None
    parts = list(decode_window(narrow_decoder("2.3"), latent, window, folder))
    assert all(part.dtype == torch.float32 for part in parts)
    assert len(parts) > 1
    wanted = official(window, latent)
    # Tiles wait in fp16, rounded to 2^-11 of what they are; weights add up to one.
    error = (torch.cat(parts, dim=2) - wanted).abs().max() / wanted.abs().max()
    assert 0 < error < 2**-11
    assert not list(tmp_path.iterdir())


def test_on_the_host_waits_what_the_window_says(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[io.BytesIO] = []
    monkeypatch.setattr(tiled_window, "_open", lambda _: files.append(io.BytesIO()) or files[-1])
    decoder = narrow_decoder("2.3").float()
    window = choose_window(decoder.config, (1, 9, 19), 2_500_000, 4)
    assert not window.is_whole
    parts = decode_window(decoder, noise(1, 8, 1, 9, 19).float(), window)
    next(parts)
    assert sum(file.getbuffer().nbytes for file in files) == window.host_bytes > 0


def test_without_tiles_it_is_rolling_alone() -> None:
    decoder, latent = narrow_decoder("2.3"), noise(1, 8, 3, 3, 2)
    got = list(decode_window(decoder, latent, DecodeWindow(50_000)))
    wanted = list(decode_frames(decoder, latent, 50_000))
    assert len(got) == len(wanted)
    assert all(map(torch.equal, got, wanted))


def test_a_decoding_that_is_given_up_leaves_no_file(tmp_path: Path) -> None:
    parts: Any = decode_window(narrow_decoder("2.3"), noise(1, 8, 1, 2, 5), WINDOWS[0], tmp_path)
    next(parts)
    parts.close()
    assert not list(tmp_path.iterdir())


class FullDisk(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiled_window, "_open", lambda folder: FullDisk())
    with pytest.raises(BudgetError, match=r"No space left.*; free disk space"):
        next(decode_window(narrow_decoder("2.3"), noise(1, 8, 1, 2, 5), WINDOWS[0], tmp_path))


def test_wrong_layouts_are_refused_at_once() -> None:
    with pytest.raises(ShapeError, match="VideoDecoder: got a latent"):
        decode_window(narrow_decoder("2.3"), noise(1, 7, 2, 5, 7), WINDOWS[0])
