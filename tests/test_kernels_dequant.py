"""The dequantization kernel against its twin, on a GPU or under Triton's interpreter.

The kernel tests run on a card where there is one; elsewhere a process of its own runs them on the
CPU with TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ltxlite_kernels import dequant
from ltxlite_kernels.configs import DEQUANT
from ltxlite_quant import FORMATS, FormatError, decode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import triton_shim

    triton_shim.install()
Q8_0 = FORMATS["Q8_0"]


@pytest.fixture
def device() -> str:
    if not dequant.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    if INTERPRETED:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("no CUDA device; the interpreter test runs this one on the CPU")


def q8_0_blocks(rows: int, blocks: int) -> torch.Tensor:
    """Random codes and finite fp16 scales, subnormal ones among them."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (rows * blocks, 34), dtype=np.uint8)
    scale = rng.standard_normal(rows * blocks) * 10.0 ** rng.integers(-6, 2, rows * blocks)
    raw[:, :2] = scale.astype(np.float16)[:, None].view(np.uint8)
    return torch.from_numpy(raw).view(rows, -1)


def random_blocks(name: str, rows: int, blocks: int) -> torch.Tensor:
    """Any bytes are blocks; those with values beyond fp16, or NaN, are replaced by others."""
    block_format, count = FORMATS[name], rows * blocks
    rng = np.random.default_rng(1)
    raw = torch.from_numpy(rng.integers(0, 256, (8 * count, block_format.block_bytes), np.uint8))
    values = decode.DECODERS[name](raw)
    good = raw[(values.abs() < 65504).all(dim=1)]
    return good[:count].view(rows, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 3), (5, 13)])
@pytest.mark.parametrize("name", sorted(DEQUANT))
def test_kernel_has_the_bits_of_its_twin_and_writes_nothing_else(device, name, dtype, rows, blocks):
    block_format = FORMATS[name]
    raw = random_blocks(name, rows, blocks).to(device)
    shape = (rows, block_format.block_size * blocks)
    size = shape[0] * shape[1]
    buffer = torch.full((size + 4096,), torch.nan, dtype=dtype, device=device)
    out = buffer[:size].view(shape)
    result = dequant.dequantize(raw, block_format, shape, dtype, out)
    wanted = decode.dequantize(raw.cpu(), block_format, shape, dtype)
    assert result is out
    # Exact fp32 products, at most one rounding of a difference, one to the dtype: equal bits.
    assert torch.equal(out.cpu(), wanted)
    assert buffer[size:].isnan().all()


def test_kernel_keeps_subnormal_scales(device):
    raw = q8_0_blocks(63, 5).to(device)
    found = dequant.dequantize(raw, Q8_0, (63, 160), torch.float32)
    assert torch.equal(found.cpu(), decode.dequantize(raw.cpu(), Q8_0, (63, 160), torch.float32))


def test_kernel_takes_a_slice_of_rows_and_no_rows_at_all(device):
    raw = q8_0_blocks(9, 3).to(device)
    part = dequant.dequantize(raw[4:7], Q8_0, (3, 96), torch.float32)
    assert torch.equal(part.cpu(), decode.dequantize(raw[4:7].cpu(), Q8_0, (3, 96), torch.float32))
    assert dequant.dequantize(raw[:0], Q8_0, (0, 96), torch.float32).shape == (0, 96)


def test_kernel_refuses_what_it_does_not_check_itself(device):
    raw = q8_0_blocks(4, 2).to(device)
    strided = torch.cat([raw, raw], 1)[:, :68]
    odd = torch.cat([raw.flatten()[:1], raw.flatten()])[1:].view(4, 68)
    for blocks, dtype, message in (
        (strided, torch.float32, "contiguous"),
        (odd, torch.float32, "multiple of 2 bytes"),
        (raw, torch.float64, "fp32, fp16 or bf16"),
        (raw[:3], torch.float32, "uint8"),
    ):
        with pytest.raises(FormatError, match=message):
            dequant.dequantize(blocks, Q8_0, (4, 64), dtype)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter process")
@pytest.mark.skipif(not dequant.HAVE_TRITON, reason="Triton is not installed")
def test_the_kernel_tests_pass_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "test_kernel_", __file__]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(DEQUANT) * 9 + 3} passed" in done.stdout
    assert "skipped" not in done.stdout


def test_every_kernel_has_a_configuration_a_format_and_a_twin():
    assert set(DEQUANT) <= set(decode.DECODERS) <= set(FORMATS)
    if dequant.HAVE_TRITON:
        assert set(dequant.KERNELS) == set(DEQUANT)


def test_a_cpu_tensor_is_decoded_by_the_twin():
    raw = q8_0_blocks(3, 5)
    wanted = decode.dequantize(raw, Q8_0, (3, 160), torch.bfloat16)
    assert torch.equal(dequant.dequantize(raw, Q8_0, (3, 160), torch.bfloat16), wanted)


def test_the_module_works_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("dequant_without_triton", dequant.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.HAVE_TRITON
    raw = q8_0_blocks(2, 3)
    wanted = decode.dequantize(raw, Q8_0, (2, 96), torch.float16)
    assert torch.equal(module.dequantize(raw, Q8_0, (2, 96), torch.float16), wanted)


def test_the_slow_path_on_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr(dequant, "HAVE_TRITON", False)
    with pytest.warns(RuntimeWarning, match="Q8_0 is decoded by plain torch.*Triton is not inst"):
        dequant._warn_if_slow(Q8_0, SimpleNamespace(is_cuda=True))
