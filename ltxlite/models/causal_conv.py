"""The 3x3x3 convolution of the video VAE, over the pieces in which a clip passes through it.

Frames come first, (B, F, C, Y, X). What a convolution sees is written once, straight into the
memory it reads: activated on the way where it has to be, with the frame's margin where that is
reflected. Nothing else is copied, padded or concatenated.

Where kernels run (`norm_silu.fuses`), the channels of a place lie side by side in all that a
convolution reads and makes, as cuDNN's tensor-core kernels for bf16 have them: it need not turn
(C, Y, X) into (Y, X, C) before and back after. Elsewhere columns do, and if that is on CUDA what
is read and what is written, 4 frames of the level at hand, may be there once more as work space,
64 bytes a pixel at the finest: no account of tensors sees it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.errors import ShapeError
from ltxlite.models.video_vae_config import Padding
from ltxlite_kernels import norm_silu

NORM_EPSILON = 1e-8  # the audio VAE has 1e-6
# Frames convolved at once are copied beside their neighbours, three for each. Only small ones gain
# from company: at 768x512 one frame of the finest level, 21 GFLOP, fills a GPU already.
WINDOW_BYTES = 32 << 20
MOST_FRAMES = 64
TURNED_BYTES = 4 << 20  # of a weight at a time; the largest has 226 MB


def root_mean_square(x: Tensor) -> Tensor:
    """Measure the channels at each place: (B, F, C, Y, X) to (B, F, 1, Y, X)."""
    return torch.sqrt((x**2).mean(dim=2, keepdim=True) + NORM_EPSILON)


def activate(x: Tensor) -> Tensor:
    """Scale the channels at each place to a root mean square of one, then apply SiLU."""
    return F.silu(x / root_mean_square(x), inplace=True)


def activate_(x: Tensor) -> Tensor:
    """Do what `activate` does in the memory of `x`."""
    return F.silu(x.div_(root_mean_square(x)), inplace=True)


def channels_inside(x: Tensor) -> bool:
    """Tell whether the channels of a place lie side by side in frames (B, F, C, Y, X)."""
    return x.stride(2) == 1 and x.stride(4) != 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive frames (B, F, C, Y, X) of a clip, on their way into a convolution.

    active: whether the convolution is to see them activated.  root: (B, F, 1, Y, X), what
    `root_mean_square` then measured; None where a kernel measures it while it activates. A root
    has 1/128 of a frame's size, so frames that are seen again are kept raw, for the skip
    connection, and their roots with them.
    """

    frames: Tensor
    active: bool = False
    root: Tensor | None = None

    @classmethod
    def activated(cls, frames: Tensor) -> Self:
        """Return frames that a convolution will see activated."""
        return cls(frames, True, None if norm_silu.fuses(frames) else root_mean_square(frames))

    @classmethod
    def owned(cls, frames: Tensor) -> Self:
        """Return frames that a convolution will see activated, and that nobody needs raw.

        They are activated in their memory, unless a kernel does that as it writes them elsewhere.
        """
        return cls(frames, True) if norm_silu.fuses(frames) else cls(activate_(frames))

    def __len__(self) -> int:
        return self.frames.shape[1]

    def part(self, start: int, stop: int) -> "Piece":
        """Return frames [start, stop), sharing memory."""
        root = None if self.root is None else self.root[:, start:stop]
        return Piece(self.frames[:, start:stop], self.active, root)

    def compact(self) -> "Piece":
        """Return the same frames, which at most one other frame shares memory with.

        Pairs are left together: where an upsampler makes two frames, both are kept anyway.
        """
        frames, root = self.frames, self.root
        if frames.untyped_storage().nbytes() * len(self) <= 2 * frames.nbytes:
            return self
        return Piece(frames.clone(), self.active, None if root is None else root.clone())

    def write(self, target: Tensor) -> None:
        """Write what a convolution is to see into memory of the same shape."""
        if not self.active:
            target.copy_(self.frames)
            return
        root = root_mean_square(self.frames) if self.root is None else self.root
        F.silu(torch.div(self.frames, root, out=target), inplace=True)


