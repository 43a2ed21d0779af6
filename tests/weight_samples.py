"""Random weights of the kinds that trained matrices resemble, for quantizers."""

import torch
from torch import Tensor


def weight_samples(rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw (rows, columns) fp32 weights of five kinds."""
    random = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(rows, columns, generator=random)
    uniform = torch.rand(rows, columns, generator=random, dtype=torch.float64) - 0.5
    laplace = -uniform.sign() * (1 - 2 * uniform.abs()).log()
    squares = torch.randn(4, rows, columns, generator=random).square().mean(0)
    channels = torch.randn(columns, generator=random).exp()
    return {
        "gaussian": gaussian,
        "laplace": laplace.float() * 0.02,
        "t4": gaussian / squares.sqrt() * 0.02,
        "channels": gaussian * channels * 0.02,
        "tiny": gaussian * 1e-3,
    }
