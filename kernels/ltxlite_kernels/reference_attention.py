"""The twins of the attention kernels in plain torch, a head and some queries at a time.

They hold scores of `SCORES` pairs of a query and a key at most, in fp32.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxlite_kernels.attention_inputs import KEYS_PER_SCALE, KeyBias, PreparedKeys
from ltxlite_kernels.reference import LARGEST_CODE, SMALLEST

SCORES = 1 << 22  # 16 MiB in fp32
LARGEST_VALUE = 256.0  # of a power of two: values are less than twice that


def prepare_into(key: Tensor, value: Tensor, out: PreparedKeys) -> None:
    """Prepare keys and values; see `attention_keys.prepare`."""
    width = key.shape[2] // out.heads
    for head in range(out.heads):
        columns = slice(head * width, (head + 1) * width)
        wide = key[..., columns].float()
        wide = wide - wide.mean(1, keepdim=True)
        blocks = F.pad(wide, (0, 0, 0, -wide.shape[1] % KEYS_PER_SCALE))
        scales = _steps(blocks.unflatten(1, (-1, KEYS_PER_SCALE)).flatten(2))
        out.scales[:, head] = scales
        out.codes[..., columns] = _codes(wide, _each(scales, wide.shape[1])).to(torch.int8)
        wide = value[..., columns].float()
        powers = _powers(wide.abs().amax(1))
        out.value[..., columns] = (wide * (LARGEST_VALUE / powers)[:, None]).to(torch.float16)
        out.value_scales[:, columns] = powers / LARGEST_VALUE


def _powers(largest: Tensor) -> Tensor:
    """Return the powers of two at or below, infinite for NaN, as the bits of a float are."""
    bits = largest.clamp(min=SMALLEST).view(torch.int32) & 0x7F800000
    return bits.view(torch.float32)


def _steps(x: Tensor) -> Tensor:
    """Return absmax / 127 along the last dimension."""
    return x.abs().amax(-1).clamp(min=SMALLEST) * (1 / LARGEST_CODE)


def _each(scales: Tensor, keys: int) -> Tensor:
    """Return the scale of each key (B, S, 1) from those of their blocks (B, S / 64)."""
    return scales.repeat_interleave(KEYS_PER_SCALE, 1)[:, :keys, None]


def _codes(x: Tensor, steps: Tensor) -> Tensor:
    """Round to whole steps; returns fp32."""
    whole = (x * (1 / steps)).round_().nan_to_num_(0.0)
    return whole.clamp_(-LARGEST_CODE, LARGEST_CODE)


def attend(
    q: Tensor, keys: PreparedKeys, bias: KeyBias | None = None, out: Tensor | None = None
) -> Tensor:
    """Attend to prepared keys; see `attention.attend`."""
    out = torch.empty_like(q) if out is None else out
    width = q.shape[2] // keys.heads
    for head in range(keys.heads):
        columns = slice(head * width, (head + 1) * width)
        codes = keys.codes[..., columns].float().mT
        scales = _each(keys.scales[:, head], codes.shape[2]).mT / math.sqrt(width)
        value = keys.value[..., columns].float() * keys.value_scales[:, None, columns]
        for rows in _chunks(q, codes.shape[2]):
            wide = q[:, rows, columns].float()
            steps = _steps(wide)[..., None]
            # Sums of D products of codes are below 2^24: exact in fp32.
            scores = (_codes(wide, steps) @ codes) * steps * scales
            if bias is not None:
                scores += bias.of(rows).scores()
            out[:, rows, columns] = (scores.softmax(2) @ value).to(out.dtype)
    return out


def attend_flash(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    bias: KeyBias | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend to plain keys and values; see `attention.attend_flash`."""
    out = torch.empty_like(q) if out is None else out
    key, value = (_by_head(x, heads) for x in (key, value))
    for rows in _chunks(q, key.shape[2]):
        added = None if bias is None else bias.of(rows).scores()
        if added is not None and added.dim() == 3:
            added = added[:, None]
        part = _by_head(q[:, rows], heads)
        mixed = F.scaled_dot_product_attention(part, key, value, attn_mask=added)
        out[:, rows] = mixed.transpose(1, 2).flatten(2)
    return out


def _by_head(x: Tensor, heads: int) -> Tensor:
    heads_apart: Tensor = x.unflatten(2, (heads, -1))
    return heads_apart.transpose(1, 2)


def _chunks(q: Tensor, keys: int) -> Iterator[slice]:
    size = max(1, SCORES // (q.shape[0] * keys))
    for first in range(0, q.shape[1], size):
        yield slice(first, min(first + size, q.shape[1]))
