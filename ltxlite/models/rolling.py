"""Runs the video VAE along time, in memory that does not grow with the clip.

Every layer works place by place or on three neighbouring frames. So each convolution keeps the last
two frames it saw, and the clip passes through in groups of frames: the result is that of one pass
over the whole clip. A decoder convolution waits for the frame after; the end of the clip is told
from layer to layer, and each then repeats its last frame. No tiles, no seams, nothing twice.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ltxlite.errors import ShapeError
from ltxlite.models.causal_conv import CausalConv3d, Piece, gather, length
from ltxlite.models.video_vae import (
    DepthToSpaceUpsample,
    ResnetBlock,
    ResnetRun,
    SpaceToDepthDownsample,
    VideoDecoder,
    VideoEncoder,
    unpatchify,
)

GROUP_BYTES = 32 << 20  # a frame at the finest level of 1920x1088 in bf16, eight of 640x384


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive frames (B, f, C, Y, X), f > 0, and whether they are the clip's last ones."""

    frames: Tensor
    last: bool

    def __len__(self) -> int:
        return self.frames.shape[1]


def decode_frames(
    decoder: VideoDecoder, latent: Tensor, group_bytes: int = GROUP_BYTES
) -> Iterator[Tensor]:
    """Decode a clip a few frames at a time, exactly.

    latent: normalised, (B, C, F', Y, X).  Yields (B, 3, f, 32 Y, 32 X), unclamped, in order;
    side by side they are `decoder(latent)` up to rounding.
    group_bytes: the size that no activation of a group should exceed; one frame is the least.
    Raises ShapeError for another layout.
    """
    decoder.check(latent)
    return _decode(decoder, latent, group_bytes)


@torch.no_grad()
def _decode(decoder: VideoDecoder, latent: Tensor, group_bytes: int) -> Iterator[Tensor]:
    rolling = _Rolling(iter([Group(latent.transpose(1, 2), last=True)]), group_bytes)
    rolling.step(_Convolution(decoder.conv_in, lambda x: Piece(decoder.prepare(x.transpose(1, 2)))))
    for block in decoder.up_blocks:
        rolling.block(block)
    rolling.step(_Convolution(decoder.conv_out, Piece.activated))
    for group in rolling.groups:
        pixels = [unpatchify(group.frames, decoder.config.patch)]
        del group
        yield pixels.pop()  # and none of it is held here while the caller works


@torch.no_grad()
def encode_frames(
    encoder: VideoEncoder, frames: Iterable[Tensor], group_bytes: int = GROUP_BYTES
) -> Tensor:
    """Encode a clip that arrives a few frames at a time, exactly.

    frames: pixels (B, 3, f, H, W) in [-1, 1], on the device of the encoder, f as it comes.
    Returns the normalised latent (B, C, F', H/32, W/32) of all of them, up to rounding
    `encoder(pixels)`; frames after the last 8 n + 1 are left out.
    Raises ShapeError for another layout, or without any frame.
    """
    rolling = _Rolling(_patches(encoder, frames), group_bytes)
    rolling.step(_Convolution(encoder.conv_in))
    for block in encoder.down_blocks:
        rolling.block(block)
    rolling.step(_Convolution(encoder.conv_out, Piece.activated))
    latents = [encoder.finish(group.frames) for group in rolling.groups]
    if not latents:
        raise ShapeError("encode_frames: got no frame, wanted at least one")
    return torch.cat(latents, dim=2)


def _patches(encoder: VideoEncoder, frames: Iterable[Tensor]) -> Iterator[Group]:
    """Patchify what comes, one item behind, to know the last: after it no layer keeps anything.

    The encoder only looks back, so that a last group which fills no pair may stay inside.
    """
    waiting: list[Tensor] = []
    for pixels in frames:
        patches = encoder.prepare(pixels)
        del pixels
        if waiting:
            yield Group(waiting.pop(), last=False)
        waiting.append(patches)
        del patches
    if waiting:
        yield Group(waiting.pop(), last=True)


class _Rolling:
    """Groups of frames on their way through layer after layer, computed as they are asked for.

    Only `map`, `filter` and `chain` stand between layers, and none of them keeps a group that it
    has passed on, so that what lives is the frames in the layers' memories and one layer's work.
    """

    def __init__(self, groups: Iterator[Group], group_bytes: int) -> None:
        self.groups, self.group_bytes = groups, group_bytes

    def step(self, step: "_Step") -> None:
        """Add one layer."""
        cut = partial(_cut, conv=step.conv, group_bytes=self.group_bytes)
        cuts = itertools.chain.from_iterable(map(cut, self.groups))
        self.groups = filter(None, map(step, cuts))

    def block(self, block: nn.Module) -> None:
        """Add a block of the encoder or the decoder."""
        match block:
            case ResnetRun():
                for resnet in block.res_blocks:
                    assert isinstance(resnet, ResnetBlock)
                    self.step(_Resnet(resnet))
            case DepthToSpaceUpsample():
                self.step(_Upsample(block))
            case SpaceToDepthDownsample():
                self.step(_Downsample(block))
            case _:
                raise AssertionError(type(block))


