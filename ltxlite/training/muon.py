"""Muon: steps whose matrices turn all directions equally far.

Single frames pass 18 dB after 215 steps, with AdamW after 1230 (docs/log.md). torch.optim has one
since 2.9, for matrices alone; kernels of convolutions are taken as matrices here: one row
for each channel that comes out.
Source: Jordan et al., Muon (2024): the quintic iteration and its three numbers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # drives singular values into 0.7 to 1.2 within five rounds
_ROUNDS = 5
_TINY = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose sum is made orthogonal before it is taken; for parameters of 2 axes and more.

    The first axis is a matrix's rows, all others its columns.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; parameters without gradients stay."""
        for group in self.param_groups:
            kept = group["momentum"]
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                mean = state.setdefault("exp_avg", torch.zeros_like(value))
                mean.lerp_(value.grad, 1 - kept)
                ahead = value.grad.lerp(mean, kept).flatten(1)
                longer = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                value.sub_(orthogonal(ahead).view_as(value), alpha=group["lr"] * longer)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix (N, K) with its singular values near 1 and its singular vectors kept."""
    first, third, fifth = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    # Products of 16 bits suffice: 1 is only approached.
    x: Tensor = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + _TINY)
    for _ in range(_ROUNDS):
        square = x @ x.T
        x = first * x + (third * square + fifth * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)
