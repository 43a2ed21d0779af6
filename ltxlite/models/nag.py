"""Normalised attention guidance (NAG): a negative prompt without a second pass.

Text attention is asked twice, about what shall be there and about what shall not, and its answer
moves away from the second as far as its length allows.
Source: features.md C7 (ChenDarYen/Normalized-Attention-Guidance; ComfyUI-KJNodes, Wan2GP). Both
contexts are modulated by the block, as in Wan2GP; KJNodes leaves that out for the negative one.
"""

import torch
from torch import Tensor

from ltxlite.models.layers import chunks
from ltxlite.models.passes import Avoided

_ROWS = 512  # five fp32 copies of so many rows: 40 MiB at width 4096
_TINY = 1e-7


def lead_away(towards: Tensor, away: Tensor, avoided: Avoided) -> Tensor:
    """Move mixed values of one prompt away from those of another, in fp32.

    towards, away: (B, t, W), heads side by side, before gate and projection; without gradients
    the first is written over.  Returns (B, t, W).
    """
    if torch.is_grad_enabled():
        return _led(towards.float(), away.float(), avoided).to(towards.dtype)
    for rows in chunks(towards.shape[1], _ROWS):
        towards[:, rows] = _led(towards[:, rows].float(), away[:, rows].float(), avoided)
    return towards


def _led(towards: Tensor, away: Tensor, avoided: Avoided) -> Tensor:
    guided = torch.lerp(away, towards, avoided.scale)  # s zp - (s - 1) zn
    before, after = (x.abs().sum(-1, keepdim=True) for x in (towards, guided))
    longest = avoided.tau * before
    # A ratio of lengths would be 0 / 0 where both are nothing.
    factor = torch.where(after > longest, longest / (after + _TINY), 1.0)
    return torch.lerp(towards, guided * factor, avoided.alpha)
