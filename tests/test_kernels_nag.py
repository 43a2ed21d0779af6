"""NAG and relay as a card runs them, norms fused and bias rows looked up, beside torch's parts."""

from copy import deepcopy

import pytest
import torch
from kernel_device import kernel_device, run_interpreted
from steered_text_support import steered
from torch import Tensor

from benchmarks.quality import exact_model
from benchmarks.step import Size, random_pass
from ltxlite.account.phase import on_card
from ltxlite.math_mode import set_math
from ltxlite.models import activation, attention
from ltxlite.models.passes import Pass
from ltxlite.models.transformer import Transformer

SIZE = Size(1, 1, 64, 64, (2, 1, 3), 5, 7)  # heads that attention has kernels for, odd lengths
LIMIT = 5e-3  # norms and gates, fused, round otherwise; NAG multiplies differences by 5


def outputs(transformer: Transformer, given: Pass, device: str) -> Tensor:
    with torch.inference_mode():
        velocity = transformer.to(device)(on_card(given, {}, torch.device(device)))
    assert velocity.video is not None and velocity.audio is not None
    return torch.cat([velocity.video.flatten(), velocity.audio.flatten()]).cpu()


def test_kernel_transformer_is_steered_as_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, transformer = kernel_device(), deepcopy(exact_model(0, SIZE))  # it is cached
    plain = random_pass(SIZE, torch.float32)
    given = Pass(*steered(plain, SIZE))
    set_math(transformer, "bf16", None)
    exact, other = (outputs(transformer, one, device) for one in (given, plain))
    transformer.chunk = 4  # rows of a bias are looked up from the middle of a sequence too
    # The CPU of the interpreter stands for a card: elementwise kernels too.
    for module in (activation, attention):
        monkeypatch.setattr(module, "fuses", lambda x: not torch.is_grad_enabled())
    found = outputs(transformer, given, device)
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < LIMIT
    assert float((other - exact).norm() / exact.norm()) > 2 * LIMIT


def test_kernels_run_in_the_interpreter() -> None:
    assert "1 passed" in run_interpreted("test_kernels_nag.py")
