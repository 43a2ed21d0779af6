"""How convolutions begin: torch's default shrinks signals until nothing is learned."""

import math

import torch
from torch import Tensor, nn


def start(conv: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Initialise a convolution by the number of values that it sums up; its bias is zero."""
    assert isinstance(conv.weight, Tensor)
    with torch.no_grad():
        noise = torch.randn(conv.weight.shape, generator=generator)
        conv.weight.copy_(noise * gain / math.sqrt(conv.weight[0].numel()))
        if isinstance(conv.bias, Tensor):
            conv.bias.zero_()
