"""Brings a stage's picture to the next one's size by way of pixels, and a source's parts into it.

Only in- and outpainting does so: between its stages what was made is blended into the clip.
Source: Lightricks' in- and outpainting graphs (features.md F9).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ltxlite.conditions import Source
from ltxlite.geometry import ClipShape
from ltxlite.given.filling import filled
from ltxlite.given.footage_latents import encode_footage
from ltxlite.given.source import placed, source_frames
from ltxlite.given.source_fit import Size, source_fit
from ltxlite.given.source_mask import mask_frames, on_grid
from ltxlite.media.colour import to_unit_range
from ltxlite.media.timing import read_timing
from ltxlite.models.rolling import decode_frames
from ltxlite.networks import Networks
from ltxlite.request import Request
from ltxlite.stages import Latents


def enlarge_pixels(
    request: Request, networks: Networks, latents: Latents, shape: ClipShape
) -> Latents:
    """Decode a picture, blend it into the source, scale it (Lanczos) and encode it; sound stays.

    The picture waits on the CPU, 8 bits a colour, while one network makes room for the other.
    """
    frames = [_to_bytes(frame) for frame in _blended(request, networks, latents)]
    space = networks.latent_grid().space
    size = shape.rows * space, shape.columns * space
    video = encode_footage(request, networks, networks.video_encoder(), _scaled(frames, size))
    return replace(latents, video=video.to(latents.video), shape=shape)


def _blended(request: Request, networks: Networks, latents: Latents) -> Iterator[Tensor]:
    """Yield the frames (1, 3, H, W) of a picture, a source's own parts put back."""
    made = _decoded(networks, latents.video)
    source = request.conditions.source
    if source is None or not source.fill:
        yield from made
        return
    for frame, (kept, mask) in zip(made, _kept(request, source, latents, networks), strict=True):
        yield filled(frame, kept, mask, source, is_last=False)


def _decoded(networks: Networks, latent: Tensor) -> Iterator[Tensor]:
    decoder = networks.video_decoder()
    latent = latent.to(networks.device, networks.dtype)
    for piece in decode_frames(decoder, latent, networks.window.group_bytes):
        yield from piece[0].transpose(0, 1).float().cpu().split(1)


def _kept(
    request: Request, source: Source, latents: Latents, networks: Networks
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the source's frames (1, 3, H, W) at a stage's size, and where they are not kept."""
    space = networks.latent_grid().space
    size: Size = (latents.shape.rows * space, latents.shape.columns * space)
    timing, last = read_timing(Path(source.path)), source.offset + request.frames
    frames = source_frames(source, timing, request.rate, source.offset, last)
    first = next(source_frames(source, timing, request.rate, 0, 1))
    own = first.shape[0], first.shape[1]
    fit = source_fit(request, source, own, size)
    for frame, mask in zip(frames, mask_frames(request, source, own), strict=True):
        yield placed(request, source, frame, size)[None], on_grid(mask, fit)


def _to_bytes(frame: Tensor) -> Tensor:
    """Return a frame (1, 3, H, W) in about [-1, 1] as (H, W, 3) uint8."""
    return (to_unit_range(frame)[0] * 255).round().to(torch.uint8).movedim(0, -1)


def _scaled(frames: Sequence[Tensor], size: Size) -> Iterator[Tensor]:
    """Yield frames (H, W, 3) as pixels (1, 3, 1, *size) in [-1, 1]."""
    for frame in frames:
        picture = Image.fromarray(frame.numpy()).resize(size[::-1], Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(picture)).movedim(-1, 0)
        yield pixels[None, :, None].float() / 127.5 - 1
