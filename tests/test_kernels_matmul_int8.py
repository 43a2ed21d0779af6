"""The int8 matmul and its epilogues against float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_device import INTERPRETED, kernel_device
from matmul_oracle import ENDINGS, ROUNDING, assert_close, epilogue_of, exact
from test_kernels_quantize import randoms

from ltxlite.memory.meter import ActivationMeter
from ltxlite_kernels import matmul, reference_matmul
from ltxlite_kernels.card import INTERPRETED as RTX_3060
from ltxlite_kernels.card import Card
from ltxlite_kernels.configs import MATMUL, matmul_config, matmul_parts
from ltxlite_kernels.matmul_int8 import matmul_int8
from ltxlite_kernels.quantize import quantize_rows
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows
from ltxlite_quant import FormatError

FP32 = 2.0**-21  # of a term that is added: a handful of operations


@pytest.fixture
def device() -> str:
    return kernel_device()


def int8_rows(rows: int, columns: int, seed: int, device: str = "cpu") -> ScaledRows:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), generator=random).to(torch.int8)
    scales = torch.rand(rows, generator=random) / 1000 + 1e-4
    return ScaledRows(codes.to(device), scales.to(device), Rotation.NONE)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("kind", ENDINGS)
@pytest.mark.parametrize(("rows", "features", "columns"), [(65, 68, 144), (3, 33, 100)])
def test_kernel_multiplies_with_every_epilogue(device, kind, dtype, rows, features, columns):
    a, w = int8_rows(rows, columns, 1, device), int8_rows(features, columns, 2, device)
    bias = randoms(features, seed=3).to(dtype).to(device)
    epilogue = epilogue_of(kind, rows, features, dtype, device)
    buffer = torch.full((rows + 2, features + 5), torch.nan, dtype=dtype, device=device)
    found = matmul_int8(a, w, bias, epilogue, buffer[:rows, :features])
    wanted = exact(a, w, bias, epilogue)
    assert_close(found, wanted, 4 * float(wanted.abs().max()) * FP32)
    assert buffer[rows:].isnan().all()
    assert buffer[:, features:].isnan().all()


@pytest.mark.parametrize("config", sorted(set(MATMUL["int8"][86] + MATMUL["int8"][90]), key=str))
def test_kernel_multiplies_with_every_configuration(device, config, monkeypatch):
    monkeypatch.setattr(matmul, "matmul_config", lambda *_: config[1])
    a, w = int8_rows(130, 208, 3, device), int8_rows(260, 208, 4, device)
    found = matmul_int8(a, w, dtype=torch.float32)
    # The sums are exact: a rounding to fp32 and two products remain.
    assert_close(found, exact(a, w, None, PLAIN))


def test_kernel_adds_to_the_residual_in_place(device):
    a, w = int8_rows(70, 64, 5, device), int8_rows(66, 64, 6, device)
    x = randoms(70, 66, seed=7).bfloat16().to(device)
    gate = randoms(1, 66, seed=8).bfloat16().to(device)
    epilogue = Epilogue(gate=gate, residual=x.clone())
    wanted = exact(a, w, None, epilogue)
    found = matmul_int8(a, w, None, Epilogue(gate=gate, residual=x), x)
    assert found is x
    assert_close(x, wanted, 4 * FP32)


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
    assert_close(found, exact(a, w, None, PLAIN) + 1, FP32)


@pytest.mark.parametrize("kind", ["gelu", "index"])
@pytest.mark.parametrize("columns", [4096, 6144 + 20])
def test_kernel_adds_up_parts_of_a_sum(device, kind, columns):
    a, w = int8_rows(3, columns, 11, device), int8_rows(70, columns, 12, device)
    config = matmul_config("int8", RTX_3060, 3, 70)
    assert matmul_parts(config, RTX_3060, (3, 70), columns) == columns // 2048
    epilogue = epilogue_of(kind, 3, 70, torch.float32, device)
    buffer = torch.full((5, 75), torch.nan, device=device)
    found = matmul_int8(a, w, None, epilogue, buffer[:3, :70])
    wanted = exact(a, w, None, epilogue)
    assert_close(found, wanted, 4 * float(wanted.abs().max()) * FP32)
    assert buffer[3:].isnan().all()
    assert buffer[:, 70:].isnan().all()
    # Sums of integers have the same bits, in whatever order.
    plain = matmul_int8(a, w, dtype=torch.float32)
    assert torch.equal(plain, reference_matmul.matmul(a, w, dtype=torch.float32))


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


RTX_4060, RTX_4090, H200 = Card(89, 24), Card(89, 128), Card(90, 132)


def test_tiles_are_the_largest_that_fill_a_card():
    sizes = {
        (card.multiprocessors, rows, features): (config.block_m, config.block_n)
        for card in (RTX_3060, RTX_4060, RTX_4090)
        for rows, features in ((14080, 4096), (500, 2048), (126, 8192), (126, 2048), (1, 4096))
        for config in [matmul_config("int8", card, rows, features)]
    }
    small = {key for key, size in sizes.items() if size == (64, 64)}
    # Counts of tiles: 500x2048 has 256 of 64x64 and 128 of 64x128, two for each of a 4060's 24.
    assert small == {
        (28, 126, 8192), (28, 126, 2048), (28, 1, 4096),
        (24, 126, 8192), (24, 126, 2048), (24, 1, 4096),
        (128, 500, 2048), (128, 126, 8192), (128, 126, 2048), (128, 1, 4096),
    }  # fmt: skip
    assert all(sizes[count, 14080, 4096] == (128, 128) for count in (24, 28, 128))
    assert sizes[28, 500, 2048] == sizes[24, 500, 2048] == (64, 128)


def test_sums_are_split_where_tiles_leave_a_card_half_idle():
    def parts(card: Card, rows: int, features: int, columns: int) -> int:
        config = matmul_config("int8", card, rows, features)
        return matmul_parts(config, card, (rows, features), columns)

    for card in (RTX_3060, RTX_4060):  # filled by the tiles of every matmul of the audio stream
        assert parts(card, 126, 2048, 2048) == parts(card, 126, 2048, 8192) == 1
    # 64 tiles of four warps, where 128 and 132 multiprocessors want eight warps each.
    assert parts(RTX_4090, 126, 2048, 8192) == parts(H200, 126, 2048, 8192) == 4
    assert parts(RTX_4090, 126, 2048, 2048) == 1  # parts of 2048 or more
    assert parts(RTX_4090, 500, 2048, 8192) == parts(RTX_4090, 14080, 4096, 16384) == 1


def test_partial_sums_are_accounted_as_the_largest_card_makes_them():
    def workspace(rows: int, features: int, columns: int) -> int:
        a = torch.empty(rows, columns, dtype=torch.int8, device="meta")
        out = torch.empty(rows, features, device="meta")
        return matmul.workspace_bytes(None, [a], None, False, [], out)

    assert workspace(126, 2048, 8192) == 4 * 126 * 2048 * 4
    assert workspace(6144, 4096, 16384) == workspace(126, 2048, 2048) == 0


def test_configurations_are_chosen_by_card():
    def config(capability: int, rows: int, adds: bool = False) -> object:
        return matmul_config("int8", Card(capability, 1), rows, 4096, adds)

    assert config(87, 5000) is config(86, 5000)
    assert config(75, 1) is config(80, 1)
    assert config(121, 9) is config(120, 9)
    assert config(90, 4096) is not config(89, 4096)
    assert config(90, 5000).block_n == 2 * config(90, 5000, adds=True).block_n


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
        ((a, ScaledRows(w.codes.half(), w.scales, w.rotation)), "torch.int8 rows, got torch.fl"),
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
