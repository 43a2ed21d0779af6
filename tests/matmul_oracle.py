"""The product of rows of codes and all that may follow it, in float64; and inputs for it."""

import torch
import torch.nn.functional as F
from test_kernels_quantize import randoms
from torch import Tensor

from ltxlite_kernels.rows import Epilogue, ScaledRows

# Rounding to the dtype of the result; fp32 itself adds 2^-24 for each of a handful of operations
# and, of GELU, the fast exponential's 2 ULPs.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}
ENDINGS = ("gelu", "shared", "own", "index", "residual")


def _sides(a: ScaledRows, w: ScaledRows | Tensor) -> tuple[Tensor, Tensor]:
    values = [a.codes.cpu().double() * a.scales.cpu().double()[:, None]]
    if isinstance(w, ScaledRows):
        values.append(w.codes.cpu().double() * w.scales.cpu().double()[:, None])
    else:
        values.append(w.cpu().double())
    return values[0], values[1]


def exact(a: ScaledRows, w: ScaledRows | Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    """Compute the product and its epilogue in float64."""
    left, right = _sides(a, w)
    y = left @ right.T
    if bias is not None:
        y = y + bias.cpu().double()
    if epilogue.gelu:
        y = F.gelu(y, approximate="tanh")
    if epilogue.gate is not None:
        gate = epilogue.gate.cpu().double()
        y = y * (gate if epilogue.index is None else gate[epilogue.index.cpu().long()])
    if epilogue.residual is not None:
        y = y + epilogue.residual.cpu().double()
    return y


def magnitude(a: ScaledRows, w: ScaledRows | Tensor) -> Tensor:
    """Return |a| |w|ᵀ in float64, to which roundings of partial sums are relative."""
    left, right = _sides(a, w)
    return left.abs() @ right.abs().T


def epilogue_of(kind: str, rows: int, features: int, dtype: torch.dtype, device: str) -> Epilogue:
    gates = {"own": rows, "index": 3}.get(kind, 1)
    table = randoms(gates, features + 3, seed=5).to(dtype)[:, :features]  # strided
    index = torch.arange(rows, dtype=torch.int32) % 3 if kind == "index" else None
    residual = randoms(rows, features, seed=6).to(dtype)
    return Epilogue(
        gelu=kind == "gelu",
        gate=table.to(device) if kind in ("shared", "own", "index") else None,
        index=None if index is None else index.to(device),
        residual=residual.to(device) if kind != "gelu" else None,
    )


def assert_close(found: Tensor, wanted: Tensor, slack: float | Tensor = 0.0) -> None:
    """Compare with float64: a rounding of each value to its dtype, and slack beside."""
    tolerance = ROUNDING[found.dtype] * wanted.abs() * 1.01 + slack
    assert ((found.cpu().double() - wanted).abs() <= tolerance).all()
