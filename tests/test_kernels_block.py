"""A whole transformer whose every product, norm and attention is a kernel, beside torch's parts."""

from functools import cache

import pytest
import torch
from kernel_device import kernel_device, run_interpreted
from torch import Tensor

from benchmarks.quality import exact_model
from benchmarks.step import Size, random_pass
from ltxlite.math_mode import set_math
from ltxlite.models import activation, attention
from ltxlite.models.attention import Attention
from ltxlite.models.transformer import Transformer

# One head of 64, the smaller size that attention has kernels for; sequences of odd lengths. Rows of
# 64 are not turned, those of the feed-forward's 256 are.
SIZE = Size(1, 1, 64, 64, (1, 3, 5), 9, 7)
# int8 of both sides 1.3 % a product of Gaussian rows; norms and gates, fused, round otherwise.
LIMITS = {"int8": 0.03, "bf16": 2e-3}


@cache
def network() -> Transformer:
    return exact_model(0, SIZE)


def outputs(transformer: Transformer, device: str) -> Tensor:
    given = random_pass(SIZE, torch.float32)
    with torch.inference_mode():
        velocity = transformer.to(device)(_moved(given, device))
    assert velocity.video is not None and velocity.audio is not None
    return torch.cat([velocity.video.flatten(), velocity.audio.flatten()]).cpu()


def _moved(value: object, device: str) -> object:
    from ltxlite.account.phase import on_card

    return on_card(value, {}, torch.device(device))


@pytest.mark.parametrize("mode", LIMITS)
def test_kernel_transformer_equals_the_plain_one(mode: str, monkeypatch) -> None:
    device = kernel_device()
    transformer = network()
    set_math(transformer, "bf16", None)
    exact = outputs(transformer, device)
    set_math(transformer, mode, None)
    for module in transformer.modules():
        if isinstance(module, Attention) and module.int8_from:
            module.int8_from = 1
    # The CPU of the interpreter stands for a card: elementwise kernels too.
    for module in (activation, attention):
        monkeypatch.setattr(module, "fuses", lambda x: not torch.is_grad_enabled())
    found = outputs(transformer, device)
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < LIMITS[mode]


def test_kernels_run_in_the_interpreter() -> None:
    assert "2 passed" in run_interpreted("test_kernels_block.py")
