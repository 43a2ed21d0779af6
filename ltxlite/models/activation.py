"""Rows on their way into linear layers, and what becomes of the layers' results.

A network says what rows are (normalised, modulated, gated) and which linear reads them; each form
that a linear's arithmetic wants of them, values or codes with a scale a row, is made once, and by
one kernel from what lies before it. On a card a video token's row of 4096 then moves 12 KB through
norm, modulation and rounding, not 60.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite_kernels.coding import Coding
from ltxlite_kernels.gate_heads import gate_heads, gate_heads_quantize
from ltxlite_kernels.norm_modulate import norm_modulate
from ltxlite_kernels.quantize import norm_modulate_quantize, quantize_rows
from ltxlite_kernels.rotate import HAVE_TRITON
from ltxlite_kernels.rows import Epilogue, ScaledRows


def fuses(x: Tensor) -> bool:
    """Tell whether fused kernels take x; meta stands for the card. None of them has gradients."""
    if torch.is_grad_enabled():
        return False
    return HAVE_TRITON if x.is_cuda else x.is_meta


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


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """A vector for every row of a sequence, held once per distinct one.

    table: (U, C).  index: (B, t), or (B, 1) where a sample's rows share one; None if U is 1.
    """

    table: Tensor
    index: Tensor | None = None

    @classmethod
    def of_samples(cls, vectors: Tensor) -> "Vectors":
        """Take one vector a sample, or one for all: (B or 1, 1, C)."""
        count = len(vectors)
        index = torch.arange(count, device=vectors.device)[:, None] if count > 1 else None
        return cls(vectors[:, 0], index)

    def spread(self) -> Tensor:
        """Return (B, t or 1, C) to compute with."""
        return self.table[:, None] if self.index is None else self.table[self.index]

    def flat_index(self, batch: int, tokens: int) -> Tensor | None:
        """Return the row of the table for each of B * t rows, int32, as kernels take it."""
        if self.index is None:
            return None
        return self.index.to(torch.int32).expand(batch, tokens).flatten()


class Activation:
    """Rows (B, t, K) for some linears; forms of them are made when asked for, and kept.

    moments: (t,) or (1,), the moment of the clip that each row belongs to, for linears that change
    over its time (`passes.Moments`); None where none does.
    """

    __slots__ = ("_coded", "_values", "moments", "x")

    def __init__(self, x: Tensor, moments: Tensor | None = None) -> None:
        self.x, self.moments = x, moments
        self._values: Tensor | None = None
        self._coded: dict[Coding, ScaledRows] = {}

    def values(self) -> Tensor:
        """Return them as (B, t, K) in x's dtype."""
        if self._values is None:
            self._values = self._valued()
        return self._values

    def coded(self, coding: Coding) -> ScaledRows:
        """Return them as rows of codes (B * t, K)."""
        if coding not in self._coded:
            self._coded[coding] = self._rounded(coding)
        return self._coded[coding]

    def _valued(self) -> Tensor:
        return self.x

    def _rounded(self, coding: Coding) -> ScaledRows:
        return quantize_rows(self.x.flatten(0, 1), coding)


