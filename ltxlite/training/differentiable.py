"""Video VAE and latent upscaler under gradients: the same weights, no tensor written in place.

The networks of `ltxlite.models` reuse memory, which autograd forbids. Their modules are walked
here with torch's own 3-D convolution, channels last: in bf16 on a CPU with AMX it takes 7 ms, forth
and back, where the 2-D form that saves memory takes 19 (8 clips of 64x64x17, 32 channels). Tests
hold both to the same values. Layout (B, C, F, Y, X) throughout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.models.causal_conv import NORM_EPSILON, CausalConv3d
from ltxlite.models.upscaler import (
    FrameUpsampler,
    LatentUpscaler,
    ResidualBlock,
    VolumeUpsampler,
)
from ltxlite.models.video_vae import (
    DepthToSpaceUpsample,
    ResnetBlock,
    ResnetRun,
    SpaceToDepthDownsample,
    VideoDecoder,
    VideoEncoder,
    depth_to_space,
    patchify,
    space_to_depth,
    unpatchify,
)


def encode(encoder: VideoEncoder, pixels: Tensor) -> Tensor:
    """Encode pixels (B, 3, F, H, W) to the latent as it is before it is normalised."""
    x = patchify(pixels, encoder.config.patch).transpose(1, 2)
    x = _convolve(encoder.conv_in, x)
    for block in encoder.down_blocks:
        x = _run(block, x) if isinstance(block, ResnetRun) else _down(block, x)
    return _convolve(encoder.conv_out, _activate(x))[:, : encoder.config.latent_channels]


def decode(decoder: VideoDecoder, latent: Tensor) -> Tensor:
    """Decode a latent (B, C, F, Y, X) that is not normalised to pixels (B, 3, F, H, W)."""
    x = _convolve(decoder.conv_in, latent)
    for block in decoder.up_blocks:
        x = _run(block, x) if isinstance(block, ResnetRun) else _up(block, x)
    x = _convolve(decoder.conv_out, _activate(x))
    return unpatchify(x.transpose(1, 2), decoder.config.patch)


def upscale(upscaler: LatentUpscaler, latent: Tensor) -> Tensor:
    """Enlarge a latent (B, C, F, Y, X) that is not normalised."""
    x = F.silu(upscaler.initial_norm(upscaler.initial_conv(latent)))
    for block in upscaler.res_blocks:
        x = _residual(block, x)
    x = _enlarge(upscaler.upsampler, x)
    for block in upscaler.post_upsample_res_blocks:
        x = _residual(block, x)
    out: Tensor = upscaler.final_conv(x)
    return out


def _activate(x: Tensor) -> Tensor:
    wide = x.float()
    root = (wide.square().mean(dim=1, keepdim=True) + NORM_EPSILON).rsqrt()
    return F.silu(wide * root).to(x.dtype)


def _convolve(module: CausalConv3d, x: Tensor) -> Tensor:
    """Convolve a whole clip, its first and last frames standing for what lies beyond."""
    first, last = x[:, :, :1], x[:, :, -1:]
    x = torch.cat([first] * module.before + [x] + [last] * module.after, dim=2)
    margin = module.margin
    if margin:
        x = F.pad(x, (1, 1, 1, 1, 0, 0), mode="reflect")
    conv = module.conv
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, conv.weight, conv.bias, padding=(0, 1 - margin, 1 - margin))


def _run(run: ResnetRun, x: Tensor) -> Tensor:
    for block in run.res_blocks:
        assert isinstance(block, ResnetBlock)
        hidden = _convolve(block.conv1, _activate(x))
        x = x + _convolve(block.conv2, _activate(hidden))
    return x


def _down(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, SpaceToDepthDownsample)
    if block.stride[0] > 1:
        x = torch.cat([x[:, :, :1], x], dim=2)
    folded = space_to_depth(_convolve(block.conv, x).transpose(1, 2), block.stride)
    skip = space_to_depth(x.transpose(1, 2), block.stride)
    groups: Tensor = skip.unflatten(2, (block.outputs, block.group))
    return (folded + groups.mean(dim=3)).transpose(1, 2)


def _up(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, DepthToSpaceUpsample)
    out = depth_to_space(_convolve(block.conv, x).transpose(1, 2), block.stride)
    if block.repeats:
        skip = depth_to_space(x.transpose(1, 2), block.stride)
        out = out + skip.repeat(1, 1, block.repeats, 1, 1)
    return out.transpose(1, 2)[:, :, block.stride[0] - 1 :]


def _residual(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, ResidualBlock)
    hidden = F.silu(block.norm1(block.conv1(x)))
    return F.silu(block.norm2(block.conv2(hidden)) + x)


def _enlarge(upsampler: nn.Module, x: Tensor) -> Tensor:
    frames = x.shape[2]
    if isinstance(upsampler, FrameUpsampler):
        planes = upsampler.conv(x.transpose(1, 2).flatten(0, 1))
        planes = F.pixel_shuffle(planes, upsampler.numerator)
        if upsampler.denominator > 1:
            planes = upsampler._blur(planes)
        shuffled: Tensor = planes.unflatten(0, (-1, frames))
        return shuffled.transpose(1, 2)
    assert isinstance(upsampler, VolumeUpsampler)
    side = upsampler.side
    split = upsampler.conv(x).unflatten(1, (-1, 2, side, side))  # (B, C, 2, side, side, F, Y, X)
    merged: Tensor = split.permute(0, 1, 5, 2, 6, 3, 7, 4)
    shape = (x.shape[0], x.shape[1], 2 * frames, side * x.shape[3], side * x.shape[4])
    return merged.reshape(shape)[:, :, 1:]
