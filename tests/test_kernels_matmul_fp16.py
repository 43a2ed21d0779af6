"""The fp16 matmul, its sums in fp16 and fp32, against float64."""

import pytest
import torch
from kernel_device import INTERPRETED, kernel_device, run_interpreted
from matmul_oracle import ENDINGS, ROUNDING, assert_close, epilogue_of, exact, magnitude
from test_kernels_quantize import randoms
from torch import Tensor

from benchmarks import compile as command
from ltxlite_kernels import matmul, reference_matmul
from ltxlite_kernels.card import Card
from ltxlite_kernels.coding import LARGEST
from ltxlite_kernels.configs import HALF_SUM, MATMUL, matmul_config
from ltxlite_kernels.matmul_fp16 import LARGEST_WEIGHT, matmul_fp16
from ltxlite_kernels.rotate import HAVE_TRITON, Rotation
from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows
from ltxlite_quant import FormatError

LARGEST_CODE = LARGEST[torch.float16]
# A tensor core rounds the sum of 64 products to fp16 four times, after every 16; each rounding is
# 2^-11 of a partial sum, which is at most that of the products' magnitudes.
HALF_ROUNDINGS = 4 * 2.0**-11


@pytest.fixture
def device() -> str:
    return kernel_device()


def fp16_rows(rows: int, columns: int, seed: int, device: str = "cpu") -> ScaledRows:
    """Return random rows of different sizes as codes within ±64 and powers of two."""
    x = randoms(rows, columns, seed=seed) * torch.arange(1, rows + 1)[:, None]
    scales = (x.abs().amax(1) / LARGEST_CODE).log2().ceil().exp2()
    codes = (x / scales[:, None]).half()
    return ScaledRows(codes.to(device), scales.to(device), Rotation.NONE)


def weight(features: int, columns: int, seed: int, device: str = "cpu") -> Tensor:
    return (randoms(features, columns, seed=seed) / columns**0.5).half().to(device)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("kind", ENDINGS)
@pytest.mark.parametrize(("rows", "features", "columns"), [(65, 68, 144), (3, 33, 100)])
def test_kernel_multiplies_with_every_epilogue(device, kind, dtype, rows, features, columns):
    a, w = fp16_rows(rows, columns, 1, device), weight(features, columns, 2, device)
    bias = randoms(features, seed=3).to(dtype).to(device)
    epilogue = epilogue_of(kind, rows, features, dtype, device)
    buffer = torch.full((rows + 2, features + 5), torch.nan, dtype=dtype, device=device)
    found = matmul_fp16(a, w, bias, epilogue, buffer[:rows, :features])
    # GELU multiplies an error by at most 1.13, gates of these sizes by at most 5.
    slack = 5 * HALF_ROUNDINGS * (1 + ROUNDING[dtype]) * magnitude(a, w) + 1e-4
    assert_close(found, exact(a, w, bias, epilogue), slack)
    assert buffer[rows:].isnan().all()
    assert buffer[:, features:].isnan().all()


@pytest.mark.parametrize(
    "config", sorted(set(MATMUL["fp16"][80] + MATMUL["fp16"][86] + MATMUL["fp16"][90]), key=str)
)
def test_kernel_multiplies_with_every_configuration(device, config, monkeypatch):
    monkeypatch.setattr(matmul, "matmul_config", lambda *_: config[1])
    a, w = fp16_rows(130, 208, 3, device), weight(260, 208, 4, device)
    found = matmul_fp16(a, w, dtype=torch.float32)
    # Without fp16 sums: fp32's 2^-24 for each of 208, as Hopper's tensor cores cut them, 2^-22.
    per_sum = HALF_ROUNDINGS if config[1].half else 2.0**-22 * 16
    assert_close(found, exact(a, w, None, PLAIN), per_sum * magnitude(a, w))


def test_kernel_is_closer_than_bf16(device):
    a, w = fp16_rows(64, 4096, 5, device), weight(64, 4096, 6, device)
    wanted = exact(a, w, None, PLAIN)
    found = matmul_fp16(a, w, dtype=torch.float32).cpu().double()
    # Measured on tensor cores' order of sums: 4.4e-4 (kernels.md 0); inputs in bf16 alone 2.3e-3.
    assert (found - wanted).norm() < 6e-4 * wanted.norm()


