"""Low-rank terms (LoRA) on linears of any format: computed beside them or merged as they decode.

The base weight is never rewritten; strengths may change between two calls, and between rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.arithmetic import Operands, Pieces
from ltxlite.errors import ShapeError
from ltxlite.linear import QuantLinear, row_pieces
from ltxlite.low_rank_cost import LowRankWork
from ltxlite.models.activation import PLAIN, Activation, Multiplier, Tail

Method = Literal["auto", "beside", "merged"]


@dataclass(frozen=True, slots=True, eq=False)
class LowRankTerm:
    """A low-rank addition to a weight: scale * B A.

    a: (r, K).  b: (N, r).  scale: the file's own factor (alpha / r, or 1).  source, module: the
    file and its name of the layer, for messages.
    """

    a: Tensor
    b: Tensor
    scale: float
    source: str
    module: str = ""

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ShapeError(
                f"{self.where}: low-rank factors A (r, K) and B (N, r) must share r, "
                f"got {tuple(self.a.shape)} and {tuple(self.b.shape)}"
            )

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def where(self) -> str:
        """File and layer."""
        return f"{self.source}: {self.module}" if self.module else self.source

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Raise ShapeError unless B A has the shape of a weight (N, K)."""
        mine = (self.b.shape[0], self.a.shape[1])
        if mine != shape:
            raise ShapeError(
                f"{self.where}: a low-rank term for a weight of {mine} does not fit one of "
                f"{shape}; it was made for another model"
            )


@dataclass(frozen=True, slots=True, eq=False)
class OverTime:
    """How a term's strength changes over a clip.

    factors: (M,) fp32 on the device, by moment.  mean: over the clip, for rows of no moment: what
    a linear makes of noise levels.
    """

    factors: Tensor
    mean: float


@dataclass(frozen=True, slots=True, eq=False)
class _Active:
    """A term that is on in this call, its factors in the dtype of the input.

    by_row: (t, 1) or (1, 1), what the factor is multiplied with, where it differs by row.
    """

    a: Tensor
    b: Tensor
    factor: float
    by_row: Tensor | None = None


