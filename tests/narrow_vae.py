"""Video VAEs of the released layouts, a few channels wide, with random weights."""

import dataclasses

import torch

from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.video_vae_config import Block, Padding, VideoVAEConfig


def narrow_config(family: str, padding: Padding) -> VideoVAEConfig:
    """The block lists of a family, 8 latent channels, 4 channels at the finest decoder level."""
    return dataclasses.replace(
        VideoVAEConfig.released(family),
        latent_channels=8,
        decoder_width=4,
        encoder_padding=padding,
        decoder_padding=padding,
    )


def narrow_decoder(family: str, padding: Padding = "zeros") -> VideoDecoder:
    decoder = VideoDecoder(narrow_config(family, padding))
    _fill(decoder)
    return decoder


def narrow_encoder(family: str, padding: Padding = "zeros") -> VideoEncoder:
    encoder = VideoEncoder(narrow_config(family, padding))
    _fill(encoder)
    return encoder


def shallow(config: VideoVAEConfig) -> VideoVAEConfig:
    """Leave one residual block of each run."""

    def thin(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        return tuple(dataclasses.replace(block, layers=min(1, block.layers)) for block in blocks)

    return dataclasses.replace(
        config,
        encoder_blocks=thin(config.encoder_blocks),
        decoder_blocks=thin(config.decoder_blocks),
    )


def _fill(network: VideoDecoder | VideoEncoder) -> None:
    """Fill with unit-gain weights, in float64: what is then left of differences is structure."""
    generator = torch.Generator().manual_seed(7)
    network.to(torch.float64).requires_grad_(True)
    for tensor in [*network.parameters(), *network.buffers()]:
        gain = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.3
        tensor.detach().normal_(std=gain, generator=generator)
    network.latent_std.abs_().add_(0.5)
