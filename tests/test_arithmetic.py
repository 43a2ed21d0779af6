"""Linears that multiply codes: every format, every tail, low-rank terms, against fp64."""

import pytest
import torch
import torch.nn.functional as F
from test_low_rank import BASES, base_of, normal, term, weight_of
from torch import Tensor

from ltxlite.arithmetic import Arithmetic, Fp8, Fp16, Int8
from ltxlite.linear import QuantLinear
from ltxlite.low_rank import LowRankLinear
from ltxlite.math_mode import as_stored
from ltxlite.models.activation import Activation, Gated, Normed, Tail, Vectors, project
from ltxlite_quant import FORMATS
from ltxlite_quant.encode_scaled import quantize_scaled

# Relative errors of products. fp16: both sides keep 11 bits, sums are fp32. fp8: 4 bits on one side
# or both, 2.6 % each. int8: rows of 96 and 256 (no whole group to turn, and one) of a Gaussian are
# off by absmax / 127 / sqrt(12), 0.7 to 0.9 % of their norm, on both sides: 1.3 %.
LIMITS = {Int8: 0.016, Fp16: 5e-4, Fp8: 0.045}
CLOSE = LIMITS[Int8]


def coded(kind: str, rows: int, columns: int, arithmetic: Arithmetic | None = None) -> QuantLinear:
    base = base_of(kind, rows, columns)
    linear = base if isinstance(base, QuantLinear) else as_stored(base)
    linear.arithmetic = arithmetic or Int8()
    return linear


def product(linear: QuantLinear, x: Tensor) -> Tensor:
    assert linear.bias is not None
    return x.double() @ weight_of(linear).double().T + linear.bias.double()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@torch.inference_mode()
@pytest.mark.parametrize("columns", [96, 256])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("arithmetic", LIMITS)
def test_products_are_close_for_every_format(
    arithmetic: type[Arithmetic], kind: str, columns: int
) -> None:
    linear, x = coded(kind, 33, columns, arithmetic()), normal(2, 19, columns, seed=3)
    found = project(linear, Activation(x))
    assert found.shape == (2, 19, 33) and found.dtype == x.dtype
    wanted = product(linear, x)
    assert error(found, wanted) < LIMITS[arithmetic]
    # and it is codes that were multiplied
    assert error(found, wanted) > LIMITS[arithmetic] / 20 or arithmetic is Fp16


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "arithmetic"), [("INT8_CONVROT", Int8), ("F8_E4M3_SCALED", Fp8), ("INT8", Int8)]
)
def test_weights_stored_as_codes_are_multiplied_as_they_lie(
    kind: str, arithmetic: type[Arithmetic], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = QuantLinear(quantize_scaled(normal(33, 256), FORMATS[kind]), normal(33, seed=1))
    linear.arithmetic, x = arithmetic(), normal(1, 19, 256, seed=3)
    wanted = product(linear, x)
    if kind != "INT8":  # which is not rotated: decoded, turned and rounded again
        monkeypatch.setattr(QuantLinear, "decoded", None)
    assert error(project(linear, Activation(x)), wanted) < LIMITS[arithmetic]


@torch.inference_mode()
def test_weights_in_pieces_give_the_bits_of_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from ltxlite_kernels import int8_weight

    x = Activation(normal(1, 7, 256, seed=3))
    for kind in BASES:
        linear = coded(kind, 600, 256)
        whole = project(linear, x)
        with monkeypatch.context() as patch:
            patch.setattr(int8_weight, "SCRATCH_BYTES", 256 * 256)
            patch.setattr("ltxlite.linear.SCRATCH_BYTES", 256 * 512)
            assert torch.equal(project(linear, x), whole)


@torch.inference_mode()
def test_chunks_of_tokens_give_the_bits_of_all_tokens() -> None:
    linear, x = coded("Q8_0", 33, 256), normal(1, 19, 256, seed=3)
    whole = project(linear, Normed(x, 1e-6))
    parts = [project(linear, Normed(x[:, rows], 1e-6)) for rows in (slice(0, 6), slice(6, 19))]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@torch.inference_mode()
@pytest.mark.parametrize("samples", [1, 2])
def test_tails_are_applied_to_rows_where_they_lie(samples: int) -> None:
    linear, x = coded("Q8_0", 40, 64), normal(samples, 5, 64, seed=3)
    residual = normal(samples, 11, 40, seed=4)
    gate = Vectors(normal(3, 40, seed=5), torch.arange(samples * 5).view(samples, 5) % 3)
    plain = project(linear, Activation(x))
    wanted = residual.clone()
    wanted[:, 2:7] += plain * gate.spread()
    kept = residual.clone()
    out = project(linear, Activation(x), Tail(gate=gate, residual=kept[:, 2:7]))
    # Two samples' rows have no flat view where they are chunks: then the result is made apart.
    assert torch.allclose(kept, wanted, atol=1e-5, rtol=0) and torch.equal(out, kept[:, 2:7])
    gelu = project(linear, Activation(x), Tail(gelu=True))
    assert torch.allclose(gelu, F.gelu(plain, approximate="tanh"), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_norm_modulation_and_gates_are_rounded_with_the_rows() -> None:
    linear, x = coded("F32", 40, 256), normal(2, 5, 256, seed=3) * 3
    table = normal(2, 256, seed=6) * 0.3
    shift = Vectors(table, torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]]))
    scale = Vectors(-table, shift.index)
    given = Normed(x, 1e-6, shift, scale)
    assert error(project(linear, given), product(linear, given.values())) < CLOSE
    gated = Gated(x, normal(2, 5, 4, seed=7))
    assert error(project(linear, gated), product(linear, gated.values())) < CLOSE


@torch.inference_mode()
@pytest.mark.parametrize("method", ["beside", "merged"])
@pytest.mark.parametrize("kind", ["Q8_0", "F8_E4M3", "BF16"])
@pytest.mark.parametrize("arithmetic", LIMITS)
def test_low_rank_terms_join_coded_weights(
    arithmetic: type[Arithmetic], kind: str, method: str
) -> None:
    base, x = coded(kind, 33, 96, arithmetic()), normal(1, 19, 96, seed=3)
    low = term(33, 96, rank=3, scale=0.5)
    linear = LowRankLinear(base, [low])
    linear.method = method  # type: ignore[assignment]
    residual = normal(1, 19, 33, seed=8)
    delta = x.double() @ (low.b.double() @ low.a.double()).T * low.scale
    wanted = product(base, x) + delta + residual.double()
    found = project(linear, Activation(x), Tail(residual=residual.clone()))
    assert error(found, wanted) < LIMITS[arithmetic]
    linear.strengths = [0.0]
    alone = project(base, Activation(x), Tail(residual=residual.clone()))
    assert torch.equal(project(linear, Activation(x), Tail(residual=residual.clone())), alone)


def test_gradients_are_those_of_values() -> None:
    linear, x = coded("F32", 33, 96), normal(1, 5, 96, seed=3).requires_grad_()
    with torch.enable_grad():
        project(linear, Activation(x)).sum().backward()
    assert x.grad is not None
    wanted = weight_of(linear).sum(0)
    assert torch.allclose(x.grad, wanted.expand_as(x.grad), atol=1e-4)