class LowRankLinear(Multiplier):
    """A Linear or QuantLinear plus low-rank terms whose strengths may change between calls.

    y = base(x) + sum strength * scale * (x Aᵀ) Bᵀ.  Each call takes the cheaper of two ways
    (`low_rank_cost`), unless `method` names one.  `strengths` is a plain list, one number a term;
    a term of strength 0 costs nothing.  `times`: how each changes over a clip, None for not at
    all; one that does is computed beside, where rows say what moment they are of.
    Buffers: a0 (r, K), b0 (N, r), a1, b1, ... in the dtype and, where it is mapped, the memory of
    their file: joined in advance, a second LoRA beside the distilled one would take 8 GB of RAM.
    """

    def __init__(self, base: nn.Linear | QuantLinear, terms: Sequence[LowRankTerm]) -> None:
        super().__init__()
        self.base = base
        self.method: Method = "auto"
        self.strengths = [1.0] * len(terms)
        self.times: list[OverTime | None] = [None] * len(terms)
        self.scales = [term.scale for term in terms]
        self.sources = [term.source for term in terms]
        for index, term in enumerate(terms):
            term.check_fits((base.out_features, base.in_features))
            self.register_buffer(f"a{index}", term.a.detach())
            self.register_buffer(f"b{index}", term.b.detach())

    @property
    def in_features(self) -> int:
        """K, as in nn.Linear."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """N, as in nn.Linear."""
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N) in x's dtype.  x: (..., K)."""
        return self._forward(x, self._active(x.dtype))

    def _forward(self, x: Tensor, active: list[_Active]) -> Tensor:
        if not active:
            y: Tensor = self.base(x)
            return y
        return self._merged(x, active) if self._merges(x, active) else self._beside(x, active)

    @property
    def codes(self) -> bool:
        """Whether `multiply` is the way to compute: where the base does."""
        return isinstance(self.base, QuantLinear) and self.base.codes

    @property
    def varies(self) -> bool:
        """Whether a term that is on changes over the clip."""
        return any(self.times[number] is not None for number in self._numbers())

    def multiply(self, given: Activation, tail: Tail) -> Tensor:
        """Return tail(given Wᵀ + terms + bias), (B, t, N), by the base's arithmetic."""
        active = self._active(given.x.dtype, given.moments)
        varying = [term for term in active if term.by_row is not None]
        if not varying:
            return self._multiplied(given, tail, active)
        y = self._multiplied(given, PLAIN, [term for term in active if term.by_row is None])
        return tail.applied(self._added(given.values(), y, varying))

    def _multiplied(self, given: Activation, tail: Tail, active: list[_Active]) -> Tensor:
        """Compute with terms that are the same for all rows."""
        base = self.base
        if not isinstance(base, QuantLinear) or base.arithmetic is None:
            return tail.applied(self._forward(given.values(), active))
        if not active:
            return base.multiply(given, tail)
        if self._merges(given.x, active):
            operands = Operands(given, base.bias, self.out_features, tail)
            return base.arithmetic.product(operands, self._coded(base, given.x.dtype, active), base)
        y = base.multiply(given, PLAIN)
        return tail.applied(self._added(given.values(), y, active))

    def _coded(self, base: QuantLinear, dtype: torch.dtype, active: list[_Active]) -> Pieces:
        assert base.arithmetic is not None
        for rows in base.pieces(dtype):
            yield rows, base.arithmetic.coded(self._merged_rows(rows, dtype, active), base)

    def work(self, tokens: int, dtype: torch.dtype) -> LowRankWork:
        """Return what a call with so many rows of input would do, at the present strengths."""
        ranks = [self.get_buffer(f"a{i}").shape[0] for i in self._numbers()]
        return LowRankWork(
            tokens,
            self.in_features,
            self.out_features,
            sum(ranks),
            isinstance(self.base, QuantLinear),
            dtype.itemsize,
            self.codes,
        )

    def idle(self) -> frozenset[str]:
        """Return the names of the factors that are not read at the present strengths."""
        read = self._numbers()
        left = (number for number in range(len(self.sources)) if number not in read)
        return frozenset(f"{factor}{number}" for number in left for factor in "ab")

    def _numbers(self) -> list[int]:
        return [i for i, strength in enumerate(self.strengths) if strength * self.scales[i]]

    def _active(self, dtype: torch.dtype, moments: Tensor | None = None) -> list[_Active]:
        """Return the terms that are on.  moments: (t,) or (1,), those of the rows."""
        return [self._term(number, dtype, moments) for number in self._numbers()]

    def _term(self, number: int, dtype: torch.dtype, moments: Tensor | None) -> _Active:
        a, b = (self.get_buffer(f"{factor}{number}").to(dtype) for factor in "ab")
        strength, times = self.strengths[number] * self.scales[number], self.times[number]
        if times is None:
            return _Active(a, b, strength)
        if moments is None:
            return _Active(a, b, strength * times.mean)
        return _Active(a, b, strength, times.factors[moments, None].to(dtype))

    def _merges(self, x: Tensor, active: list[_Active]) -> bool:
        if self.method != "auto":
            return self.method == "merged"
        if torch.is_grad_enabled():  # the merged weight would be kept for the backward pass
            return False
        return self.work(x.numel() // self.in_features, x.dtype).merging_pays()

    def _beside(self, x: Tensor, active: list[_Active]) -> Tensor:
        return self._added(x, self.base(x), active)

    def _added(self, x: Tensor, y: Tensor, active: list[_Active]) -> Tensor:
        flat, out = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        for term in _joined(active, len(flat)):
            inner = F.linear(flat, term.a)  # (T, r)
            if term.by_row is not None:  # samples have the same moments
                inner.view(len(x), -1, inner.shape[-1]).mul_(term.by_row)
            out.addmm_(inner, term.b.T, alpha=term.factor)
        return out.view(y.shape)

    def _merged(self, x: Tensor, active: list[_Active]) -> Tensor:
        pieces = list(row_pieces(self.out_features, self.in_features * x.element_size()))
        if len(pieces) == 1:
            return self._product(x, active, pieces[0])
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for rows in pieces:
            y[..., rows] = self._product(x, active, rows)
        return y

    def _product(self, x: Tensor, active: list[_Active], rows: slice) -> Tensor:
        bias = self.base.bias
        weight = self._merged_rows(rows, x.dtype, active)
        return F.linear(x, weight, None if bias is None else bias[rows].to(x.dtype))

    def _merged_rows(self, rows: slice, dtype: torch.dtype, active: list[_Active]) -> Tensor:
        weight = self._scratch(rows, dtype)
        for term in active:
            weight.addmm_(term.b[rows], term.a, alpha=term.factor)
        return weight

    def _scratch(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of the base weight in memory of their own."""
        base = self.base
        if not isinstance(base, QuantLinear):
            return base.weight[rows].to(dtype, copy=True)
        decoded = base.decoded(dtype, rows)
        return decoded.clone() if base.format.dtype == dtype else decoded  # plain: maybe a view

    def extra_repr(self) -> str:
        """Return what print(model) shows."""
        ranks = [self.get_buffer(f"a{i}").shape[0] for i in range(len(self.sources))]
        return f"ranks={ranks}, strengths={self.strengths}"


def _joined(active: list[_Active], tokens: int) -> list[_Active]:
    """Join terms to one, so that the output is read and written once, not once a term.

    Their factors go into copies of A. With fewer tokens than ranks the copies are what costs.
    """
    by_row = any(term.by_row is not None for term in active)
    if len(active) == 1 or by_row or tokens < sum(len(term.a) for term in active):
        return active
    a = torch.cat([term.a * term.factor for term in active])
    return [_Active(a, torch.cat([term.b for term in active], dim=1), 1.0)]


def merged_weight(
    weight: Tensor,
    terms: Sequence[LowRankTerm],
    dtype: torch.dtype,
    strengths: Sequence[float] | None = None,
) -> Tensor:
    """Add low-rank terms to a weight, every step rounded to `dtype`.

    weight: (N, K).  strengths: one a term, 1 by default.  Returns W + sum ((B * strength) @ A).
    Raises ShapeError if a term does not fit or the strengths are not one a term.
    Source: LTX-2 400fd31, its bf16 fusion (model.md 6); the deltas of several files are summed
    before they meet the weight.
    """
    strengths = [1.0] * len(terms) if strengths is None else strengths
    if len(strengths) != len(terms):
        raise ShapeError(f"{len(terms)} low-rank terms need as many strengths, got {strengths}")
    if not terms:
        return weight.to(dtype)
    for term in terms:
        term.check_fits(tuple(weight.shape))
    deltas = [
        (term.b.to(dtype) * (strength * term.scale)) @ term.a.to(dtype)
        for term, strength in zip(terms, strengths, strict=True)
    ]
    total = deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(dim=0)
    return weight.to(dtype) + total


@dataclass(frozen=True, slots=True, eq=False)
class LowRankDelta:
    """Terms and their strengths, to be added for good to a weight that is read by rows."""

    terms: tuple[LowRankTerm, ...]
    strengths: tuple[float, ...]

    def added(self, values: Tensor, rows: slice) -> Tensor:
        """Return rows of W + sum strength * scale * B A.  values: those rows of W, (n, K) fp32."""
        for term, strength in zip(self.terms, self.strengths, strict=True):
            a, b = term.a.float(), term.b[rows].float()
            # Never in place: values may be the mapped source.
            values = torch.addmm(values, b, a, alpha=strength * term.scale)
        return values
