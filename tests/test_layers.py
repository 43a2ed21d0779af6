"""The shared layers on their lean paths: as exact as the plain formulas, gradients or not."""

import math

import pytest
import torch

from ltxlite.models.activation import Activation, Tail, Vectors, rms_norm
from ltxlite.models.attention import ROTATED_CHUNK, Attention, AttentionShape
from ltxlite.models.layers import FeedForward, add_rows
from ltxlite.models.rope import RopeSpec, rope_table


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm_equals_the_formula_in_float64(dtype, weighted):
    x = randn(2, 63, 129).mul(3).to(dtype)
    x[0, 5] = 0
    x[1, 7] *= 1e-3  # where eps matters
    kept = x.clone()
    weight = (1 + 0.1 * randn(129, seed=1)).to(dtype) if weighted else None
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact * weight.double() if weight is not None else exact
    actual = rms_norm(x, 1e-6, weight)
    assert actual.dtype == dtype and torch.equal(x, kept)
    # Half an ulp of the result for the last rounding, and a few fp32 roundings before it.
    ulp = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    assert ((actual.double() - exact).abs() <= ulp * exact.abs() + 1e-30).all()


def test_rms_norm_has_the_same_gradient_path_as_torch():
    x = randn(3, 17).requires_grad_()
    with torch.enable_grad():
        rms_norm(x, 1e-6).square().sum().backward()
    # sum(x²/mean(x²)) is C for every row whatever x is, so its gradient vanishes but for eps.
    assert x.grad is not None and x.grad.abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["split", "interleaved"])
def test_a_factored_table_equals_the_angles_of_every_token(layout):
    # Width 26 and three axes: 4 frequencies an axis, one identity angle in front.
    spec = RopeSpec(26, 1, (20, 64, 48), layout=layout)
    times, rows, columns = torch.tensor([0.02, 3.5]), torch.arange(5) * 8.0, torch.arange(3) * 4.0
    grid = torch.stack(torch.meshgrid(times, rows, columns, indexing="ij")).flatten(1)
    positions = torch.stack([grid, grid.flip(1)])  # (2, 3, 30): every value many times
    rope = rope_table(positions, spec)
    assert rope.cosines.shape[0] == 2 + 5 + 3
    for sample, token in ((0, 0), (0, 17), (1, 29)):
        angles = [0.0]
        for frequency in range(4):
            omega = math.pi / 2 * 10000.0 ** (frequency / 3)
            for axis, limit in enumerate(spec.max_positions):
                fraction = float(positions[sample, axis, token]) / limit
                angles.append(omega * (2 * fraction - 1))
        if layout == "interleaved":
            angles = [angle for angle in angles for _ in range(2)]
        # fp32 angles of up to 1.6e4 rad are off by up to an ulp, 1e-3; low ones are exact.
        cos, sin = rope.cos[sample, token].flatten(), rope.sin[sample, token].flatten()
        for index, angle in enumerate(angles):
            tolerance = 1e-6 + 2e-7 * abs(angle)
            assert abs(cos[index].item() - math.cos(angle)) < tolerance
            assert abs(sin[index].item() - math.sin(angle)) < tolerance


def test_queries_of_many_chunks_equal_those_rotated_at_once():
    tokens, start = ROTATED_CHUNK + 75, 38  # two uneven parts, in the middle of a sequence
    module = Attention(AttentionShape(24, 24, 24, 3, gated=False))
    rope = rope_table(torch.arange(start + tokens + 9.0)[None, None], RopeSpec(24, 3, (4096,)))
    x = randn(2, tokens, 24)
    rows = slice(start, start + tokens)
    whole = rope.rotate(module.q_norm(module.to_q(x)), rows)
    # Another summation order in the norm: a few fp32 roundings at magnitude 4.
    assert torch.allclose(module.queries(Activation(x), rope, rows), whole, atol=4e-6, rtol=0)
    kv = module.keys_values(lambda part: Activation(x[:, part]), tokens, rope, 200)
    key = rope.rotate(module.k_norm(module.to_k(x)), slice(0, tokens))
    assert torch.allclose(kv.key, key, atol=4e-6, rtol=0)
    assert torch.allclose(kv.value, module.to_v(x), atol=4e-6, rtol=0)


def test_gated_rows_are_added_in_place_without_gradients_and_anew_with_them():
    x, gate = randn(1, 7, 5), randn(1, 1, 5, seed=1)
    expected = x + x * 2 * gate  # an update reads its own rows before they change

    def update(rows: slice, residual: torch.Tensor) -> torch.Tensor:
        return Tail(gate=Vectors.of_samples(gate), residual=residual).applied(x[:, rows] * 2)

    with torch.enable_grad():
        fresh = add_rows(x, update, 3)
    assert fresh is not x
    added = add_rows(x, update, 3)
    assert added is x
    for result in (fresh, added):  # one rounding of the fused product
        assert torch.allclose(result, expected, atol=1e-6, rtol=0)


def test_feed_forward_leaves_its_input_alone_and_has_gradients():
    module, x = FeedForward(6), randn(1, 5, 6)
    kept = x.clone()
    plain = module(Activation(x))
    assert torch.equal(x, kept)
    with torch.enable_grad():
        recorded = module(Activation(x))
        recorded.sum().backward()
    assert torch.equal(plain, recorded.detach())
    assert module.up.weight.grad is not None
