"""Attention as the transformer and the connectors have it, in chunks of queries.

Source: LTX-2 400fd31, ltx_core/model/transformer/attention.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltxlite.models.activation import PLAIN, Activation, Gated, Tail, fuses, project, rms_norm
from ltxlite.models.layers import chunks, map_rows
from ltxlite.models.rope import Rope
from ltxlite_kernels import ops
from ltxlite_kernels.attention import attend, attend_flash
from ltxlite_kernels.attention_inputs import KeyBias, PreparedKeys
from ltxlite_kernels.attention_keys import prepare
from ltxlite_kernels.configs import ATTENTION_HEAD_DIMS
from ltxlite_kernels.norm_rope import norm_rope

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


Keys = KeyValue | PreparedKeys
Bias = Tensor | KeyBias


def values_of(kv: Keys, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return a copy of some rows of the values (B, t, W)."""
    if isinstance(kv, KeyValue):
        return kv.value[:, rows].clone()
    return (kv.value[:, rows] * kv.value_scales[:, None]).to(dtype)


def attention(q: Tensor, kv: Keys, heads: int, bias: Bias | None = None) -> Tensor:
    """Compute softmax(q kᵀ / √D + bias) v per head.

    q and the result: (B, t, W).  kv: (B, S, W).  bias: additive, (B or 1, 1, t or 1, S), or rows
    that queries look up.
    """
    if isinstance(kv, PreparedKeys):
        return attend(q, kv, _key_bias(bias, q))
    if bias is not None and fuses(q) and q.shape[-1] // heads in ATTENTION_HEAD_DIMS:
        # torch takes another kernel for masks, and wants one for every query.
        return attend_flash(q, kv.key, kv.value, heads, _key_bias(bias, q))
    if isinstance(bias, KeyBias):
        return _attention_by_row(q, kv, heads, bias)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, kv.key, kv.value))
    return ops.attention(q, k, v, bias).transpose(1, 2).flatten(2)


def _attention_by_row(q: Tensor, kv: KeyValue, heads: int, bias: KeyBias) -> Tensor:
    """Attend where no kernel looks rows up: on a CPU, runs of queries with a row in common."""
    ids = bias.row_ids
    if torch.is_grad_enabled():
        dense = bias.scores().to(q.dtype)
        return attention(q, kv, heads, dense.expand(len(q), -1, -1)[:, None])
    if ids is None or not q.is_cpu:  # elsewhere the host would wait for the ids
        return attend_flash(q, kv.key, kv.value, heads, bias)
    out = torch.empty_like(q)
    rows = bias.rows.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)[:, None, None, None]
    for samples, own in _by_sample(ids):
        keys, first = KeyValue(kv.key[samples], kv.value[samples]), 0
        found, counts = torch.unique_consecutive(own, return_counts=True)
        for row, count in zip(found.tolist(), counts.tolist(), strict=True):
            run = slice(first, first + count)
            out[samples, run] = attention(q[samples, run], keys, heads, rows[row])
            first += count
    return out


def _by_sample(ids: Tensor) -> list[tuple[slice, Tensor]]:
    """Pair row ids (t,) with all samples, each of (B, t) with its own."""
    if ids.dim() == 1:
        return [(slice(None), ids)]
    return [(slice(number, number + 1), own) for number, own in enumerate(ids)]


def _key_bias(bias: Bias | None, q: Tensor) -> KeyBias | None:
    """Turn an additive bias (B or 1, 1, t or 1, S) into its rows and who takes which."""
    if bias is None or isinstance(bias, KeyBias):
        return bias
    samples, _, queries, _ = bias.shape
    rows = bias.flatten(0, 2)
    if len(rows) == 1:
        return KeyBias(rows)
    ids = torch.arange(samples, device=q.device)[:, None] * queries
    ids = ids + torch.arange(queries, device=q.device)
    return KeyBias(rows, ids.expand(q.shape[:2]).to(torch.int32).contiguous())


def _stored(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys and an optional gate per head.

    Queries and keys are normalised over the whole inner width, before the split into heads. The
    gate, 2·sigmoid of a projection of the query source, doubles or closes each head's output.
    Source: LTX-2 400fd31, ltx_core/model/transformer/attention.py.
    """

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.heads, self.eps = shape.heads, shape.eps
        self.head_dim = shape.inner // shape.heads
        self.int8_from: int | None = None  # keys from which scores are int8 (`prepared`)
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
            projected = project(self.to_k, given)
            if projected.shape[1] == tokens:
                turned = self._turned(projected, self.k_norm, rope, rows)
                del projected  # used up; on a CPU the norm has memory of its own
                return KeyValue(turned, project(self.to_v, given))
            if key is None:
                shape = (projected.shape[0], tokens, projected.shape[2])
                key, value = projected.new_empty(shape), projected.new_empty(shape)
            self._turned(projected, self.k_norm, rope, rows, key[:, rows])
            value[:, rows] = project(self.to_v, given)
        assert key is not None
        return KeyValue(key, value)

    def prepared(self, kv: KeyValue) -> Keys:
        """Bring the keys of a long sequence into int8, where that is how scores are computed.

        kv is used up.
        """
        if self.int8_from is None or kv.key.shape[1] < self.int8_from:
            return kv
        return prepare(kv.key, kv.value, self.heads, reuse=True)

    def queries(self, given: Activation, rope: Rope | None, rows: slice) -> Tensor:
        """Project query sources (B, t, C), the tokens `rows` of their sequence, to (B, t, W)."""
        return self._turned(project(self.to_q, given), self.q_norm, rope, rows)

    def _turned(
        self,
        projected: Tensor,
        norm: nn.RMSNorm,
        rope: Rope | None,
        rows: slice,
        out: Tensor | None = None,
    ) -> Tensor:
        """Norm and turn rows, which are used up; returns the result, in `out` if that is given."""
        tables = None if rope is None else rope.tables(rows)
        if fuses(projected) and (rope is None or tables is not None):
            out = projected if out is None else out
            return norm_rope(projected, norm.weight, tables, self.eps, out)
        if rope is None:
            return _stored(rms_norm(projected, self.eps, norm.weight), out)
        first, weight = rows.start or 0, norm.weight.float()

        def turn(part: slice) -> Tensor:
            wide = rms_norm(projected[:, part].float(), self.eps, weight)  # turned in fp32 anyway
            turned = rope.rotate(wide, slice(first + part.start, first + part.stop))
            return turned.to(projected.dtype)

        return _stored(map_rows(turn, projected.shape[1], ROTATED_CHUNK), out)

    def output(self, given: Activation, mixed: Tensor, tail: Tail = PLAIN) -> Tensor:
        """Gate mixed values (B, t, W) by their query sources (B, t, C) and project them out.

        The mixed values are used up.
        """
        if self.to_gate_logits is None:
            return project(self.to_out, Activation(mixed, given.moments), tail)
        logits = project(self.to_gate_logits, given)
        return project(self.to_out, Gated(mixed, logits, given.moments), tail)

    def forward(
        self,
        given: Activation,
        kv: KeyValue,
        rope: Rope | None = None,
        rows: slice = slice(None),
        bias: Bias | None = None,
        tail: Tail = PLAIN,
    ) -> Tensor:
        """Attend from query sources (B, t, C) to a prepared sequence; returns tail (B, t, C)."""
        mixed = attention(self.queries(given, rope, rows), kv, self.heads, bias)
        return self.output(given, mixed, tail)
