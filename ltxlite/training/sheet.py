"""A contact sheet: clips that a model made of captions it never saw, frame beside frame."""

from pathlib import Path

import torch
from torch import Tensor

from ltxlite.media.atomic import written_beside
from ltxlite.training.evaluate import Trial
from ltxlite.training.latents import KINDS
from ltxlite.training.world import held_out

_CLIPS = 8
_FRAMES = (0, 4, 8, 12, 16)


def write_sheet(states: Path, path: Path) -> Path:
    """Sample held-out captions from the networks in a folder; one row a clip, as PNG."""
    facts = held_out()[:: len(held_out()) // _CLIPS][:_CLIPS]
    samples = Trial(states).sample([item.caption() for item in facts], KINDS[0])[-1]
    return save_rows([sample.frames[list(_FRAMES)] for sample in samples], path)


def save_rows(rows: list[Tensor], path: Path) -> Path:
    """Write rows of frames (F, 3, H, W) in [-1, 1] below each other."""
    from PIL import Image

    lines = [torch.cat(list(frames), dim=-1) for frames in rows]
    pixels = (torch.cat(lines, dim=-2).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    with written_beside(path) as unfinished:
        Image.fromarray(pixels.movedim(0, -1).contiguous().numpy()).save(unfinished)
    return path
