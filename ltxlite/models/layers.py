"""What transformer and connectors share: chunks of tokens, vectors a timestep, feed-forward.

Everything that works row by row is computed in chunks of tokens, and residuals are added in place,
so that a block holds about three hidden states (x, keys, values) instead of ten. With gradients
enabled the same functions run unchunked and out of place.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltxlite.models.activation import PLAIN, Activation, Tail, Vectors, project

TOKEN_CHUNK = 2048  # rows of a 4096-wide feed-forward then hold 64 MiB in bf16


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Cut 0..tokens into slices of at most `size`; a single one while gradients are recorded."""
    if torch.is_grad_enabled():
        yield slice(0, tokens)
        return
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def add_rows(x: Tensor, update: Callable[[slice, Tensor], Tensor], size: int) -> Tensor:
    """Return x (B, T, C) after `update(rows, x[:, rows])` of every chunk of rows.

    An update returns what it was given plus something. Without gradients that is in place, and it
    may read its own rows of x only: others may have been overwritten.
    """
    if torch.is_grad_enabled():
        return update(slice(0, x.shape[1]), x)
    for rows in chunks(x.shape[1], size):
        update(rows, x[:, rows])
    return x


def add_run(
    x: Tensor, update: Callable[[slice, Tensor], Tensor], run: tuple[int, int], size: int
) -> None:
    """Do the same in place to rows start..stop-1 alone; without gradients."""
    for rows in chunks(run[1] - run[0], size):
        part = slice(run[0] + rows.start, run[0] + rows.stop)
        update(part, x[:, part])


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
class TokenRows:
    """Vectors held once per distinct timestep and looked up per token.

    rows: (U, n, C).  index: (B, T), or (B, 1) where all tokens of a sample share one timestep.
    A clip has one to three distinct timesteps; per-token AdaLN of 1920x1088x121 would be 2.3 GiB.
    """

    rows: Tensor
    index: Tensor

    def vectors(self, number: int, tokens: slice) -> Vectors:
        """Return vector `number` of some tokens."""
        if len(self.rows) == 1:
            return Vectors(self.rows[:, number])  # a view: nothing to look up
        index = self.index if self.index.shape[1] == 1 else self.index[:, tokens]
        return Vectors(self.rows[:, number], index)

    def plus(self, table: Tensor, dtype: torch.dtype) -> "TokenRows":
        """Add a learned table (n, C), kept in fp32 in the files, to every row."""
        return TokenRows((self.rows + table).to(dtype), self.index)


class FeedForward(nn.Module):
    """Two linears with a tanh-approximated GELU between them; not gated."""

    def __init__(self, width: int, multiple: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, multiple * width, bias=bias)
        self.down = nn.Linear(multiple * width, width, bias=bias)

    def forward(self, given: Activation, tail: Tail = PLAIN) -> Tensor:
        """Map (B, t, C) to tail (B, t, C)."""
        hidden = project(self.up, given, Tail(gelu=True))
        return project(self.down, Activation(hidden, given.moments), tail)


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
