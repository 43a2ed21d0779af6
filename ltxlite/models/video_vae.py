"""The video VAE of LTX-2.0, 2.3 and 2.5: pixels to normalised latents and back.

Both halves are stacks of 3x3x3 convolutions; blocks between them trade channels for resolution. One
latent frame stands for 8 pixel frames, the first one for a single frame: F = 8 F' - 7. The encoder
looks only back in time, the decoder both ways. `rolling` and `tiling` decode in bounded memory.
Latents and pixels are (B, C, F, Y, X) as everywhere; inside, frames come first: (B, F, C, Y, X).
"""

import math

import torch
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models.causal_conv import (
    MOST_FRAMES,
    CausalConv3d,
    Piece,
    channels_inside,
    gather,
    joined,
    length,
)
from ltxlite.models.video_vae_config import COLOURS, Block, Padding, Stride, VideoVAEConfig


def normalise(latent: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scale a latent (B, C, F, Y, X) to what the transformer works on.

    mean, std: (C,), `latent_mean` and `latent_std` of either network, any dtype.
    """
    mean, std = (x.to(latent).view(1, -1, 1, 1, 1) for x in (mean, std))
    return (latent - mean) / std


def unnormalise(latent: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo `normalise`: the latent (B, C, F, Y, X) that the decoder and the upscalers work on."""
    mean, std = (x.to(latent).view(1, -1, 1, 1, 1) for x in (mean, std))
    return latent * std + mean


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """Fold squares of pixels into channels: (B, C, F, H, W) to (B, F, C*p*p, H/p, W/p).

    Unlike in `pixel_unshuffle` the column within the square is the slower index.
    """
    (b, c, f, h, w), p = pixels.shape, patch
    squares = pixels.reshape(b, c, f, h // p, p, w // p, p)
    return squares.permute(0, 2, 1, 6, 4, 3, 5).reshape(b, f, c * p * p, h // p, w // p)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """Undo `patchify`: (B, F, C*p*p, Y, X) to (B, C, F, Y*p, X*p)."""
    (b, f, _, rows, columns), p = x.shape, patch
    squares = x.reshape(b, f, -1, p, p, rows, columns)
    return squares.permute(0, 2, 1, 5, 4, 6, 3).reshape(b, -1, f, rows * p, columns * p)


def space_to_depth(x: Tensor, stride: Stride) -> Tensor:
    """Fold boxes of stride (t, h, w) into channels, column fastest.

    (B, F, C, Y, X) to (B, F/t, C*t*h*w, Y/h, X/w).
    """
    (b, f, c, rows, columns), (t, h, w) = x.shape, stride
    boxes = x.reshape(b, f // t, t, c, rows // h, h, columns // w, w)
    if channels_inside(x):
        boxes = boxes.permute(0, 1, 4, 6, 3, 2, 5, 7)
        return boxes.reshape(b, f // t, rows // h, columns // w, -1).movedim(-1, 2)
    return boxes.permute(0, 1, 3, 2, 5, 7, 4, 6).reshape(b, f // t, -1, rows // h, columns // w)


def depth_to_space(x: Tensor, stride: Stride) -> Tensor:
    """Undo `space_to_depth`: (B, F, C*t*h*w, Y, X) to (B, F*t, C, Y*h, X*w)."""
    (b, f, _, rows, columns), (t, h, w) = x.shape, stride
    boxes = x.reshape(b, f, -1, t, h, w, rows, columns)
    if channels_inside(x):
        boxes = boxes.permute(0, 1, 3, 6, 4, 7, 5, 2)
        # Without `contiguous` a single frame, doubled in time only, is a view, channels two apart.
        return boxes.reshape(b, f * t, rows * h, columns * w, -1).contiguous().movedim(-1, 2)
    return boxes.permute(0, 1, 3, 2, 6, 4, 7, 5).reshape(b, f * t, -1, rows * h, columns * w)


class ResnetBlock(nn.Module):
    """Add two normalised, activated convolutions to the input."""

    def __init__(self, width: int, causal: bool, padding: Padding) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(width, width, causal, padding)
        self.conv2 = CausalConv3d(width, width, causal, padding)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv1(x, Piece.activated)
        hidden = self.conv2(hidden, Piece.owned)
        return hidden.add_(x)


class ResnetRun(nn.Module):
    """Apply residual blocks of one width and resolution in turn."""

    def __init__(self, block: Block, width: int, causal: bool, padding: Padding) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(
            ResnetBlock(width, causal, padding) for _ in range(block.layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x)
        return x


class SpaceToDepthDownsample(nn.Module):
    """Fold places into channels after a convolution, beside the same fold averaged over channels.

    Halving time turns 2 n + 1 frames into n + 1: the first frame is doubled to make pairs.
    """

    def __init__(self, block: Block, width: int, padding: Padding) -> None:
        super().__init__()
        self.stride = block.stride
        self.outputs = width * block.multiplier
        inner = _divide(self.outputs, math.prod(block.stride), "encoder_blocks")
        self.group = _divide(width * math.prod(block.stride), self.outputs, "encoder_blocks")
        self.conv = CausalConv3d(width, inner, causal=True, padding=padding)

    def fold(self, pieces: list[Piece], most: int = MOST_FRAMES) -> Tensor:
        """Downsample frames after two earlier ones: F + 2 frames to F over the time stride."""
        skip = space_to_depth(joined(gather(pieces, 2, length(pieces))), self.stride)
        skip = _grouped_mean(skip, self.group)
        return space_to_depth(self.conv.convolve(pieces, most), self.stride).add_(skip)

    def forward(self, x: Tensor) -> Tensor:
        clip = Piece(x)
        doubled = self.stride[0] - 1
        return self.fold([clip.part(0, 1)] * (self.conv.before + doubled) + [clip])


class DepthToSpaceUpsample(nn.Module):
    """Unfold channels of a convolution into places; LTX-2.0 adds the input, unfolded as well.

    Doubling time turns n + 1 frames into 2 n + 1: the very first frame produced is dropped.
    """

    def __init__(self, block: Block, width: int, padding: Padding) -> None:
        super().__init__()
        self.stride = block.stride
        places = math.prod(block.stride)
        outputs = _divide(width * places, block.multiplier, "decoder_blocks")
        self.repeats = 0
        if block.residual:
            _divide(width, places, "decoder_blocks")
            self.repeats = _divide(places, block.multiplier, "decoder_blocks")
        self.conv = CausalConv3d(width, outputs, causal=False, padding=padding)

    def unfold(self, pieces: list[Piece], most: int = MOST_FRAMES) -> Tensor:
        """Upsample frames whose neighbours are given: F + 2 frames to F times the time stride."""
        own = list(gather(pieces, 1, length(pieces) - 1)) if self.repeats else []
        out = depth_to_space(self.conv.convolve(pieces, most), self.stride)
        if own:
            skip = depth_to_space(joined(own), self.stride)
            out.unflatten(2, (self.repeats, -1)).add_(skip.unsqueeze(2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        clip = Piece(x)
        first, last = clip.part(0, 1), clip.part(len(clip) - 1, len(clip))
        out = self.unfold([first, clip, last])
        return out[:, self.stride[0] - 1 :]


def _grouped_mean(x: Tensor, group: int) -> Tensor:
    """Average consecutive channels of frames (B, F, C, Y, X), channels staying where they lie."""
    if channels_inside(x):
        inner: Tensor = x.movedim(2, -1).unflatten(-1, (-1, group))
        return inner.mean(dim=-1).movedim(-1, 2)
    groups: Tensor = x.unflatten(2, (-1, group))
    return groups.mean(dim=3)


def _divide(value: int, by: int, where: str) -> int:
    if value % by:
        raise CheckpointError(f"vae.{where}: {value} channels do not divide by {by}")
    return value // by


class _LatentScale(nn.Module):
    """What encoder and decoder share: the mean and the standard deviation of each channel."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))


class VideoEncoder(_LatentScale):
    """Encode pictures and clips."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__(config)
        width, padding = config.latent_channels, config.encoder_padding
        self.conv_in = CausalConv3d(COLOURS * config.patch**2, width, True, padding)
        self.down_blocks = nn.ModuleList()
        for block in config.encoder_blocks:
            if block.layers:
                self.down_blocks.append(ResnetRun(block, width, True, padding))
            else:
                self.down_blocks.append(SpaceToDepthDownsample(block, width, padding))
            width *= block.multiplier
        self.conv_out = CausalConv3d(width, config.latent_channels + 1, True, padding)

    def check(self, pixels: Tensor) -> None:
        """Raise ShapeError unless pixels are (B, 3, F, H, W) of a size on the grid."""
        unit = self.config.grid.space
        fits = pixels.ndim == 5 and pixels.shape[1] == COLOURS and 0 not in pixels.shape
        if not fits or pixels.shape[3] % unit or pixels.shape[4] % unit:
            raise ShapeError(
                f"VideoEncoder: got pixels of shape {tuple(pixels.shape)}, wanted "
                f"(batch, {COLOURS}, frames, height, width), sizes in multiples of {unit}"
            )

    def prepare(self, pixels: Tensor) -> Tensor:
        """Check pixels (B, 3, F, H, W); return them patchified, (B, F, C, H/4, W/4)."""
        self.check(pixels)
        return patchify(pixels.to(self.conv_in.conv.weight.dtype), self.config.patch)

    def finish(self, x: Tensor) -> Tensor:
        """Turn (B, F, C + 1, Y, X) into the normalised latent; the last channel is a variance."""
        means = x[:, :, : self.config.latent_channels].transpose(1, 2).contiguous()
        return normalise(means, self.latent_mean, self.latent_std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode a clip into the normalised latent that the transformer works on.

        pixels: (B, 3, F, H, W) in [-1, 1]; frames after the last 8 n + 1 are left out.
        Returns (B, C, F', H/32, W/32) in the dtype of the weights.
        Raises ShapeError for another layout or a size off the grid.
        Source: LTX-2 400fd31 ltx_core/model/video_vae/video_vae.py VideoEncoder.
        """
        x = self.prepare(pixels)
        x = self.conv_in(x[:, : self.config.grid.snap_frames(x.shape[1])])
        for block in self.down_blocks:
            x = block(x)
        return self.finish(self.conv_out(x, Piece.activated))


class VideoDecoder(_LatentScale):
    """Decode latents."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__(config)
        multipliers = (block.multiplier for block in config.decoder_blocks)
        width, padding = config.decoder_width * math.prod(multipliers), config.decoder_padding
        self.conv_in = CausalConv3d(config.latent_channels, width, False, padding)
        self.up_blocks = nn.ModuleList()
        for block in reversed(config.decoder_blocks):
            if block.layers:
                self.up_blocks.append(ResnetRun(block, width, False, padding))
            else:
                self.up_blocks.append(DepthToSpaceUpsample(block, width, padding))
            width //= block.multiplier
        self.conv_out = CausalConv3d(width, COLOURS * config.patch**2, False, padding)

    def check(self, latent: Tensor) -> None:
        """Raise ShapeError unless a latent is (B, C, F', Y, X)."""
        channels = self.config.latent_channels
        if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
            raise ShapeError(
                f"VideoDecoder: got a latent of shape {tuple(latent.shape)}, "
                f"wanted (batch, {channels}, frames, rows, columns)"
            )

    def prepare(self, latent: Tensor) -> Tensor:
        """Check and unnormalise a latent; return it as (B, F, C, Y, X) in the weights' dtype."""
        self.check(latent)
        latent = unnormalise(latent, self.latent_mean, self.latent_std)
        return latent.to(self.conv_in.conv.weight.dtype).transpose(1, 2)

    def forward(self, latent: Tensor) -> Tensor:
        """Decode a whole normalised latent at once.

        latent: (B, C, F', Y, X).  Returns (B, 3, 8 F' - 7, 32 Y, 32 X), about [-1, 1], unclamped,
        in the dtype of the weights.  Raises ShapeError for another layout.
        Source: LTX-2 400fd31 ltx_core/model/video_vae/video_vae.py VideoDecoder.
        """
        x = self.conv_in(self.prepare(latent))
        for block in self.up_blocks:
            x = block(x)
        return unpatchify(self.conv_out(x, Piece.activated), self.config.patch)


# Names as they stand after the prefix `vae.`.  The two halves are separate modules which both own
# the statistics, so each leaves the other half's tensors alone.
RENAMES = (
    (r"^(encoder|decoder)\.", ""),
    (r"^per_channel_statistics\.mean-of-means$", "latent_mean"),
    (r"^per_channel_statistics\.std-of-means$", "latent_std"),
)
IGNORED = (
    # Statistics of the statistics, left over from training; no released code reads them.
    r"^per_channel_statistics\.(mean-of-stds|mean-of-stds_over_std-of-means|channel)$",
)
ENCODER_IGNORED = (*IGNORED, r"^decoder\.")
DECODER_IGNORED = (*IGNORED, r"^encoder\.")
