"""Encodes footage: exactly, a few frames at a time, or in the classical tiles that blend."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ltxlite.models.rolling import encode_frames
from ltxlite.models.tiling import Span, Tiling, tiled_encode
from ltxlite.models.video_vae import VideoEncoder
from ltxlite.networks import Networks
from ltxlite.request import Request


def encode_footage(
    request: Request, networks: Networks, encoder: VideoEncoder, pixels: Iterator[Tensor]
) -> Tensor:
    """Return the normalised latent (1, C, f, Y, X) fp32 on the CPU of a clip's pixels.

    pixels: pieces (1, 3, f, H, W) in [-1, 1], in order.  In tiles, where the request asks for
    them, the whole clip is held on the CPU.  Raises RequestError for tiles that the clip's grid,
    or what seams need, does not allow.
    """
    tiles = request.encode_tiles
    if tiles is None:
        group_bytes = networks.window.group_bytes
        moved = (piece.to(networks.device, networks.dtype) for piece in pixels)
        return encode_frames(encoder, moved, group_bytes).float().cpu()
    clip = torch.cat([piece.to("cpu", networks.dtype) for piece in pixels], dim=2)
    spans = Span(tiles.size, tiles.overlap), Span(tiles.frames, tiles.frames_overlap)
    tiling = Tiling.auto(clip.shape[3], clip.shape[4], *spans)
    return tiled_encode(encoder, clip, tiling).float().cpu()