class Normed(Activation):
    """Rows divided by their root mean square, then modulated: norm(x) * (1 + scale) + shift."""

    __slots__ = ("eps", "scale", "shift")

    def __init__(
        self,
        x: Tensor,
        eps: float,
        shift: Vectors | None = None,
        scale: Vectors | None = None,
        moments: Tensor | None = None,
    ) -> None:
        super().__init__(x, moments)
        self.eps, self.shift, self.scale = eps, shift, scale

    def _valued(self) -> Tensor:
        if fuses(self.x):
            return norm_modulate(*self._flat(), self.eps).view(self.x.shape)
        normed = rms_norm(self.x, self.eps)
        if self.shift is None or self.scale is None:
            return normed
        return modulate(normed, self.shift.spread(), self.scale.spread())

    def _rounded(self, coding: Coding) -> ScaledRows:
        return norm_modulate_quantize(*self._flat(), self.eps, coding)

    def _flat(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return rows, shift, scale and index as kernels take them."""
        x = self.x.flatten(0, 1)
        if self.shift is None or self.scale is None:
            return x, None, None, None
        return x, self.shift.table, self.scale.table, self.shift.flat_index(*self.x.shape[:2])


class Gated(Activation):
    """Heads' outputs (B, t, H * D), each doubled or closed by 2·sigmoid of its logit (B, t, H).

    The outputs are used up: on a card their memory takes the result.
    """

    __slots__ = ("logits",)

    def __init__(self, x: Tensor, logits: Tensor, moments: Tensor | None = None) -> None:
        super().__init__(x, moments)
        self.logits = logits

    def _valued(self) -> Tensor:
        if fuses(self.x):
            return gate_heads(self.x.flatten(0, 1), self.logits.flatten(0, 1)).view(self.x.shape)
        gates = 2 * torch.sigmoid(self.logits)
        heads = self.x.unflatten(-1, (gates.shape[-1], -1))
        gated: Tensor = (heads * gates[..., None]).flatten(2)
        return gated

    def _rounded(self, coding: Coding) -> ScaledRows:
        return gate_heads_quantize(self.x.flatten(0, 1), self.logits.flatten(0, 1), coding)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """What becomes of a linear's result: GELU (tanh form), times a gate, plus a residual.

    residual: (B, t, N); without gradients the sum is written over it.
    """

    gelu: bool = False
    gate: Vectors | None = None
    residual: Tensor | None = None

    def applied(self, y: Tensor) -> Tensor:
        """Return the end of a result (B, t, N) that exists already, which may be overwritten."""
        recorded = torch.is_grad_enabled()
        if self.gelu:  # the widest activation of a block exists once, not twice
            if recorded:
                y = F.gelu(y, approximate="tanh")
            else:
                torch.ops.aten.gelu_(y, approximate="tanh")
        if self.gate is not None:
            gate = self.gate.spread()
            if self.residual is None:
                return y * gate
            # One pass over the residual instead of two: 2 % of a step on a CPU.
            if recorded:
                return torch.addcmul(self.residual, y, gate)
            return self.residual.addcmul_(y, gate)
        if self.residual is None:
            return y
        return self.residual + y if recorded else self.residual.add_(y)

    def flat(self) -> Tensor | None:
        """Return the residual as (B * t, N) of the same memory; None if there is no such view."""
        if self.residual is None:
            return None
        batch, tokens, width = self.residual.shape
        whole = batch == 1 or self.residual.stride(0) == tokens * self.residual.stride(1)
        return self.residual.view(batch * tokens, width) if whole else None

    def epilogue(self, batch: int, tokens: int) -> Epilogue:
        """Return the tail as a matmul takes it; the residual must have a flat view, or be None."""
        if self.gate is None:
            return Epilogue(self.gelu, residual=self.flat())
        index = self.gate.flat_index(batch, tokens)
        return Epilogue(self.gelu, self.gate.table, index, self.flat())


PLAIN = Tail()


class Multiplier(nn.Module):
    """A linear that may compute with codes of its input instead of values."""

    @property
    @abstractmethod
    def codes(self) -> bool:
        """Whether it does."""

    @property
    def varies(self) -> bool:
        """Whether it is another one at other moments of a clip."""
        return False

    @abstractmethod
    def multiply(self, given: Activation, tail: Tail) -> Tensor:
        """Return tail(given Wᵀ + bias), (B, t, N)."""


def project(linear: nn.Module, given: Activation, tail: Tail = PLAIN) -> Tensor:
    """Return tail(linear(given)), (B, t, N), the way the linear computes."""
    if isinstance(linear, Multiplier) and not torch.is_grad_enabled():
        varies = given.moments is not None and linear.varies
        if linear.codes or varies:
            return linear.multiply(given, tail)
    y: Tensor = linear(given.values())
    return tail.applied(y)
