"""Rows rounded to int8, plain and after norm and modulation, rotated or not."""

import math
from types import SimpleNamespace

import pytest
import torch
from kernel_device import kernel_device, run_interpreted
from torch import Tensor

from ltxlite_kernels import quantize, reference, reference_matmul, rotate
from ltxlite_kernels.card import Card
from ltxlite_kernels.coding import Coding
from ltxlite_kernels.norm_modulate import norm_modulate
from ltxlite_kernels.quantize import norm_modulate_quantize, quantize_rows
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import ScaledRows
from ltxlite_quant.formats import FormatError
from ltxlite_quant.scaled import hadamard

ROTATIONS = [Rotation.SIGNS_128, Rotation.REGULAR_256]
# Rotation rounds to fp16 twice: 2^-11 of a value about 1/4 of the largest at most, spread by sums
# of 16 with random signs, is 0.01 steps of 1/127 of the largest (standard deviation).
ROTATED_STEPS = 0.5 + 8 * 0.01


@pytest.fixture
def device() -> str:
    return kernel_device()


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate in float64 by whole matrices, built otherwise than the kernels do."""
    wide = x.double()
    if rotation is Rotation.NONE:
        return wide
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    whole = torch.ones(1, 1)
    for _ in range(7):
        whole = torch.kron(whole, two)
    if rotation is Rotation.SIGNS_128:
        wide = wide * rotate.signs(x.shape[1], x.device)
    else:
        whole = hadamard(256, torch.device("cpu"))
    groups = wide.unflatten(1, (-1, len(whole)))
    return (groups @ whole.double()).flatten(1) / math.sqrt(len(whole))


def steps_off(found: ScaledRows, wanted: Tensor) -> float:
    """Return the largest distance of decoded rows from their values, in steps of the row."""
    codes, scales = found.codes.cpu().double(), found.scales.cpu().double()[:, None]
    assert codes.abs().max() <= 127
    return float(((codes * scales - wanted) / scales).abs().max())


def poisoned(rows: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    """Return codes and scales to write into, with room behind that must stay as it is."""
    codes = torch.full((rows * columns + 4096,), 0x7F, dtype=torch.int8, device=device)
    scales = torch.full((rows + 64,), torch.nan, device=device)
    return codes, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (7, 100), (5, 256), (2, 3840)])
def test_kernel_rounds_rows_with_the_bits_of_its_twin(device, dtype, rows, columns):
    x = (randoms(rows, columns + 8) * 10).to(dtype)[:, :columns].to(device)  # strided
    codes, scales = poisoned(rows, columns, device)
    part = codes[: rows * columns].view(rows, columns)
    torch.ops.ltxlite.quantize_rows(x, 0, 127.0, part, scales[:rows])
    wanted = reference.quantize_rows(x.cpu())
    # Products, one exact division and rounding to even are the same everywhere: equal bits.
    assert torch.equal(part.cpu(), wanted.codes)
    assert torch.equal(scales[:rows].cpu(), wanted.scales)
    assert (codes[rows * columns :] == 0x7F).all()
    assert scales[rows:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rotation", "columns"), [(128, 128), (128, 384), (256, 256), (256, 3840)])
def test_kernel_rotates_rows_before_it_rounds_them(device, dtype, rotation, columns):
    x = (randoms(3, columns, seed=1) * torch.tensor([[1e-6], [1.0], [1e5]])).to(dtype)
    found = quantize_rows(x.to(device), Rotation(rotation))
    assert steps_off(found, turned(x, Rotation(rotation))) <= ROTATED_STEPS
    wanted = reference.quantize_rows(x, Rotation(rotation))
    # The largest value is off by as much, 0.01 steps of 127, eight standard deviations of it.
    assert torch.allclose(found.scales.cpu(), wanted.scales, rtol=8 * 0.01 / 127, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of inf * 0
def test_kernel_keeps_a_row_of_zeros_and_passes_nan_on(device):
    x = randoms(4, 256)
    x[1], x[2, 7], x[3, 9] = 0, torch.nan, torch.inf
    for rotation in Rotation:
        found = quantize_rows(x.to(device), rotation)
        assert (found.codes[1] == 0).all()
        assert 0 < found.scales[1] < 1e-30  # to divide by
        assert found.scales[2].isnan()  # so whatever it is multiplied by becomes NaN too
        assert not found.scales[3].isfinite()
        assert steps_off(found.rows(slice(0, 1)), turned(x[:1], rotation)) <= ROTATED_STEPS


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    wide = x.double()
    wide = wide / (wide.square().mean(1, keepdim=True) + eps).sqrt()
    return wide * (1 + scale.double()) + shift.double()


@pytest.mark.parametrize("rotation", list(Rotation))
@pytest.mark.parametrize("how", ["shared", "own", "index", "mixed"])
def test_kernel_norms_and_modulates_before_it_rounds(device, how, rotation):
    rows, columns = 5, 768
    x = (randoms(rows, columns, seed=2) * 30).bfloat16()
    tables = {"shared": 1, "own": rows, "index": 3, "mixed": rows}[how]
    both = randoms(2 * tables, columns, seed=3).bfloat16()
    shift, scale = both[::2], both[1::2]  # rows of a table that lie apart
    if how == "mixed":
        shift = shift[:1]
    index = torch.tensor([2, 0, 1, 1, 2], dtype=torch.int32) if how == "index" else None
    at = slice(None) if index is None else index.long()
    given = (x, shift, scale, index)
    moved = (None if tensor is None else tensor.to(device) for tensor in given)
    found = norm_modulate_quantize(*moved, 1e-6, rotation)
    wanted = turned(modulated(x, shift[at], scale[at], 1e-6), rotation)
    # Without rotation fp32 arithmetic leaves 1e-5 of a step beside the half of rounding.
    assert steps_off(found, wanted) <= (ROTATED_STEPS if rotation else 0.5001)
    twin = reference.norm_modulate_quantize(*given, 1e-6, rotation)
    assert (found.codes.cpu().int() - twin.codes.int()).abs().max() <= 1


def test_kernel_norms_without_modulation(device):
    x = randoms(3, 100, seed=4).half()
    found = norm_modulate_quantize(x.to(device), None, None, None, 1e-5)
    zeros = torch.zeros(1, 100)
    assert steps_off(found, modulated(x, zeros, zeros, 1e-5)) <= 0.5001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [100, 3840])
def test_kernel_keeps_values_exact_in_fp16_codes(device, dtype, columns):
    x = (randoms(4, columns + 8, seed=11) * torch.tensor([[1e-20], [0.3], [1], [1e4]])).to(dtype)
    x = x[:, :columns]  # strided
    x[2, 5] = 2.0**15  # a power of two itself
    found = quantize_rows(x.to(device), Coding(torch.float16))
    codes, scales = found.codes.cpu().double(), found.scales.cpu().double()
    assert (scales.log2() % 1 == 0).all()
    # Zeros alone, where fp16 has no 1e-20, stay below: a row of zeros has a scale to divide by.
    used = x.abs().amax(1) > 0
    assert (codes.abs().amax(1)[used] >= 32).all() and (codes.abs() < 64).all()
    off = (codes * scales[:, None] - x.double()).abs()
    # Exact down to 2^-14, fp16's smallest normal number; below it by half of its last bit, 2^-25.
    below = codes.abs() < 2**-14
    assert (off[~below] == 0).all()
    assert (off <= 2**-25 * scales[:, None]).all()


@pytest.mark.parametrize("limit", [None, 28.0, 2.0])
@pytest.mark.parametrize("rotation", [Rotation.NONE, Rotation.REGULAR_256])
def test_kernel_rounds_rows_to_fp8_up_to_a_limit(device, rotation, limit):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8")
    x = (randoms(5, 768, seed=12) * torch.tensor([[1e-9], [1], [7], [1e3], [1e6]])).bfloat16()
    coding = Coding(torch.float8_e4m3fn, rotation, limit)
    found = quantize_rows(x.to(device), coding)
    codes, scales = found.codes.cpu().double(), found.scales.cpu().double()[:, None]
    assert (codes.abs().amax(1) == coding.largest).all()
    wanted = turned(x, rotation)
    # Half of the last of three bits, or half of the smallest step, 2^-9; ROTATED_STEPS says what
    # a rotation adds to either, in 1/127 of the largest.
    more = (ROTATED_STEPS - 0.5) / 127 * coding.largest * scales if rotation else 1e-6 * scales
    off = (codes * scales - wanted).abs()
    assert (off <= (2**-4 * 1.001 * wanted.abs()).clamp(min=2**-10 * scales) + more).all()


@pytest.mark.parametrize("coding", [Coding(torch.float16), Coding(torch.float8_e4m3fn)])
def test_kernel_gives_floating_codes_with_the_bits_of_its_twin(device, coding):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8")
    x = randoms(5, 300, seed=13).bfloat16()
    x[1], x[2, 7] = 0, torch.nan
    found, wanted = quantize_rows(x.to(device), coding), reference.quantize_rows(x, coding)
    assert torch.equal(found.codes[:2].cpu().float(), wanted.codes[:2].float())
    assert torch.equal(found.codes[3:].cpu().float(), wanted.codes[3:].float())
    assert torch.equal(found.scales.cpu()[[0, 1, 3, 4]], wanted.scales[[0, 1, 3, 4]])
    assert found.scales[2].isnan() and found.codes[2, 7].isnan()
    assert (found.codes[1].float() == 0).all() and found.scales[1] > 0


def test_kernel_norms_and_modulates_to_floating_codes(device):
    x, table = (randoms(3, 768, seed=14) * 30).bfloat16(), randoms(2, 768, seed=15).bfloat16()
    given = (x, table[:1], table[1:], None)
    moved = (None if tensor is None else tensor.to(device) for tensor in given)
    found = norm_modulate_quantize(*moved, 1e-6, Coding(torch.float16))
    wanted = modulated(x, table[:1], table[1:], 1e-6)
    off = found.codes.cpu().double() * found.scales.cpu().double()[:, None] - wanted
    # fp16 has 11 bits; fp32 leaves 2^-19 of the largest values beside (sums of 768 squares).
    assert (off.abs() <= 2**-11 * wanted.abs() + 2**-19 * wanted.abs().amax(1, True)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["none", "shared", "index"])
def test_kernel_norms_and_modulates_values(device, dtype, how):
    x = (randoms(5, 300, seed=16) * 30).to(dtype)[:, :100]
    table = None if how == "none" else randoms(3, 2, 100, seed=17).to(dtype)
    shift, scale = (None, None) if table is None else table[: 1 if how == "shared" else 3].unbind(1)
    index = torch.tensor([2, 0, 1, 1, 2], dtype=torch.int32) if how == "index" else None
    given = (x, shift, scale, index)
    moved = (None if tensor is None else tensor.to(device) for tensor in given)
    found = norm_modulate(*moved, 1e-6)
    at = slice(None) if index is None else index.long()
    zeros = torch.zeros(1, 100)
    wanted = modulated(x, *((zeros, zeros) if table is None else (shift[at], scale[at])), 1e-6)
    # One rounding, and fp32's 2^-20 of norm * (1 + scale) or of shift: below 2^-17 of the largest.
    rounding = torch.finfo(dtype).eps / 2
    off = (found.cpu().double() - wanted).abs()
    assert found.dtype == dtype
    assert (off <= rounding * 1.01 * wanted.abs() + 2**-20 * wanted.abs().max()).all()


def test_the_kernel_tests_pass_under_the_interpreter():
    files = ("quantize", "int8_weight")
    assert " passed" in run_interpreted(*(f"test_kernels_{name}.py" for name in files))


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_are_orthogonal_and_known_matrices(rotation):
    x, y = randoms(3, 512, seed=5), randoms(4, 512, seed=6)
    found = reference.rotate(x, rotation)
    # fp32 sums of 128 or 256 products: 2^-24 √256 of the length of a group, 16.
    assert torch.allclose(found.double(), turned(x, rotation), atol=1e-5)
    products = found.double() @ reference.rotate(y, rotation).double().T
    assert torch.allclose(products, x.double() @ y.double().T, atol=1e-4)


def test_signs_are_as_good_as_random():
    signs = rotate.signs(16384, torch.device("cpu"))
    assert set(signs.tolist()) == {-1.0, 1.0}
    # Sums of n random signs are below 4 √n, at any distance from each other as well.
    for lag in (0, 1, 2, 16, 128, 4096):
        both = signs if lag == 0 else signs[lag:] * signs[:-lag]
        assert abs(float(both.sum())) < 4 * math.sqrt(len(both))


def test_the_best_rotation_fits_the_columns():
    found = [Rotation.of(columns) for columns in (4096, 3840, 384, 100)]
    assert found == [256, 256, 128, 0]


def test_an_outlier_channel_costs_little_when_rotated():
    x, w = randoms(64, 1024, seed=7), randoms(32, 1024, seed=8)
    x[:, 5] *= 100
    exact = x.double() @ w.double().T
    errors = {}
    for rotation in Rotation:
        a, b = (reference.quantize_rows(each, rotation) for each in (x, w))
        y = reference_matmul.matmul(a, b, dtype=torch.float32)
        errors[rotation] = float((y - exact).norm() / exact.norm())
    # One value of 100 among 1023 of 1: steps of 100 / 127 against 100 / √size / 127.
    assert errors[Rotation.NONE] > 4 * errors[Rotation.SIGNS_128]
    assert errors[Rotation.NONE] > 4 * errors[Rotation.REGULAR_256]


@pytest.mark.parametrize(
    ("x", "rotation", "message"),
    [
        (torch.zeros(3, 100), Rotation.SIGNS_128, "K % 128 == 0, got K = 100"),
        (torch.zeros(3, 128), Rotation.REGULAR_256, "K % 256"),
        (torch.zeros(128, 3).T, Rotation.NONE, "columns side by side"),
        (torch.zeros(3, 4, dtype=torch.int8), Rotation.NONE, "fp32, fp16 or bf16"),
        (torch.zeros(1, 40000), Rotation.NONE, "longer than a program holds"),
    ],
)
def test_rows_that_do_not_fit_are_refused(x, rotation, message):
    with pytest.raises(FormatError, match=message):
        quantize_rows(x, rotation)


def test_the_slow_path_on_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr(quantize, "HAVE_TRITON", False)
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert not quantize.runs_kernel(SimpleNamespace(is_cuda=True))


@pytest.mark.parametrize(
    ("dtype", "limit", "message"),
    [
        (torch.bfloat16, None, "codes are"),
        (torch.int8, 128.0, "1 to 127"),
        (torch.float16, 48.0, "a power of two"),
        (torch.float8_e4m3fn, 0.5, "1 to 448"),
    ],
)
def test_codings_that_make_no_sense_are_refused(dtype, limit, message):
    with pytest.raises(FormatError, match=message):
        Coding(dtype, limit=limit)


def test_cards_without_fp8_get_no_fp8_codes(monkeypatch):
    monkeypatch.setattr(quantize, "card_of", lambda _: Card(86, 28))
    x = SimpleNamespace(is_cuda=True, shape=(1, 16), device="cpu")
    with pytest.raises(FormatError, match=r"capability 8\.9, this card has 8\.6"):
        quantize.empty_rows(x, Coding(torch.float8_e4m3fn))


def test_tables_that_do_not_fit_are_refused():
    x, table = torch.zeros(3, 8), torch.zeros(2, 8)
    index = torch.zeros(3, dtype=torch.int32)
    for shift, scale, chosen, message in (
        (table, None, index, "together"),
        (table, table, None, "2 rows for 3"),
        (table, table, index.long(), "int32"),
        (table, table, index[:2], "int32"),
        (table[:, :7], table, index, "shift is"),
    ):
        with pytest.raises(FormatError, match=message):
            norm_modulate_quantize(x, shift, scale, chosen, 1e-6)
