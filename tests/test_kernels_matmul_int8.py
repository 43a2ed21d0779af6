"""The int8 matmul and its epilogues against float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_device import INTERPRETED, kernel_device
from test_kernels_quantize import randoms
from torch import Tensor

from ltxlite.memory.meter import ActivationMeter
from ltxlite_kernels.configs import MATMUL_INT8, matmul_int8_config
from ltxlite_kernels.matmul_int8 import matmul_int8
from ltxlite_kernels.quantize import quantize_rows
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows
from ltxlite_quant import FORMATS, FormatError
from ltxlite_quant.encode_scaled import quantize_scaled

# Rounding to the dtype of the result; fp32 itself adds 2^-24 for each of a handful of operations
# and, of GELU, the fast exponential's 2 ULPs.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}


@pytest.fixture
def device() -> str:
    return kernel_device()


def int8_rows(rows: int, columns: int, seed: int, device: str = "cpu") -> ScaledRows:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), generator=random).to(torch.int8)
    scales = torch.rand(rows, generator=random) / 1000 + 1e-4
    return ScaledRows(codes.to(device), scales.to(device), Rotation.NONE)


def exact(a: ScaledRows, w: ScaledRows, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    """Compute the product and its epilogue in float64."""
    left, right = (rows.codes.cpu().double() for rows in (a, w))
    scales = a.scales.cpu().double()[:, None] * w.scales.cpu().double()
    y = left @ right.T * scales  # sums of integers: exact
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


def assert_close(found: Tensor, wanted: Tensor, terms: float) -> None:
    """Compare with float64: a rounding of each value, and fp32's of the largest term."""
    tolerance = ROUNDING[found.dtype] * wanted.abs() * 1.01 + terms * 2.0**-21
    assert ((found.cpu().double() - wanted).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("kind", ["gelu", "shared", "own", "index", "residual"])
@pytest.mark.parametrize(("rows", "features", "columns"), [(65, 68, 144), (3, 33, 100)])
def test_kernel_multiplies_with_every_epilogue(device, kind, dtype, rows, features, columns):
    a, w = int8_rows(rows, columns, 1, device), int8_rows(features, columns, 2, device)
    bias = randoms(features, seed=3).to(dtype).to(device)
    epilogue = epilogue_of(kind, rows, features, dtype, device)
    buffer = torch.full((rows + 2, features + 5), torch.nan, dtype=dtype, device=device)
    found = matmul_int8(a, w, bias, epilogue, buffer[:rows, :features])
    wanted = exact(a, w, bias, epilogue)
    assert_close(found, wanted, terms=4 * float(wanted.abs().max()))
    assert buffer[rows:].isnan().all()
    assert buffer[:, features:].isnan().all()


@pytest.mark.parametrize("config", sorted(set(MATMUL_INT8[86] + MATMUL_INT8[90]), key=str))
def test_kernel_multiplies_with_every_configuration(device, config, monkeypatch):
    from ltxlite_kernels import matmul_int8 as module

    monkeypatch.setattr(module, "matmul_int8_config", lambda *_: config[1])
    a, w = int8_rows(130, 208, 3, device), int8_rows(260, 208, 4, device)
    found = matmul_int8(a, w, dtype=torch.float32)
    # The sums are exact: a rounding to fp32 and two products remain.
    assert_close(found, exact(a, w, None, PLAIN), terms=0)


def test_kernel_adds_to_the_residual_in_place(device):
    a, w = int8_rows(70, 64, 5, device), int8_rows(66, 64, 6, device)
    x = randoms(70, 66, seed=7).bfloat16().to(device)
    gate = randoms(1, 66, seed=8).bfloat16().to(device)
    epilogue = Epilogue(gate=gate, residual=x.clone())
    wanted = exact(a, w, None, epilogue)
    found = matmul_int8(a, w, None, Epilogue(gate=gate, residual=x), x)
    assert found is x
    assert_close(x, wanted, terms=4.0)


def test_kernel_sums_the_largest_codes_exactly(device):
    codes = torch.full((2, 4096), 127, dtype=torch.int8, device=device)
    codes[1] = -127
    ones = torch.ones(2, device=device)
    rows = ScaledRows(codes, ones, Rotation.NONE)
    found = matmul_int8(rows, rows, dtype=torch.float32).cpu()
    total = 4096.0 * 127 * 127  # a multiple of 2^12, so a fp32
    assert found.tolist() == [[total, -total], [-total, total]]


def test_kernel_writes_beyond_two_to_the_31_elements(device):
    # Only touched pages of the 4.7 GB exist.
    rows, stride = 70, 1 << 25
    out = torch.empty(rows * stride, dtype=torch.float16, device=device).view(rows, stride)[:, :17]
    a, w = int8_rows(rows, 32, 7, device), int8_rows(17, 32, 8, device)
    residual = out.fill_(1)
    found = matmul_int8(a, w, None, Epilogue(residual=residual), out)
    assert_close(found, exact(a, w, None, PLAIN) + 1, terms=1.0)


def test_kernel_passes_nan_on(device):
    a, w = int8_rows(5, 64, 9, device), int8_rows(6, 64, 10, device)
    a.scales[2] = torch.nan
    found = matmul_int8(a, w).isnan().cpu()
    assert found[2].all()
    assert not found[[0, 1, 3, 4]].any()


def test_columns_of_an_epilogue_give_columns_of_the_result():
    a, w = int8_rows(9, 64, 1), int8_rows(20, 64, 2)
    bias, epilogue = randoms(20), epilogue_of("index", 9, 20, torch.float32, "cpu")
    whole = matmul_int8(a, w, bias, epilogue, dtype=torch.float32)
    parts = torch.full_like(whole, torch.nan)
    for part in (slice(0, 13), slice(13, 20)):
        matmul_int8(a, w.rows(part), bias[part], epilogue.columns(part), parts[:, part])
    assert torch.equal(whole, parts)


def test_a_convrot_weight_is_int8_rows_as_it_lies_in_its_file():
    weight, x = randoms(12, 512, seed=1), randoms(5, 512, seed=2)
    quant = quantize_scaled(weight, FORMATS["INT8_CONVROT"])
    scales = quant.parts["scale"].expand(12, 1)[:, 0].contiguous()
    w = ScaledRows(quant.blocks.view(torch.int8), scales, Rotation.REGULAR_256)
    a = quantize_rows(x, Rotation.REGULAR_256)
    found = matmul_int8(a, w, dtype=torch.float32)
    wanted = x.double() @ quant.dequantize().double().T
    # Rounding the activation alone: steps of 4 / 127 of a deviation, a 1 / √12 of it.
    assert (found - wanted).norm() < 1.2 * 4 / 127 / 12**0.5 * wanted.norm()


def test_configurations_are_chosen_by_card_and_rows():
    assert matmul_int8_config(86, 5000).block_m == 128
    assert matmul_int8_config(86, 126).block_m == 64
    assert matmul_int8_config(90, 5000).block_n == 2 * matmul_int8_config(90, 5000, True).block_n
    assert matmul_int8_config(87, 5000) is matmul_int8_config(86, 5000)
    assert matmul_int8_config(75, 1) is matmul_int8_config(80, 1)
    assert matmul_int8_config(121, 9) is matmul_int8_config(120, 9)
    assert matmul_int8_config(90, 4096) is not matmul_int8_config(89, 4096)


def test_what_does_not_fit_is_refused():
    a, w = int8_rows(4, 64, 1), int8_rows(6, 64, 2)
    turned = ScaledRows(w.codes, w.scales, Rotation.SIGNS_128)
    gate, index = torch.zeros(2, 6), torch.zeros(4, dtype=torch.int32)
    cases = (
        ((a, int8_rows(6, 32, 3)), "K = 64"),
        ((a, turned), "SIGNS_128"),
        ((a, w, torch.zeros(4)), "bias"),
        ((a, w, None, Epilogue(gate=gate)), "2 rows for 4"),
        ((a, w, None, Epilogue(gate=gate, index=index.long())), "int32"),
        ((a, w, None, Epilogue(index=index)), "no gate"),
        ((a, w, None, Epilogue(residual=torch.zeros(4, 5))), "residual"),
        ((a, w, None, PLAIN, torch.zeros(6, 4).T), "side by side"),
        ((a, w, None, PLAIN, torch.zeros(4, 6, dtype=torch.int32)), "out is"),
    )
    for given, message in cases:
        with pytest.raises(FormatError, match=message):
            matmul_int8(*given)
    with pytest.raises(FormatError, match=r"\(R, K\) int8"):
        ScaledRows(torch.zeros(3, 4), torch.zeros(3), Rotation.NONE)


@pytest.mark.skipif(INTERPRETED, reason="counts what a card would hold")
def test_on_a_card_a_matmul_makes_nothing_but_its_result():
    a, w = (
        ScaledRows(rows.codes.to("meta"), rows.scales.to("meta"), rows.rotation)
        for rows in (int8_rows(100, 64, 1), int8_rows(50, 64, 2))
    )
    x = torch.empty(100, 64, device="meta")
    with ActivationMeter("meta") as meter:
        matmul_int8(quantize_rows(x), w)
    assert meter.peak_bytes == 100 * 50 * 2 + 100 * 64 + 100 * 4
    assert matmul_int8(a, w).shape == (100, 50)


def test_everything_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from ltxlite_kernels import int8_weight, matmul_int8, quantize, rotate\n"
        "from ltxlite_quant import FORMATS\n"
        "turn = rotate.Rotation.REGULAR_256\n"
        "x, w = torch.randn(3, 256), torch.randn(4, 256)\n"
        "a = quantize.norm_modulate_quantize(x, None, None, None, 0.0, turn)\n"
        "b = int8_weight.int8_rows(w, FORMATS['F32'], 256, turn)\n"
        "y = matmul_int8.matmul_int8(a, b, dtype=torch.float32)\n"
        "wanted = torch.nn.functional.rms_norm(x, (256,), eps=0.0) @ w.T\n"
        "assert (y - wanted).norm() < 0.03 * wanted.norm()\n"
        "int8_weight.int8_rows(torch.zeros(2, 34, dtype=torch.uint8), FORMATS['Q8_0'], 32)\n"
    )
    root = Path(__file__).parent.parent
    roots = [str(root), str(root / "kernels"), str(root / "quant")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {roots!r}\n{code}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