def _cut(group: Group, conv: CausalConv3d, group_bytes: int) -> Iterator[Group]:
    """Cut a group so that each part is within bounds before and after the convolution.

    The clip's last group needs it most: every layer that it passes adds the frame it still owed.
    """
    count = math.ceil(len(group) / max(1, group_bytes // conv.frame_bytes(group.frames)))
    cuts = group.frames.chunk(count, dim=1)
    parts = [Group(part, group.last and part is cuts[-1]) for part in cuts]
    # Popped, not iterated over: a list's iterator keeps every part until the list is exhausted.
    stack: list[Group | None] = [None, *reversed(parts)]
    return iter(stack.pop, None)


class _Memory:
    """The last two frames that a convolution has seen, and what it sees beyond the clip."""

    def __init__(self, conv: CausalConv3d) -> None:
        self.before, self.after = conv.before, conv.after
        self.past: list[Piece] = []

    def extend(self, pieces: Sequence[Piece], last: bool) -> list[Piece]:
        """Return new pieces after the frames kept, with the clip's ends repeated as needed."""
        first, final = pieces[0].part(0, 1), pieces[-1].part(len(pieces[-1]) - 1, len(pieces[-1]))
        past = self.past or [first] * self.before
        pieces = [*past, *pieces, *([final] * self.after if last else [])]
        count = length(pieces)
        kept = () if last else gather(pieces, count - 2, count)
        self.past = [piece.compact() for piece in kept]
        return pieces


class _Step:
    """One layer on its way through the clip; subclasses say what a call does.

    A call takes the next group and returns what is ready: None as long as that is nothing.
    """

    def __init__(self, conv: CausalConv3d) -> None:
        self.conv, self.memory = conv, _Memory(conv)

    def __call__(self, group: Group) -> Group | None:
        raise NotImplementedError


class _Convolution(_Step):
    """Convolves frames as `prepare` makes them visible."""

    def __init__(self, conv: CausalConv3d, prepare: Callable[[Tensor], Piece] = Piece) -> None:
        super().__init__(conv)
        self.prepare = prepare

    def __call__(self, group: Group) -> Group | None:
        pieces = self.memory.extend([self.prepare(group.frames)], group.last)
        if length(pieces) < 3:
            return None
        return Group(self.conv.convolve(pieces, len(group)), group.last)


class _Resnet(_Step):
    """Runs a residual block; the frames kept for its first convolution serve the skip as well."""

    def __init__(self, block: ResnetBlock) -> None:
        super().__init__(block.conv1)
        self.block, self.hidden = block, _Memory(block.conv2)

    def __call__(self, group: Group) -> Group | None:
        # Two frames are activated once more each time; keeping them would need 1.5x the memory.
        pieces = self.memory.extend([Piece.activated(group.frames)], group.last)
        if length(pieces) < 3:
            return None
        # Not under a name of its own: what the second convolution does not keep goes as it is read.
        inner = [Piece.owned(self.block.conv1.convolve(list(pieces), len(group)))]
        inner = self.hidden.extend(inner, group.last)
        if length(inner) < 3:
            return None
        out = self.block.conv2.convolve(inner, len(group))
        # Each convolution lags `after` frames behind, and the clip's end fills one lag up.
        end = length(pieces) - self.memory.after * (1 if group.last else 2)
        start = 0
        for piece in gather(pieces, end - out.shape[1], end):
            out[:, start : start + len(piece)].add_(piece.frames)
            start += len(piece)
        return Group(out, group.last)


class _Upsample(_Step):
    """Upsamples a group, dropping the clip's first frame where time doubles."""

    def __init__(self, block: DepthToSpaceUpsample) -> None:
        super().__init__(block.conv)
        self.block = block
        self.surplus = block.stride[0] - 1

    def __call__(self, group: Group) -> Group | None:
        pieces = self.memory.extend([Piece(group.frames)], group.last)
        if length(pieces) < 3:
            return None
        frames = self.block.unfold(pieces, len(group))[:, self.surplus :]
        self.surplus = 0
        return Group(frames, group.last)


class _Downsample(_Step):
    """Downsamples a group, in pairs of frames where time halves: the clip's first frame twice."""

    def __init__(self, block: SpaceToDepthDownsample) -> None:
        super().__init__(block.conv)
        self.block = block
        self.odd: list[Piece] | None = None if block.stride[0] == 2 else []

    def __call__(self, group: Group) -> Group | None:
        pieces = [Piece(group.frames)]
        if self.block.stride[0] == 2:
            pieces = self._pairs(pieces[0])
        if not pieces:
            return None
        pieces = self.memory.extend(pieces, group.last)
        return Group(self.block.fold(pieces, len(group)), group.last)

    def _pairs(self, piece: Piece) -> list[Piece]:
        pieces = [*([piece.part(0, 1)] if self.odd is None else self.odd), piece]
        count = length(pieces)
        even = count // 2 * 2
        self.odd = [rest.compact() for rest in gather(pieces, even, count)]
        return list(gather(pieces, 0, even))
