"""Heads gated by 2 sigmoid(logit), in place or on the way to codes."""

import math

import pytest
import torch
from kernel_device import kernel_device, run_interpreted
from test_kernels_quantize import ROTATED_STEPS, randoms, steps_off, turned
from torch import Tensor

from ltxlite_kernels import gate_heads as kernels
from ltxlite_kernels import reference, reference_rows
from ltxlite_kernels.coding import Coding
from ltxlite_kernels.gate_heads import gate_heads, gate_heads_quantize
from ltxlite_kernels.rotate import Rotation
from ltxlite_quant.formats import FormatError

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


@pytest.fixture
def device() -> str:
    return kernel_device()


def exact(mixed: Tensor, logits: Tensor) -> Tensor:
    """Return gated rows in float64, by the tangent form of the sigmoid."""
    gates = 1 + torch.tanh(logits.double() / 2)
    return (mixed.double().unflatten(1, (logits.shape[1], -1)) * gates[..., None]).flatten(1)


@pytest.mark.parametrize("rotation", list(Rotation))
@pytest.mark.parametrize(("heads", "head"), [(6, 128), (12, 64), (2, 384), (1, 512), (5, 256)])
def test_kernel_gates_heads_before_it_rounds(device, rotation, heads, head):
    columns = heads * head
    mixed = (randoms(3, columns + 8, seed=1) * 20).bfloat16()[:, :columns]
    logits = (randoms(3, heads + 5, seed=2) * 4).bfloat16()[:, 5:]  # after other projections
    found = gate_heads_quantize(mixed.to(device), logits.to(device), rotation)
    wanted = turned(exact(mixed, logits), rotation)
    # exp of fp32 leaves 2^-20 of a value, 127 * 2^-20 of a step, beside the half of rounding.
    assert steps_off(found, wanted) <= (ROTATED_STEPS if rotation else 0.501)
    twin = reference.quantize_rows(reference_rows.gated(mixed, logits), rotation)
    assert (found.codes.cpu().int() - twin.codes.int()).abs().max() <= 1


@pytest.mark.parametrize(("heads", "head"), [(3, 16), (7, 12), (1, 100)])
def test_kernel_gates_heads_of_any_size(device, heads, head):
    mixed, logits = randoms(4, heads * head, seed=3), randoms(4, heads, seed=4)
    found = gate_heads_quantize(mixed.to(device), logits.to(device))
    assert steps_off(found, exact(mixed, logits)) <= 0.501  # as above


def test_kernel_gates_heads_to_fp16_codes(device):
    mixed, logits = randoms(3, 768, seed=5).bfloat16(), randoms(3, 6, seed=6).bfloat16()
    found = gate_heads_quantize(mixed.to(device), logits.to(device), Coding(torch.float16))
    wanted = exact(mixed, logits)
    off = (found.codes.cpu().double() * found.scales.cpu().double()[:, None] - wanted).abs()
    # fp16 rounds to 11 bits, its smallest step of 2^-24 is 2^-29 of the largest; fp32 is below.
    assert (off <= 2**-11 * 1.01 * wanted.abs() + 2**-29 * wanted.abs().amax(1, True)).all()


def test_kernel_without_logits_rounds_only(device):
    mixed = randoms(3, 256, seed=7).bfloat16()
    found = gate_heads_quantize(mixed.to(device), None)
    assert torch.equal(found.codes.cpu(), reference.quantize_rows(mixed).codes)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("heads", "head"), [(3, 128), (5, 64), (3, 12), (2, 384)])
def test_kernel_gates_heads_in_place(device, dtype, heads, head):
    columns = heads * head
    whole = (randoms(5, columns + 8, seed=8) * 20).to(dtype)
    whole[:, columns:] = torch.nan  # beside the rows, to stay as it is
    logits = (randoms(5, heads, seed=9) * 4).to(dtype)
    given = whole.clone().to(device)
    found = gate_heads(given[:, :columns], logits.to(device))
    assert found.data_ptr() == given.data_ptr()
    assert given[:, columns:].isnan().all()
    wanted = exact(whole[:, :columns], logits)
    off = (found.cpu().double() - wanted).abs()
    # One rounding; fp32's sigmoid is within 2^-20 of itself, fp16 has no normals below 2^-14.
    assert (off <= (ROUNDING[dtype] + 2**-20) * wanted.abs() + 2**-25).all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy, of exp(200)
def test_kernel_closes_and_doubles_heads_and_passes_nan_on(device):
    mixed, logits = torch.ones(3, 384), torch.tensor([-200.0, 0.0, 200.0]).repeat(3, 1)
    mixed[1, 200], logits[2, 1] = torch.nan, torch.nan
    found = gate_heads_quantize(mixed.to(device), logits.to(device))
    assert found.codes[0].unflatten(0, (3, -1)).float().mean(1).tolist() == [0, 64, 127]
    assert math.isclose(float(found.scales[0]), 2 / 127, rel_tol=1e-6)
    assert found.scales[1:].isnan().all()


def test_the_gate_heads_kernels_pass_under_the_interpreter():
    assert "33 passed" in run_interpreted("test_kernels_gate_heads.py")


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 4), "3 rows"),
        (torch.zeros(3, 5), "5 heads"),
        (torch.zeros(4, 3).T, "side by side"),
        (torch.zeros(3, 4, dtype=torch.int32), "fp32, fp16 or bf16"),
        (torch.zeros(3, 0), "0 heads"),
    ],
)
def test_gates_that_do_not_fit_are_refused(logits, message):
    for function in (gate_heads, kernels.gate_heads_quantize):
        with pytest.raises(FormatError, match=message):
            function(torch.zeros(3, 64), logits)
