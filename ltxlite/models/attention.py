"""Attention as the transformer and the connectors have it, in chunks of queries.

Source: LTX-2 400fd31, ltx_core/model/transformer/attention.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ltxlite.models.activation import PLAIN, Activation, Gated, Tail, project, rms_norm
from ltxlite.models.layers import chunks, map_rows
from ltxlite.models.rope import Rope
from ltxlite_kernels import ops

ROTATED_CHUNK = 512  # rotation holds four fp32 copies of its rows: 32 MiB at width 4096


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Normalised, rotated keys and plain values of a sequence: (B, S, W) each."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Widths of an attention module: of queries' source, keys' source, inside and out."""

    query: int
    context: int
    inner: int
    heads: int
    gated: bool
    eps: float = 1e-6


def attention(q: Tensor, kv: KeyValue, heads: int, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q kᵀ / √D + bias) v per head.

    q and the result: (B, t, W).  kv: (B, S, W).  bias: additive, broadcast to (B, 1, t, S).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, kv.key, kv.value))
    return ops.attention(q, k, v, bias).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys and an optional gate per head.

    Queries and keys are normalised over the whole inner width, before the split into heads. The
    gate, 2·sigmoid of a projection of the query source, doubles or closes each head's output.
    Source: LTX-2 400fd31, ltx_core/model/transformer/attention.py.
    """

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.heads, self.eps = shape.heads, shape.eps
        self.to_q = nn.Linear(shape.query, shape.inner)
        self.to_k = nn.Linear(shape.context, shape.inner)
        self.to_v = nn.Linear(shape.context, shape.inner)
        self.q_norm = nn.RMSNorm(shape.inner, eps=shape.eps)
        self.k_norm = nn.RMSNorm(shape.inner, eps=shape.eps)
        self.to_gate_logits = nn.Linear(shape.query, shape.heads) if shape.gated else None
        self.to_out = nn.Linear(shape.inner, shape.query)

    def keys_values(
        self, source: Callable[[slice], Activation], tokens: int, rope: Rope | None, size: int
    ) -> KeyValue:
        """Project a sequence, given chunk by chunk by `source` as (B, t, C), to keys and values."""
        key: Tensor | None = None
        for rows in chunks(tokens, size):
            given = source(rows)
            part = self._turned(project(self.to_k, given), self.k_norm, rope, rows)
            if part.shape[1] == tokens:
                return KeyValue(part, project(self.to_v, given))
            if key is None:
                shape = (part.shape[0], tokens, part.shape[2])
                key, value = part.new_empty(shape), part.new_empty(shape)
            key[:, rows] = part
            value[:, rows] = project(self.to_v, given)
        assert key is not None
        return KeyValue(key, value)

    def queries(self, given: Activation, rope: Rope | None, rows: slice) -> Tensor:
        """Project query sources (B, t, C), the tokens `rows` of their sequence, to (B, t, W)."""
        return self._turned(project(self.to_q, given), self.q_norm, rope, rows)

    def _turned(
        self, projected: Tensor, norm: nn.RMSNorm, rope: Rope | None, rows: slice
    ) -> Tensor:
        if rope is None:
            return rms_norm(projected, self.eps, norm.weight)
        first, weight = rows.start or 0, norm.weight.float()

        def turn(part: slice) -> Tensor:
            wide = rms_norm(projected[:, part].float(), self.eps, weight)  # turned in fp32 anyway
            turned = rope.rotate(wide, slice(first + part.start, first + part.stop))
            return turned.to(projected.dtype)

        return map_rows(turn, projected.shape[1], ROTATED_CHUNK)

    def output(self, given: Activation, mixed: Tensor, tail: Tail = PLAIN) -> Tensor:
        """Gate the mixed values (B, t, W) by their query sources (B, t, C) and project them out."""
        if self.to_gate_logits is None:
            return project(self.to_out, Activation(mixed), tail)
        logits = project(self.to_gate_logits, given)
        return project(self.to_out, Gated(mixed, logits), tail)

    def forward(
        self,
        given: Activation,
        kv: KeyValue,
        rope: Rope | None = None,
        rows: slice = slice(None),
        bias: Tensor | None = None,
        tail: Tail = PLAIN,
    ) -> Tensor:
        """Attend from query sources (B, t, C) to a prepared sequence; returns tail (B, t, C)."""
        mixed = attention(self.queries(given, rope, rows), kv, self.heads, bias)
        return self.output(given, mixed, tail)