def joined(pieces: Iterable[Piece]) -> Tensor:
    """Return the frames of pieces side by side, a copy only if there are several."""
    frames = [piece.frames for piece in pieces]
    if len(frames) == 1:
        return frames[0]
    if channels_inside(frames[0]):
        return torch.cat([x.movedim(2, -1) for x in frames], dim=1).movedim(-1, 2)
    return torch.cat(frames, dim=1)


def length(pieces: Sequence[Piece]) -> int:
    """Count the frames of pieces."""
    return sum(map(len, pieces))


def gather(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[Piece]:
    """Yield frames [start, stop) of consecutive pieces."""
    for piece in pieces:
        first, last = max(start, 0), min(stop, len(piece))
        if first < last:
            yield piece.part(first, last)
        start, stop = start - len(piece), stop - len(piece)


class CausalConv3d(nn.Module):
    """Convolve 3x3x3; frames beyond the clip repeat its first and last, or its first only.

    Computed as a 2-D convolution over the channels of three frames: on a CPU conv3d is up to 10x
    slower for few channels or frames, and cuDNN's needs up to 3x the memory (torch 2.9, bf16).
    """

    def __init__(self, inputs: int, outputs: int, causal: bool, padding: Padding) -> None:
        super().__init__()
        self.before, self.after = (2, 0) if causal else (1, 1)
        self.margin = 1 if padding == "reflect" else 0
        self.conv = nn.Conv3d(inputs, outputs, 3)

    def frame_bytes(self, frames: Tensor) -> int:
        """Return the bytes of a frame of the batch before or after it, whichever is larger."""
        weight = self.conv.weight
        batch, _, _, rows, columns = frames.shape
        return batch * max(weight.shape[:2]) * rows * columns * weight.element_size()

    def forward(self, x: Tensor, prepare: Callable[[Tensor], Piece] = Piece) -> Tensor:
        """Convolve a whole clip (B, F, C, Y, X), prepared; return (B, F, N, Y, X)."""
        clip = prepare(x)
        first, last = clip.part(0, 1), clip.part(len(clip) - 1, len(clip))
        return self.convolve([first] * self.before + [clip] + [last] * self.after)

    def convolve(self, pieces: list[Piece], most: int = MOST_FRAMES) -> Tensor:
        """Convolve F + 2 frames, their neighbours among them, to (B, F, N, Y, X).

        most: frames to convolve at once.
        The list is emptied: a frame that nothing else keeps is gone before the result is made.
        """
        count = length(pieces) - 2
        step = min(most, max(1, WINDOW_BYTES // (4 * self.frame_bytes(pieces[0].frames))))
        if count <= step:
            return self._window(pieces)
        out = self._window(list(gather(pieces, 0, step + 2)))
        whole = _empty(out, count)
        whole[:, :step] = out
        for start in range(step, count, step):
            del out  # before the next is made
            stop = min(start + step, count)
            out = self._window(list(gather(pieces, start, stop + 2)))
            whole[:, start:stop] = out
        pieces.clear()
        return whole

    def _window(self, pieces: list[Piece]) -> Tensor:
        batch = pieces[0].frames.shape[0]
        if all(norm_silu.fuses(piece.frames) for piece in pieces):
            planes, weight = self._channels_inside(pieces), _turned(self.conv.weight)
        else:
            planes, weight = self._planes(pieces), self.conv.weight.flatten(1, 2)
        pieces.clear()  # before the result is made
        planes = F.conv2d(planes, weight, self.conv.bias, padding=1 - self.margin)
        return planes.view(batch, -1, *planes.shape[1:])

    def _channels_inside(self, pieces: Sequence[Piece]) -> Tensor:
        """Write out the three frames that each result sees: (B F, 3 C, Y, X), channels inside."""
        (batch, _, channels, rows, columns), margin = pieces[0].frames.shape, self.margin
        sides, count = (rows + 2 * margin, columns + 2 * margin), length(pieces) - 2
        room = pieces[0].frames.new_empty(batch, count, *sides, 3, channels)
        windows = room.permute(0, 1, 4, 5, 2, 3)  # (B, F, 3, C, Y, X)
        inner = windows[..., margin : margin + rows, margin : margin + columns]
        first = 0
        for piece in pieces:
            norm_silu.spread(piece.frames, inner, first, NORM_EPSILON if piece.active else None)
            first += len(piece)
        if margin:
            _reflect(windows)
        return room.view(batch * count, *sides, 3 * channels).permute(0, 3, 1, 2)

    def _planes(self, pieces: list[Piece]) -> Tensor:
        """Write out the three frames that each result sees: (B F, C 3, Y, X)."""
        room = self._see(pieces)
        pieces.clear()
        # Triples of frames beside their channels, (B, F, C, 3, Y, X): a view if it is one triple,
        # and the weight's own order.
        triples = room.unfold(2, 3, 1).permute(0, 2, 1, 5, 3, 4)
        return triples.reshape(-1, 3 * room.shape[1], *room.shape[3:])

    def _see(self, pieces: Sequence[Piece]) -> Tensor:
        """Write out what the convolution sees: (B, C, F, Y, X), with a margin where it reflects."""
        (batch, _, channels, rows, columns), margin = pieces[0].frames.shape, self.margin
        sides = (rows + 2 * margin, columns + 2 * margin)
        room = pieces[0].frames.new_empty(batch, channels, length(pieces), *sides)
        inner = room[..., margin : margin + rows, margin : margin + columns].transpose(1, 2)
        start = 0
        for piece in pieces:
            piece.write(inner[:, start : start + len(piece)])
            start += len(piece)
        if margin:
            _reflect(room)
        return room


def _empty(frames: Tensor, count: int) -> Tensor:
    """Return `count` frames of the same kind, not yet written."""
    batch, _, *sides = frames.shape
    if not channels_inside(frames):
        return frames.new_empty(batch, count, *sides)
    return frames.new_empty(batch, count, *sides[1:], sides[0]).movedim(-1, 2)


def _turned(weight: Tensor) -> Tensor:
    """Return a weight (N, C, 3, 3, 3) as (N, 3 C, 3, 3), channels inside.

    The first call turns it in its own memory, a few rows at a time; its shape and values stay.
    Nothing is allocated on the way: a lack of memory must not leave it half turned.
    """
    outputs, channels = weight.shape[:2]
    strides = (27 * channels, 1, channels, 9 * channels, 3 * channels)
    if weight.stride() != strides:
        memory = weight.data.contiguous().view(outputs, -1)
        step = max(1, TURNED_BYTES // memory[0].nbytes)
        room = memory.new_empty(min(step, outputs), 9, 3, channels)
        for rows in memory.split(step):
            turned = room[: len(rows)]
            turned.copy_(rows.view(-1, channels, 3, 9).transpose(1, 3))
            rows.copy_(turned.flatten(1))
        weight.data = memory.as_strided(weight.shape, strides)
    return weight.transpose(1, 2).flatten(1, 2)


def _reflect(room: Tensor) -> None:
    """Fill the margin of one pixel, on the last two axes, with the pixels next to the edge."""
    rows, columns = room.shape[-2:]
    if min(rows, columns) < 4:
        raise ShapeError(
            f"video VAE: reflect padding got {rows - 2} rows and {columns - 2} "
            "columns of latents or more, wanted at least 2 of each; take a larger picture"
        )
    room[..., 0, :], room[..., -1, :] = room[..., 2, :], room[..., -3, :]
    room[..., 0], room[..., -1] = room[..., 2], room[..., -3]
