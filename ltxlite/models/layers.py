"""What the transformer, the connectors and Gemma share: norms, attention, feed-forward, chunking.

Everything that works row by row is computed in chunks of tokens, and residuals are added in place,
so that a block holds about three hidden states (x, keys, values) instead of ten. With gradients
enabled the same functions run unchunked and out of place.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.models.rope import Rope
from ltxlite_kernels import ops

TOKEN_CHUNK = 2048  # rows of a 4096-wide feed-forward then hold 64 MiB in bf16
ROTATED_CHUNK = 512  # rotation holds four fp32 copies of its rows: 32 MiB at width 4096


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Divide rows (..., C) by their root mean square, then scale by `weight` if there is one."""
    if x.is_cuda or x.is_meta or torch.is_grad_enabled():  # meta stands for the card
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # On a CPU that is five passes with a square of x in memory; this is two or three.
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    wide = wide * scale if wide is x else wide.mul_(scale)
    return (wide if weight is None else wide.mul_(weight)).to(x.dtype)


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Cut 0..tokens into slices of at most `size`; a single one while gradients are recorded."""
    if torch.is_grad_enabled():
        yield slice(0, tokens)
        return
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def add_rows(x: Tensor, update: Callable[[slice], Tensor], size: int) -> Tensor:
    """Return x (B, T, C) plus `update(rows)` for every chunk of rows; in place without gradients.

    An update may read its own rows of x, not others: they may have been overwritten.
    """
    if torch.is_grad_enabled():
        return x + update(slice(0, x.shape[1]))
    for rows in chunks(x.shape[1], size):
        x[:, rows] += update(rows)
    return x


def add_gated_rows(
    x: Tensor, update: Callable[[slice], tuple[Tensor, Tensor]], size: int
) -> Tensor:
    """Do as `add_rows` with updates that are pairs: what to add and its gate, multiplied.

    One pass over x instead of two: 2 % of a step on a CPU.
    """
    if torch.is_grad_enabled():
        return torch.addcmul(x, *update(slice(0, x.shape[1])))
    for rows in chunks(x.shape[1], size):
        x[:, rows].addcmul_(*update(rows))
    return x


def map_rows(function: Callable[[slice], Tensor], tokens: int, size: int) -> Tensor:
    """Return `function(rows)` (B, t, N) of every chunk, side by side as (B, T, N)."""
    out: Tensor | None = None
    for rows in chunks(tokens, size):
        part = function(rows)
        if part.shape[1] == tokens:
            return part
        if out is None:
            out = part.new_empty(part.shape[0], tokens, *part.shape[2:])
        out[:, rows] = part
    assert out is not None  # tokens > 0 is checked where sequences are made
    return out


@dataclass(frozen=True, slots=True)
class Modulation:
    """AdaLN vectors for some rows: shift, scale and gate, each (B, t or 1, C)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Vectors held once per distinct timestep and looked up per token.

    rows: (U, n, C).  index: (B, T), or (B, 1) where all tokens of a sample share one timestep.
    A clip has one to three distinct timesteps; per-token AdaLN of 1920x1088x121 would be 2.3 GiB.
    """

    rows: Tensor
    index: Tensor

    def row(self, number: int, tokens: slice) -> Tensor:
        """Return vector `number` for some tokens: (B, t or 1, C)."""
        if self.rows.shape[0] == self.index.numel() == 1:
            return self.rows[:, number, None]  # a view: nothing to look up
        index = self.index if self.index.shape[1] == 1 else self.index[:, tokens]
        return self.rows[:, number][index]

    def modulation(self, first: int, tokens: slice) -> Modulation:
        """Return rows first, first+1, first+2 as shift, scale and gate."""
        return Modulation(*(self.row(first + offset, tokens) for offset in range(3)))

    def plus(self, table: Tensor, dtype: torch.dtype) -> "TokenRows":
        """Add a learned table (n, C), kept in fp32 in the files, to every row."""
        return TokenRows((self.rows + table).to(dtype), self.index)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


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
        self, source: Callable[[slice], Tensor], tokens: int, rope: Rope | None, size: int
    ) -> KeyValue:
        """Project a sequence, given chunk by chunk by `source` as (B, t, C), to keys and values."""
        key: Tensor | None = None
        for rows in chunks(tokens, size):
            x = source(rows)
            if x.shape[1] == tokens:
                return KeyValue(self._turned(self.to_k, self.k_norm, x, rope, rows), self.to_v(x))
            if key is None:
                shape = (x.shape[0], tokens, self.k_norm.weight.shape[0])
                key, value = x.new_empty(shape), x.new_empty(shape)
            key[:, rows] = self._turned(self.to_k, self.k_norm, x, rope, rows)
            value[:, rows] = self.to_v(x)
        assert key is not None
        return KeyValue(key, value)

    def queries(self, x: Tensor, rope: Rope | None, rows: slice) -> Tensor:
        """Project query sources (B, t, C), the tokens `rows` of their sequence, to (B, t, W)."""
        return self._turned(self.to_q, self.q_norm, x, rope, rows)

    def _turned(
        self, project: nn.Module, norm: nn.RMSNorm, x: Tensor, rope: Rope | None, rows: slice
    ) -> Tensor:
        projected = project(x)
        if rope is None:
            return rms_norm(projected, self.eps, norm.weight)
        first, weight = rows.start or 0, norm.weight.float()

        def turn(part: slice) -> Tensor:
            wide = rms_norm(projected[:, part].float(), self.eps, weight)  # turned in fp32 anyway
            turned = rope.rotate(wide, slice(first + part.start, first + part.stop))
            return turned.to(projected.dtype)

        return map_rows(turn, projected.shape[1], ROTATED_CHUNK)

    def output(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Gate the mixed values (B, t, W) by their query sources (B, t, C) and project them out."""
        if self.to_gate_logits is not None:
            gates = 2 * torch.sigmoid(self.to_gate_logits(x))
            mixed = (mixed.unflatten(-1, (self.heads, -1)) * gates[..., None]).flatten(2)
        out: Tensor = self.to_out(mixed)
        return out

    def forward(
        self,
        x: Tensor,
        kv: KeyValue,
        rope: Rope | None = None,
        rows: slice = slice(None),
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend from query sources x (B, t, C) to a prepared sequence; returns (B, t, C)."""
        return self.output(x, attention(self.queries(x, rope, rows), kv, self.heads, bias))


class FeedForward(nn.Module):
    """Two linears with a tanh-approximated GELU between them; not gated."""

    def __init__(self, width: int, multiple: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, multiple * width, bias=bias)
        self.down = nn.Linear(multiple * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, t, C) to (B, t, C)."""
        hidden = self.up(x)
        if torch.is_grad_enabled():
            hidden = F.gelu(hidden, approximate="tanh")
        else:  # the widest activation of a block exists once, not twice
            torch.ops.aten.gelu_(hidden, approximate="tanh")
        out: Tensor = self.down(hidden)
        return out


class RowPieces(nn.Module):
    """A Linear cut along its outputs into Linears that are needed one after the other.

    It takes the place of one too large to be held whole: the text projection has 2.3 GB.
    """

    def __init__(self, pieces: nn.ModuleList) -> None:
        super().__init__()
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        return self.all([x])[0]

    def all(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Map several inputs while each piece is there once."""
        parts = [[piece(x) for x in inputs] for piece in self.pieces]
        return [torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True)]


def apply_to_all(linear: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Map each input (..., K) by a Linear, or by one in pieces, to (..., N)."""
    return linear.all(inputs) if isinstance(linear, RowPieces) else [linear(x) for x in inputs]
