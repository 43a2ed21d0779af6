"""The 3x3x3 convolution of the video VAE, over the pieces in which a clip passes through it.

Frames come first, (B, F, C, Y, X). What a convolution sees is written once, straight into the
memory it reads: activated on the way where it has to be, with the frame's margin where that is
reflected. Nothing else is copied, padded or concatenated.

On CUDA, cuDNN's work space comes on top, which no account of tensors sees: its kernels for bf16
turn (C, Y, X) into (Y, X, C) before and back after, so at most what is read and what is written
once more: 4 frames of the level at hand, 64 bytes a pixel at the finest.
"""

from collections.abc import Iterable, Iterator, Sequence
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


def root_mean_square(x: Tensor) -> Tensor:
    """Measure the channels at each place: (B, F, C, Y, X) to (B, F, 1, Y, X)."""
    return torch.sqrt((x**2).mean(dim=2, keepdim=True) + NORM_EPSILON)


def activate(x: Tensor) -> Tensor:
    """Scale the channels at each place to a root mean square of one, then apply SiLU."""
    return F.silu(x / root_mean_square(x), inplace=True)


def activate_(x: Tensor) -> Tensor:
    """Do what `activate` does in the memory of `x`."""
    if norm_silu.fuses(x):
        return norm_silu.norm_silu(x, NORM_EPSILON, out=x)
    return F.silu(x.div_(root_mean_square(x)), inplace=True)


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
        elif self.root is None:
            norm_silu.norm_silu(self.frames, NORM_EPSILON, out=target)
        else:
            F.silu(torch.div(self.frames, self.root, out=target), inplace=True)


def joined(pieces: Iterable[Piece]) -> Tensor:
    """Return the frames of pieces side by side, a copy only if there are several."""
    frames = [piece.frames for piece in pieces]
    return torch.cat(frames, dim=1) if len(frames) > 1 else frames[0]


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

    def forward(self, x: Tensor, active: bool = False) -> Tensor:
        """Convolve a whole clip (B, F, C, Y, X), activated or not; return (B, F, N, Y, X)."""
        clip = Piece.activated(x) if active else Piece(x)
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
        whole = out.new_empty(out.shape[0], count, *out.shape[2:])
        whole[:, :step] = out
        for start in range(step, count, step):
            del out  # before the next is made
            stop = min(start + step, count)
            out = self._window(list(gather(pieces, start, stop + 2)))
            whole[:, start:stop] = out
        pieces.clear()
        return whole

    def _window(self, pieces: list[Piece]) -> Tensor:
        room = self._see(pieces)
        pieces.clear()
        # Triples of frames beside their channels, (B, F, C, 3, Y, X): a view if it is one triple,
        # and the weight's own order.
        triples = room.unfold(2, 3, 1).permute(0, 2, 1, 5, 3, 4)
        planes = triples.reshape(-1, 3 * room.shape[1], *room.shape[3:])
        batch = room.shape[0]
        del room, triples  # before the result is made, if `planes` is a copy
        weight = self.conv.weight.flatten(1, 2)  # (N, 3 C, 3, 3), a view as well
        planes = F.conv2d(planes, weight, self.conv.bias, padding=1 - self.margin)
        return planes.view(batch, -1, *planes.shape[1:])

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


def _reflect(room: Tensor) -> None:
    """Fill the margin of one pixel with the pixels next to the edge."""
    if min(room.shape[3:]) < 4:
        raise ShapeError(
            f"video VAE: reflect padding got {room.shape[3] - 2} rows and {room.shape[4] - 2} "
            "columns of latents or more, wanted at least 2 of each; take a larger picture"
        )
    room[..., 0, :], room[..., -1, :] = room[..., 2, :], room[..., -3, :]
    room[..., 0], room[..., -1] = room[..., 2], room[..., -3]
