"""Decodes with a window that `choose_window` chose: rolling along time, and in tiles if it must.

Two designs are exact in time. All tiles could advance together, group by group; but then the
frames kept by their layers, 850 of 1000 bytes a pixel, are those of the whole picture again, and
would have to cross the bus twice per group. So tiles are decoded one after the other over the whole
clip, each as cheaply as a small clip, and the finished frames of all but the last one wait on the
host; while the last one rolls, complete frames come out as they do without tiles. What waits is
6 bytes a pixel and frame in fp16: for 3840x2176x121 in two tiles 3.2 GB, in RAM or in a file.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from ltxlite.errors import BudgetError
from ltxlite.models.rolling import decode_frames
from ltxlite.models.tiling import (
    Placed,
    Span,
    Tiling,
    add_tile,
    place,
    space_tiles,
    tiled_decode,
)
from ltxlite.models.video_vae import VideoDecoder
from ltxlite.models.window import DecodeWindow

PARKED = torch.float16


def decode_window(
    decoder: VideoDecoder, latent: Tensor, window: DecodeWindow, folder: Path | None = None
) -> Iterator[Tensor]:
    """Decode a clip as a window says.

    latent: normalised, (B, C, F', Y, X).  folder: where finished tiles wait in files that vanish by
    themselves, `window.host_bytes` in all; None keeps them in RAM.
    Yields (B, 3, f, 32 Y, 32 X), unclamped, in order: without tiles what `decode_frames` yields,
    with tiles fp32 on the CPU.
    Raises ShapeError for another layout, BudgetError if the folder cannot take the tiles.
    """
    decoder.check(latent)
    if window.is_whole:
        return decode_frames(decoder, latent, window.group_bytes)
    if window.is_classical:
        return tiled_decode(decoder, latent, _tiling(decoder, window), window.group_bytes)
    return _decode_tiles(decoder, latent, window, folder)


@torch.no_grad()
def _decode_tiles(
    decoder: VideoDecoder, latent: Tensor, window: DecodeWindow, folder: Path | None
) -> Iterator[Tensor]:
    space = decoder.config.grid.space
    rows = place(space_tiles(latent.shape[3], window.rows), 1, space, in_time=False)
    columns = place(space_tiles(latent.shape[4], window.columns), 1, space, in_time=False)
    final, *early = product(rows, columns)  # the first tile is the largest, so it need not wait
    sides = [space * length for length in latent.shape[3:]]
    with ExitStack() as files:
        parked = [
            _park(files.enter_context(_open(folder)), _roll(decoder, latent, tile, window))
            for tile in early
        ]
        for part in _roll(decoder, latent, final, window):
            picture = part.new_zeros(*part.shape[:3], *sides)
            add_tile(picture, part, *final)
            for tile, frames in zip(early, parked, strict=True):
                add_tile(picture, frames.read(part.shape[2]), *tile)
            del part
            yield picture


def _tiling(decoder: VideoDecoder, window: DecodeWindow) -> Tiling:
    """Return the spans of a window in frames and pixels."""
    grid = decoder.config.grid
    spans = ((window.frames, grid.time), (window.rows, grid.space), (window.columns, grid.space))
    return Tiling(*(Span(span.size * unit, span.overlap * unit) for span, unit in spans))


Place = tuple[Placed, Placed]  # rows, columns


def _roll(
    decoder: VideoDecoder, latent: Tensor, tile: Place, window: DecodeWindow
) -> Iterator[Tensor]:
    """Yield the frames of a tile, fp32 on the CPU."""
    source = latent[..., tile[0].source, tile[1].source]
    return (part.float().cpu() for part in decode_frames(decoder, source, window.group_bytes))


class _Parked:
    """Frames that were written to a file one after the other and are read back in that order."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.shape: tuple[int, ...] = ()  # (C, B, Y, X) of a frame

    def write(self, part: Tensor) -> None:
        frames = part.transpose(0, 2).to(PARKED).contiguous()  # time outermost
        self.shape = tuple(frames.shape[1:])
        try:
            self.file.write(frames.numpy().data)
            self.file.flush()
        except OSError as error:
            raise BudgetError(
                f"decode: finished tiles do not fit the temporary folder ({error}); free disk "
                "space, or choose a larger --vram or a smaller picture"
            ) from error

    def read(self, count: int) -> Tensor:
        frames = torch.empty(count, *self.shape, dtype=PARKED)
        data = self.file.read(frames.nbytes)
        frames.view(-1).copy_(torch.frombuffer(bytearray(data), dtype=PARKED))
        return frames.transpose(0, 2).float()


def _park(file: BinaryIO, parts: Iterator[Tensor]) -> _Parked:
    parked = _Parked(file)
    for part in parts:
        parked.write(part)
    file.seek(0)
    return parked


def _open(folder: Path | None) -> BinaryIO:
    if folder is None:
        return BytesIO()
    return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))
