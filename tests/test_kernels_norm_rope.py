"""Rows normed over all heads and turned by factorised tables, in place and into slices."""

import math

import pytest
import torch
from kernel_device import kernel_device, run_interpreted
from torch import Tensor

from ltxlite_kernels import norm_rope as kernels
from ltxlite_kernels import reference_rows
from ltxlite_kernels.norm_rope import RopeTables, norm_rope
from ltxlite_quant.formats import FormatError

EPS = 1e-6
# A turned value is a c - b s with |c|, |s| <= 1. Relative to its pair's length it has the
# rounding of the result to its type, half of 2^-7, 2^-10 or 2^-23, and fp32's in eight operations
# and in the sum of squares, whose terms are all positive: well below 2^-19 for rows of 4096.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


@pytest.fixture
def device() -> str:
    return kernel_device()


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(shape: tuple[int, int, int], axes: int, heads: int, half: int) -> RopeTables:
    """Return tables of shape's (B, t) tokens: three positions an axis, angles of any size."""
    samples, tokens, _ = shape
    pad = heads * half % axes
    column = torch.arange(heads * half)
    angles = randoms(3 * axes, heads * half, seed=1) * 1000
    owner = torch.where(column < pad, 0, (column - pad) % axes)
    own = owner == torch.arange(axes).repeat_interleave(3)[:, None]
    cosines, sines = angles.cos() * own, angles.sin() * own
    cosines[:3, :pad], sines[:, :pad] = 1.0, 0.0
    chosen = torch.randint(3, (samples, tokens, axes), generator=torch.Generator().manual_seed(2))
    index = (chosen + 3 * torch.arange(axes)).int()
    return RopeTables(*(one.view(-1, heads, half) for one in (cosines, sines)), index)


def moved(rope: RopeTables, device: str) -> RopeTables:
    return RopeTables(rope.cosines.to(device), rope.sines.to(device), rope.index.to(device))


def exact(x: Tensor, weight: Tensor, rope: RopeTables | None) -> tuple[Tensor, Tensor]:
    """Return rows turned as complex numbers in float64, and the length of each value's pair."""
    wide = x.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    if rope is None:
        return wide, wide.abs()
    turn = torch.complex(rope.cosines.double(), rope.sines.double())[rope.index.long()].sum(2)
    first, second = wide.unflatten(-1, (turn.shape[2], 2, -1)).unbind(-2)
    turned = torch.complex(first, second) * turn
    pair = torch.stack([turned.real, turned.imag], dim=-2).flatten(-3)
    length = turned.abs()
    return pair, torch.stack([length, length], dim=-2).flatten(-3)


def assert_near(found: Tensor, x: Tensor, weight: Tensor, rope: RopeTables | None) -> None:
    wanted, length = exact(x, weight, rope)
    smallest = torch.finfo(found.dtype).smallest_normal  # below it fp16 loses more
    off = (found.cpu().double() - wanted).abs() / (length + smallest)
    assert float(off.max()) <= ROUNDING[found.dtype] + 2**-19


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("heads", "half", "axes"), [(3, 64, 3), (5, 32, 1), (2, 6, 3), (1, 1, 1), (32, 64, 3)]
)
def test_kernel_norms_and_turns_rows(device, dtype, heads, half, axes):
    width = 2 * heads * half
    x = (randoms(2, 7, width + 16) * 50).to(dtype)[:, 1:, :width]  # rows and samples lie apart
    weight = randoms(width, seed=3).to(dtype)
    rope = tables((1, 6, axes), axes, heads, half)
    found = norm_rope(x.to(device), weight.to(device), moved(rope, device), EPS)
    assert found.dtype == dtype and found.is_contiguous()
    assert_near(found, x, weight, rope)
    twin = reference_rows.norm_rope(x, weight, rope, EPS)
    # The twin may round the other way: twice a rounding apart.
    assert_near(twin, x, weight, rope)


def test_kernel_turns_each_sample_by_its_own_index_into_a_slice(device, monkeypatch):
    monkeypatch.setattr(kernels, "ROPE_LOOPED", 1)  # a program takes four tokens, the last three
    heads, half, tokens = 2, 32, 11
    x, weight = randoms(2, tokens, 128, seed=4).bfloat16(), randoms(128, seed=5)
    rope = tables((2, tokens + 5, 3), 3, heads, half).rows(slice(2, 2 + tokens))
    whole = torch.full((2, tokens + 9, 128), torch.nan, dtype=torch.bfloat16, device=device)
    part = whole[:, 4 : 4 + tokens]
    rows = moved(RopeTables(rope.cosines, rope.sines, rope.index), device)
    found = norm_rope(x.to(device), weight.to(device), rows, EPS, out=part)
    assert found is part
    assert_near(part, x, weight, rope)
    assert whole[:, :4].isnan().all() and whole[:, 4 + tokens :].isnan().all()


