"""What int8 matmuls cost in accuracy, beside the same GGUF weights in bf16.

Errors are of outputs, relative, against fp32 weights before quantization and fp32 activations.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from weight_samples import weight_samples

from ltxlite_kernels import int8_weight
from ltxlite_kernels.matmul_int8 import matmul_int8
from ltxlite_kernels.quantize import quantize_rows
from ltxlite_kernels.rotate import Rotation
from ltxlite_quant import FORMATS, QuantTensor
from ltxlite_quant.search import quantize

ROWS, FEATURES, COLUMNS = 96, 96, 1024
# Of the issue: int8 with rotation over bf16; measured at most 1.02, 1.06, 1.20.
RATIOS = {"Q4_K": 1.1, "Q5_K": 1.2, "Q6_K": 1.5}
LARGEST = {"Q8_0": 0.03}  # measured at most .016
WEIGHTS = ("gaussian", "laplace", "t4", "outlier channels")


@cache
def weights(kind: str) -> Tensor:
    if kind != "outlier channels":
        return weight_samples(FEATURES, COLUMNS)[kind]
    return with_outliers(weight_samples(FEATURES, COLUMNS, seed=1)["gaussian"] * 0.02, 8)


@cache
def quantized(kind: str, name: str) -> QuantTensor:
    return quantize(weights(kind), FORMATS[name])


def with_outliers(x: Tensor, factor: float) -> Tensor:
    """Multiply one channel of a hundred."""
    chosen = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(2))
    x = x.clone()
    x[:, chosen[: COLUMNS // 100]] *= factor
    return x


def activations() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, COLUMNS, generator=random)
    spread = (torch.randn(COLUMNS, generator=random) / 2).exp()
    return {
        "gaussian": x,
        "spread": x * spread,
        "outliers of 8": with_outliers(x, 8),
        "outliers of 30": with_outliers(x, 30),
        "gelu": F.gelu(2 * x * spread),
    }


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def errors(weight: str, name: str, x: Tensor, rotation: Rotation) -> tuple[float, float]:
    """Return the errors of bf16 and of int8 arithmetic."""
    quant = quantized(weight, name)
    exact = x.double() @ weights(weight).double().T
    plain = F.linear(x.bfloat16(), quant.dequantize(torch.bfloat16))
    rows = int8_weight.int8_rows(quant.blocks, quant.format, COLUMNS, rotation)
    found = matmul_int8(quantize_rows(x.bfloat16(), rotation), rows)
    return error(plain, exact), error(found, exact)


@pytest.mark.parametrize("rotation", [Rotation.SIGNS_128, Rotation.REGULAR_256])
@pytest.mark.parametrize("name", [*RATIOS, *LARGEST])
def test_int8_with_rotation_costs_little_accuracy(name, rotation):
    for weight in WEIGHTS:
        for kind, x in activations().items():
            plain, found = errors(weight, name, x, rotation)
            limit = RATIOS[name] * plain if name in RATIOS else LARGEST[name]
            assert found <= limit, f"{weight}, {kind}: {found:.4f}, bf16 {plain:.4f}"


def test_without_rotation_outliers_would_break_the_limits():
    plain, found = errors("gaussian", "Q6_K", activations()["outliers of 30"], Rotation.NONE)
    assert found > RATIOS["Q6_K"] * plain