@pytest.mark.parametrize("scaled", [False, True])
def test_kernel_sums_the_largest_products_that_are_promised(device, scaled):
    codes = torch.full((2, 4096), LARGEST_CODE, dtype=torch.float16, device=device)
    codes[1] = -LARGEST_CODE
    a = ScaledRows(codes, torch.tensor([1.0, 0.25], device=device), Rotation.NONE)
    w = torch.full((3, 4096), LARGEST_WEIGHT, dtype=torch.float16, device=device)
    if scaled:
        w = ScaledRows(w, torch.full((3,), 8.0, device=device), Rotation.NONE)
    found = matmul_fp16(a, w, dtype=torch.float32).cpu()
    # 64 products are 63488, a fp16; all are a multiple of 2^11, a fp32.
    total = 4096 * LARGEST_CODE * LARGEST_WEIGHT * (8 if scaled else 1)
    assert found.tolist() == [[total] * 3, [-total / 4] * 3]


@pytest.mark.parametrize("kind", ["gelu", "index"])
def test_kernel_adds_up_parts_of_a_sum(device, kind):
    columns = 4096 + 20
    a, w = fp16_rows(3, columns, 7, device), weight(70, columns, 8, device)
    epilogue = epilogue_of(kind, 3, 70, torch.float32, device)
    found = matmul_fp16(a, w, None, epilogue, dtype=torch.float32)
    assert_close(found, exact(a, w, None, epilogue), 5 * HALF_ROUNDINGS * magnitude(a, w))
    again = matmul_fp16(a, w, None, epilogue, dtype=torch.float32)
    assert torch.equal(found, again)


def test_kernel_adds_to_the_residual_in_place(device):
    a, w = fp16_rows(70, 64, 5, device), weight(66, 64, 6, device)
    x = randoms(70, 66, seed=7).bfloat16().to(device)
    wanted = exact(a, w, None, Epilogue(residual=x))
    assert matmul_fp16(a, w, None, Epilogue(residual=x), x) is x
    assert_close(x, wanted, HALF_ROUNDINGS * 1.01 * magnitude(a, w))


def test_the_kernel_tests_of_float_matmuls_pass_under_the_interpreter():
    files = (f"test_kernels_matmul_{kind}.py" for kind in ("int8", "fp16", "fp8"))
    assert " passed" in run_interpreted(*files)


def test_the_twin_is_exact_to_fp32():
    a, w = fp16_rows(9, 1000, 1), weight(20, 1000, 2)
    bias, epilogue = randoms(20), epilogue_of("index", 9, 20, torch.float32, "cpu")
    found = reference_matmul.matmul(a, w, bias, epilogue, dtype=torch.float32)
    # fp32 sums of 1000: 2^-24 √1000 of the magnitude, typically; gates up to 3.
    assert_close(found, exact(a, w, bias, epilogue), 3 * 2.0**-19 * magnitude(a, w))


@pytest.mark.parametrize("kind", ["fp16", "fp8_capped"])
def test_fp16_sums_are_of_64_products_where_they_are_faster(kind):
    for capability, rows in MATMUL[kind].items():
        for _, config in rows:
            assert config.half is (capability in (86, 89, 120))
            assert config.block_k == HALF_SUM or not config.half
    assert matmul_config("fp16", Card(75, 30), 5000, 4096).half is False


@pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="compiles with Triton")
def test_fp16_sums_reach_the_tensor_core_on_geforce_alone():
    rows = command.compiled((80, 86), ["matmul_fp16 0+ plain"])
    sums = {row["arch"]: [name.rpartition("col.")[2] for name in row["ptx"]] for row in rows}
    assert sums == {80: ["f32.f16.f16.f32"], 86: ["f16.f16.f16.f16"]}


def test_what_does_not_fit_is_refused():
    a, w = fp16_rows(4, 64, 1), weight(6, 64, 2)
    turned = ScaledRows(a.codes, a.scales, Rotation.SIGNS_128)
    for given, message in (
        ((a, w[:, :32]), "K = 64"),
        ((a, w[0]), r"\(64,\)"),
        ((turned, w), "SIGNS_128"),
        ((a, w.float()), "torch.float16 rows, got torch.float32"),
        ((a, w.bfloat16()), "got torch.bfloat16"),
        ((a, weight(64, 6, 2).T), "stride"),
        ((a, w, torch.zeros(4)), "bias"),
        ((a, w, None, PLAIN, torch.zeros(4, 5)), "out is"),
    ):
        with pytest.raises(FormatError, match=message):
            matmul_fp16(*given)