def test_kernel_turns_rows_in_place(device):
    x, weight = randoms(1, 5, 192, seed=6).bfloat16(), randoms(192, seed=7).bfloat16()
    rope = tables((1, 5, 3), 3, 3, 32)
    given = x.clone().to(device)
    norm_rope(given, weight.to(device), moved(rope, device), EPS, out=given)
    assert_near(given, x, weight, rope)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("width", [1, 100, 4096])
def test_kernel_norms_rows_without_turning_them(device, dtype, width):
    x = (randoms(2, 3, 2 * width + 3, seed=8) / 100).to(dtype)[..., :width]
    weight = randoms(width, seed=9)
    found = norm_rope(x.to(device), weight.to(device), None, EPS)
    assert_near(found, x, weight, None)
    out = torch.full((2, 5, width), torch.nan, device=device)
    norm_rope(x.to(device), weight.to(device), None, EPS, out=out[:, 1:4])
    assert_near(out[:, 1:4], x, weight, None)
    assert out[:, ::4].isnan().all()


def test_kernel_keeps_rows_of_zeros_and_passes_nan_on(device):
    x, weight = randoms(1, 3, 128, seed=10), torch.ones(128)
    x[0, 0], x[0, 1, 5] = 0, torch.nan
    for rope in (None, moved(tables((1, 3, 1), 1, 2, 32), device)):
        found = norm_rope(x.to(device), weight.to(device), rope, EPS)[0]
        assert (found[0] == 0).all()
        assert found[1].isnan().all()
        assert found[2].isfinite().all()


def test_the_norm_rope_kernels_pass_under_the_interpreter():
    assert "27 passed" in run_interpreted("test_kernels_norm_rope.py")


def test_turning_by_an_angle_of_one_axis_is_what_a_paper_would_write():
    # Two values at the frequency 1 and the position π/2: (a, b) becomes (-b, a).
    angle = torch.tensor(math.pi / 2).view(1, 1, 1)
    rope = RopeTables(angle.cos(), angle.sin(), torch.zeros(1, 1, 1, dtype=torch.int32))
    x = torch.tensor([[[3.0, 4.0]]])
    found = norm_rope(x, torch.ones(2), rope, 0.0)
    wanted = torch.tensor([[[-4.0, 3.0]]]) / math.sqrt(12.5)
    assert torch.allclose(found, wanted, atol=1e-6)  # fp32, and that of π/2


def test_meta_rows_are_turned_without_a_card():
    x = torch.empty(1, 4, 64, dtype=torch.bfloat16, device="meta")
    rope = moved(tables((1, 4, 3), 3, 2, 16), "meta")
    found = norm_rope(x, torch.empty(64, device="meta"), rope, EPS)
    assert found.shape == x.shape and found.dtype == x.dtype and found.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64)}, "x is"),
        ({"x": torch.zeros(1, 64, 4).transpose(1, 2)}, "columns side by side"),
        ({"out": torch.zeros(1, 3, 64)}, "out"),
        ({"weight": torch.zeros(63)}, "weight of"),
        ({"rope": tables((1, 5, 3), 3, 2, 16)}, "1 x 5 tokens"),
        ({"rope": tables((1, 4, 3), 3, 3, 16)}, "3 heads of 32"),
        ({"rope": tables((3, 4, 3), 3, 2, 16)}, "index of 3"),
        ({"x": torch.zeros(1, 4, 65536), "weight": torch.zeros(65536)}, "65536"),
    ],
)
def test_rows_that_cannot_be_turned_are_refused(change, message):
    given = {"x": torch.zeros(1, 4, 64), "weight": torch.ones(64), "rope": None, "eps": EPS}
    with pytest.raises(FormatError, match=message):
        norm_rope(**(given | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cosines": torch.zeros(9, 64)}, "H, D/2"),
        ({"sines": torch.zeros(9, 2, 32).double()}, "fp32 tables"),
        ({"index": torch.zeros(1, 4, 3, dtype=torch.int64)}, "int32"),
        ({"index": torch.zeros(1, 3, 4, dtype=torch.int32).transpose(1, 2)}, "lie apart"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(change, message):
    given = {"cosines": torch.zeros(9, 2, 32), "sines": torch.zeros(9, 2, 32)}
    given["index"] = torch.zeros(1, 4, 3, dtype=torch.int32)
    with pytest.raises(FormatError, match=message):
        RopeTables(**(given | change))
