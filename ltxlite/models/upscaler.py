"""Latent upscalers: one network between two stages of denoising, in space, in time or in both.

The norms see all frames at once, so the clip cannot pass in parts. It is worked on in place: two
whole tensors live, what a block got and what it makes, and a few frames of one convolution.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models.settings import Settings

NORM_GROUPS = 32
NORM_EPSILON = 1e-5
BLUR = (1, 4, 6, 4, 1)  # binomial, so that keeping every second pixel does not alias
FRAMES_AT_ONCE = 4  # latent frames; one of 1920x1088 is 4 MB at 1024 channels
NORM_PARTS = 8  # a norm's result is copied back, an eighth of the clip at a time

Shape = tuple[int, ...]
Ratio = tuple[int, int]
UNSCALED: Ratio = (1, 1)
RATIO_OF_SCALE: Mapping[float, Ratio] = {2.0: (2, 1), 1.5: (3, 2)}
RATIO_OF_SHUFFLE: Mapping[int, Ratio] = {2: (2, 1), 3: (3, 2)}


@dataclass(frozen=True, slots=True)
class UpscalerConfig:
    """Hyper-parameters of a latent upscaler; the defaults stand for keys that a file leaves out.

    width: channels inside.  blocks: residual blocks before and again after the upsampling.
    space: numerator and denominator by which rows and columns grow.
    time: whether F becomes 2 F - 1.
    """

    latent_channels: int = 128
    width: int = 512
    blocks: int = 4
    space: Ratio = (2, 1)
    time: bool = False

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the configuration of an upscaler file, which is flat.

        Raises CheckpointError for a network or a scale that is not implemented.
        """
        settings.expect("dims", 3)
        rational = settings.flag("rational_resampler", False)
        scale = settings.number("spatial_scale", 2.0)
        space = UNSCALED
        if settings.flag("spatial_upsample", True):
            if scale not in RATIO_OF_SCALE or (scale != 2.0 and not rational):
                raise CheckpointError(
                    f"{settings.where}.spatial_scale is {scale}, ltxlite implements 2.0, and 1.5 "
                    "with rational_resampler"
                )
            space = RATIO_OF_SCALE[scale]
        return cls(
            latent_channels=settings.integer("in_channels", cls().latent_channels),
            width=settings.integer("mid_channels", cls().width),
            blocks=settings.integer("num_blocks_per_stage", cls().blocks),
            space=space,
            time=settings.flag("temporal_upsample", False),
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> Self:
        """Infer the configuration from the shapes of an upscaler file's tensors.

        Raises CheckpointError if they are not those of an upscaler.
        """
        entry = shapes.get("initial_conv.weight", ())
        if len(entry) != 5:
            raise CheckpointError(
                f"upscaler: initial_conv.weight has shape {entry}, wanted 5 dimensions; "
                "is this a latent upscaler file?"
            )
        space, time = _upsampling_of(shapes, entry[0])
        pattern = re.compile(r"res_blocks\.\d+\.conv1\.weight")
        blocks = sum(pattern.fullmatch(name) is not None for name in shapes)
        return cls(latent_channels=entry[1], width=entry[0], blocks=blocks, space=space, time=time)

    def __post_init__(self) -> None:
        if self.width % NORM_GROUPS:
            raise CheckpointError(
                f"upscaler: mid_channels is {self.width}, wanted a multiple of {NORM_GROUPS}"
            )
        if self.space == UNSCALED and not self.time:
            raise CheckpointError(
                "upscaler: it upsamples neither space nor time, wanted one of them"
            )
        if self.time and self.space not in (UNSCALED, (2, 1)):
            raise CheckpointError("upscaler: time goes together with twice the size, not with 1.5")

    @property
    def kind(self) -> str:
        """Name what it does to a latent: "x2", "x1.5" (in space), "temporal x2" or both."""
        numerator, denominator = self.space
        parts = [f"x{numerator / denominator:g}"] if self.space != UNSCALED else []
        return " and ".join(parts + ["temporal x2"] * self.time)


def _upsampling_of(shapes: Mapping[str, Shape], width: int) -> tuple[Ratio, bool]:
    """Tell the kind of upsampling from the convolution that makes its channels."""
    name = "upsampler.conv.weight" if "upsampler.conv.weight" in shapes else "upsampler.0.weight"
    shape = shapes.get(name, ())
    factor = shape[0] / width if shape else 0
    if len(shape) == 4 and math.isqrt(int(factor)) ** 2 == factor:
        side = math.isqrt(int(factor))
        if side == 2 or (side == 3 and name == "upsampler.conv.weight"):
            return RATIO_OF_SHUFFLE[side], False
    if len(shape) == 5 and factor in (2, 8):
        return (UNSCALED if factor == 2 else (2, 1)), True
    raise CheckpointError(
        f"upscaler: {name} has shape {shape}, which fits no upsampling of {width} channels that "
        "ltxlite implements: x2 or x1.5 in space, x2 in time, both x2"
    )


def convolve(conv: nn.Conv3d, x: Tensor, out: Tensor) -> Tensor:
    """Convolve 3x3x3 with zeros around, a few frames at a time: (B, C, F, Y, X) to (B, N, F, Y, X).

    out: where to, `x` itself if it has the channels.
    In parts cuDNN's 3-D kernels cannot ask for work space of the size of the clip, as they do in
    torch 2.9 (three times the tensors, bf16).
    """
    before = torch.zeros_like(x[:, :, :1])
    for start in range(0, x.shape[2], FRAMES_AT_ONCE):
        stop = min(start + FRAMES_AT_ONCE, x.shape[2])
        after = x[:, :, stop : stop + 1] if stop < x.shape[2] else torch.zeros_like(before)
        window = torch.cat([before, x[:, :, start:stop], after], dim=2)
        before = window[:, :, -2:-1].clone()
        out[:, :, start:stop] = F.conv3d(window, conv.weight, conv.bias, padding=(0, 1, 1))
    return out


def normalise_(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Apply a group norm in the memory of `x`, a few groups at a time."""
    groups = NORM_GROUPS // NORM_PARTS
    weights, biases = norm.weight.chunk(NORM_PARTS), norm.bias.chunk(NORM_PARTS)
    for part, weight, bias in zip(x.chunk(NORM_PARTS, dim=1), weights, biases, strict=True):
        part.copy_(F.group_norm(part, groups, weight, bias, norm.eps))
    return x


class ResidualBlock(nn.Module):
    """Add two normalised convolutions to the input and activate the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.norm1 = nn.GroupNorm(NORM_GROUPS, width, NORM_EPSILON)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, width, NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        hidden = convolve(self.conv1, x, torch.empty_like(x))
        hidden = F.silu(normalise_(self.norm1, hidden), inplace=True)
        hidden = normalise_(self.norm2, convolve(self.conv2, hidden, hidden))
        return F.silu(hidden.add_(x), inplace=True)


class FrameUpsampler(nn.Module):
    """Enlarge frames by a fraction n / d: shuffle channels to n, blur, keep every d-th pixel."""

    def __init__(self, width: int, ratio: Ratio) -> None:
        super().__init__()
        self.numerator, self.denominator = ratio
        self.conv = nn.Conv2d(width, self.numerator**2 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # ceil(n Y / d): as many as the strided blur keeps
        rows, columns = (-(-self.numerator * side // self.denominator) for side in x.shape[3:])
        out = x.new_empty(*x.shape[:3], rows, columns)
        for index in range(x.shape[2]):
            frame = F.pixel_shuffle(self.conv(x[:, :, index]), self.numerator)
            out[:, :, index] = self._blur(frame) if self.denominator > 1 else frame
        return out

    def _blur(self, frames: Tensor) -> Tensor:
        taps = torch.tensor(BLUR, device=frames.device, dtype=frames.dtype)
        kernel = (taps[:, None] * taps) / sum(BLUR) ** 2  # powers of two below: exact in bf16 too
        channels = frames.shape[1]
        weight = kernel.expand(channels, 1, -1, -1)
        margin = len(BLUR) // 2
        return F.conv2d(frames, weight, stride=self.denominator, padding=margin, groups=channels)


class VolumeUpsampler(nn.Module):
    """Double time, and optionally space, by shuffling channels; F frames become 2 F - 1."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv3d(width, 2 * side**2 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, rows, columns = x.shape
        side = self.side
        split = convolve(self.conv, x, x.new_empty(batch, self.conv.out_channels, *x.shape[2:]))
        split = split.view(batch, channels, 2, side, side, frames, rows, columns)
        # The first latent frame stands for a single picture, so its first half is left out.
        out = x.new_empty(batch, channels, 2 * frames - 1, side * rows, side * columns)
        for index in range(1, 2 * frames):
            frame = split[:, :, index % 2, :, :, index // 2]  # (B, C, side, side, Y, X)
            merged = frame.permute(0, 1, 4, 2, 5, 3)  # (B, C, Y, side, X, side)
            out[:, :, index - 1] = merged.reshape(batch, channels, *out.shape[3:])
        return out


class LatentUpscaler(nn.Module):
    """Enlarge video latents between two stages of denoising."""

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        self.latent_channels, width = config.latent_channels, config.width
        self.initial_conv = nn.Conv3d(self.latent_channels, width, 3, padding=1)
        self.initial_norm = nn.GroupNorm(NORM_GROUPS, width, NORM_EPSILON)
        self.res_blocks = _blocks(config)
        self.upsampler = (
            VolumeUpsampler(width, config.space[0])
            if config.time
            else FrameUpsampler(width, config.space)
        )
        self.post_upsample_res_blocks = _blocks(config)
        self.final_conv = nn.Conv3d(width, self.latent_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Enlarge a latent that is *not* normalised.

        latent: (B, C, F, Y, X) in the dtype of the weights.
        Returns (B, C, F, 2 Y, 2 X); for x1.5 ceil(3 Y / 2) and ceil(3 X / 2); in time 2 F - 1.
        The norms see all frames and the whole picture: a tile would give another result.
        Raises ShapeError for another layout.  Source: LTX-2 400fd31 model/upsampler.
        """
        if latent.ndim != 5 or latent.shape[1] != self.latent_channels:
            raise ShapeError(
                f"upscaler: got a latent of shape {tuple(latent.shape)}, wanted "
                f"(batch, {self.latent_channels}, frames, rows, columns)"
            )
        # Blocks are called one by one: `Sequential` keeps what it was given while it runs.
        x = self._enter(latent)
        for block in self.res_blocks:
            x = block(x)
        x = self.upsampler(x)
        for block in self.post_upsample_res_blocks:
            x = block(x)
        out = x.new_empty(x.shape[0], self.latent_channels, *x.shape[2:])
        return convolve(self.final_conv, x, out)

    def _enter(self, latent: Tensor) -> Tensor:
        width = self.initial_conv.out_channels
        x = latent.new_empty(latent.shape[0], width, *latent.shape[2:])
        x = normalise_(self.initial_norm, convolve(self.initial_conv, latent, x))
        return F.silu(x, inplace=True)


def _blocks(config: UpscalerConfig) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(config.width) for _ in range(config.blocks)))


def upscale_normalised(
    upscaler: LatentUpscaler, latent: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    """Enlarge a latent as the transformer sees it, by way of the scale the upscaler knows.

    latent: (B, C, F, Y, X) normalised.  mean, std: (C,) of the video VAE.  Returns it normalised.
    Source: LTX-2 400fd31 model/upsampler upsample_video.
    """
    mean, std = (vector.to(latent).reshape(-1, 1, 1, 1) for vector in (mean, std))
    enlarged: Tensor = upscaler(latent * std + mean)
    return (enlarged - mean) / std


RENAMES = (
    (r"^upsampler\.0\.", "upsampler.conv."),  # plain x2 is the rational one without a blur
)
IGNORED = (
    # The stored blur equals BLUR's outer product / 256 bit for bit, in bf16 as well.
    r"^upsampler\.blur_down\.kernel$",
)
