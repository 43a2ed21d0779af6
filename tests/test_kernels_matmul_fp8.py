"""The fp8 matmuls against float64, and on which cards there are none."""

from types import SimpleNamespace

import pytest
import torch
from kernel_device import kernel_device
from matmul_oracle import ENDINGS, ROUNDING, assert_close, epilogue_of, exact, magnitude
from test_kernels_quantize import randoms

from ltxlite_kernels import matmul, matmul_fp8, reference_matmul
from ltxlite_kernels.card import Card
from ltxlite_kernels.configs import MATMUL
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows
from ltxlite_quant import FormatError

BOTH = (matmul_fp8.matmul_fp8, matmul_fp8.matmul_fp8_capped)
# Tensor cores keep 13 bits of sums of fp8 and cut the rest, of at most 128 products 32 at a time.
FP8_ROUNDINGS = 4 * 2.0**-13
HALF_ROUNDINGS = 4 * 2.0**-11  # test_kernels_matmul_fp16; 64 products, 32 or 16 at a time


@pytest.fixture
def device() -> str:
    return kernel_device()


def fp8_rows(rows: int, columns: int, largest: float, seed: int, device: str) -> ScaledRows:
    x = randoms(rows, columns, seed=seed)
    scales = x.abs().amax(1) / largest
    codes = (x / scales[:, None]).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return ScaledRows(codes.to(device), scales.to(device), Rotation.NONE)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("kind", ENDINGS)
@pytest.mark.parametrize(("rows", "features", "columns"), [(65, 68, 144), (3, 33, 100)])
def test_kernel_multiplies_with_every_epilogue(device, kind, dtype, rows, features, columns):
    a = fp8_rows(rows, columns, 448, 1, device)
    w = fp8_rows(features, columns, 448, 2, device)
    bias = randoms(features, seed=3).to(dtype).to(device)
    epilogue = epilogue_of(kind, rows, features, dtype, device)
    buffer = torch.full((rows + 2, features + 5), torch.nan, dtype=dtype, device=device)
    found = matmul_fp8.matmul_fp8(a, w, bias, epilogue, buffer[:rows, :features])
    # Gates of these sizes multiply an error by at most 5.
    slack = 5 * FP8_ROUNDINGS * (1 + ROUNDING[dtype]) * magnitude(a, w) + 1e-4
    assert_close(found, exact(a, w, bias, epilogue), slack)
    assert buffer[rows:].isnan().all()
    assert buffer[:, features:].isnan().all()


@pytest.mark.parametrize(
    "config",
    sorted(set(MATMUL["fp8"][89] + MATMUL["fp8"][90] + MATMUL["fp8_capped"][89]), key=str),
)
def test_kernel_multiplies_with_every_configuration(device, config, monkeypatch):
    monkeypatch.setattr(matmul, "matmul_config", lambda *_: config[1])
    a, w = fp8_rows(130, 208, 28, 3, device), fp8_rows(260, 208, 28, 4, device)
    found = matmul_fp8.matmul_fp8_capped(a, w, dtype=torch.float32)
    assert_close(found, exact(a, w, None, PLAIN), HALF_ROUNDINGS * magnitude(a, w))


@pytest.mark.parametrize("sizes", [(28.0, 28.0), (2.0, 448.0)])
def test_kernel_sums_the_largest_products_that_are_promised(device, sizes):
    assert sizes[0] * sizes[1] <= matmul_fp8.LARGEST_PRODUCT
    sides = []
    for size in sizes:
        codes = torch.full((2, 1024), size, device=device)
        codes[1] = -size
        ones = torch.ones(2, device=device)
        sides.append(ScaledRows(codes.to(torch.float8_e4m3fn), ones, Rotation.NONE))
    total = 1024 * sizes[0] * sizes[1]
    for multiply in BOTH:
        found = multiply(*sides, dtype=torch.float32).cpu()
        assert found.tolist() == [[total, -total], [-total, total]]


def test_kernel_adds_up_parts_of_a_sum(device):
    a, w = fp8_rows(3, 4116, 28, 7, device), fp8_rows(70, 4116, 28, 8, device)
    epilogue = epilogue_of("own", 3, 70, torch.float32, device)
    for multiply in BOTH:
        found = multiply(a, w, None, epilogue, dtype=torch.float32)
        assert_close(found, exact(a, w, None, epilogue), 5 * HALF_ROUNDINGS * magnitude(a, w))


def test_kernel_adds_to_the_residual_in_place(device):
    a, w = fp8_rows(70, 64, 448, 5, device), fp8_rows(66, 64, 448, 6, device)
    x = randoms(70, 66, seed=7).bfloat16().to(device)
    wanted = exact(a, w, None, Epilogue(residual=x))
    assert matmul_fp8.matmul_fp8(a, w, None, Epilogue(residual=x), x) is x
    assert_close(x, wanted, FP8_ROUNDINGS * 1.01 * magnitude(a, w))


def test_the_cap_of_fp16_sums_costs_no_accuracy():
    x, y = randoms(64, 1024, seed=1), randoms(32, 1024, seed=2)
    wanted = x.double() @ y.double().T
    errors = {}
    for sizes in ((448, 448), (28, 28), (2, 448)):
        a, w = (
            fp8_rows(len(each), 1024, size, seed, "cpu")
            for each, size, seed in zip((x, y), sizes, (1, 2), strict=True)
        )
        found = reference_matmul.matmul(a, w, dtype=torch.float32)
        errors[sizes] = float((found - wanted).norm() / wanted.norm())
    # Both sides in e4m3 of gaussian rows: 3.7e-2 (kernels.md 5), within 1 % of it with a cap of 28.
    assert errors[448, 448] == pytest.approx(0.037, rel=0.03)
    assert errors[28, 28] == pytest.approx(errors[448, 448], rel=0.01)
    assert errors[2, 448] == pytest.approx(errors[448, 448], rel=0.03)


def test_a_card_without_fp8_is_told_what_to_use(monkeypatch):
    codes = torch.zeros(2, 16).to(torch.float8_e4m3fn)
    rows = ScaledRows(codes, torch.ones(2), Rotation.NONE)
    out = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(matmul_fp8, "output_of", lambda *_: out)
    monkeypatch.setattr(matmul_fp8, "card_of", lambda _: Card(86, 28))
    for multiply in BOTH:
        with pytest.raises(FormatError, match=r"from compute capability 8\.9 .*8\.6; .*int8"):
            multiply(rows, rows)


def test_other_codes_are_refused():
    rows = ScaledRows(torch.zeros(2, 16).half(), torch.ones(2), Rotation.NONE)
    for multiply in BOTH:
        with pytest.raises(FormatError, match=r"float8_e4m3fn rows, got torch\.float16"):
            multiply(rows, rows)
