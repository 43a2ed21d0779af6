"""Self-attention in which some tokens are seen more, or less, than others.

Source: LTX-2 400fd31, ltx_core/conditioning (attention masks); model.md 7.4.
"""

import itertools

import torch
from torch import Tensor

from ltxlite.models.attention import Keys, attention
from ltxlite.models.passes import RowWeights


def weighted_attention(
    q: Tensor, kv: Keys, heads: int, weights: tuple[RowWeights, ...], rows: slice
) -> Tensor:
    """Attend with soft weights: each weight w adds log w to its score, w = 0 hides the key.

    q: (B, t, W), the tokens `rows` of the sequence.  Rows no weight covers attend plainly.
    """
    if not weights:
        return attention(q, kv, heads)
    out = torch.empty_like(q)
    first, last = rows.start, rows.start + q.shape[1]
    edges = {first, last}
    for item in weights:
        edges |= {edge for edge in (item.start, item.stop) if first < edge < last}
    bounds = sorted(edges)
    for start, stop in itertools.pairwise(bounds):
        bias = _row_bias(weights, start, stop, q.dtype)
        local = slice(start - first, stop - first)
        out[:, local] = attention(q[:, local], kv, heads, bias)
    return out


def _row_bias(
    weights: tuple[RowWeights, ...], start: int, stop: int, dtype: torch.dtype
) -> Tensor | None:
    for item in weights:
        if item.start <= start and stop <= item.stop:
            w = item.weights
            if w.shape[1] > 1:
                w = w[:, start - item.start : stop - item.start]
            return w.float().log().clamp(min=torch.finfo(dtype).min).to(dtype)[:, None]
    return None
