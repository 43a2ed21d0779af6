"""Muon: singular values become 1, directions stay, and runs that were stopped go on."""

from pathlib import Path

import pytest
import torch

from ltxlite.training import audio_vae
from ltxlite.training.loop import Pace
from ltxlite.training.muon import Muon, orthogonal

PACE = Pace(steps=4, rate=2e-3, warmup=2, matrix_rate=0.02)


@pytest.mark.parametrize("shape", [(7, 7), (24, 9), (5, 33)], ids=str)
def test_an_orthogonal_step_has_singular_values_near_one_and_the_same_directions(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonal(matrix)
    inside = left.T @ made @ right.T  # diagonal where singular vectors are the same
    assert values.max() / values.min() > 1.5
    # The quintic ends between 0.68 and 1.13 from wherever above 0.02 of the norm it started.
    assert inside.diagonal().min() > 0.6 and inside.diagonal().max() < 1.25
    rest = inside - inside.diagonal().diag()
    assert rest.abs().max() < 0.05  # rounding of five rounds in bf16


def test_a_step_moves_kernels_as_matrices_by_the_rate() -> None:
    kernel = torch.nn.Parameter(torch.zeros(6, 2, 3, 3))
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(4))
    Muon([kernel], lr=0.5).step()
    moved = torch.linalg.svdvals(kernel.detach().flatten(1))
    assert moved.min() > 0.5 * 0.6 and moved.max() < 0.5 * 1.25
    assert float((kernel.detach() * kernel.grad).sum()) < 0  # downhill


def test_a_parameter_without_gradient_stays() -> None:
    kernel = torch.nn.Parameter(torch.ones(2, 2))
    Muon([kernel], lr=0.5).step()
    assert torch.equal(kernel.detach(), torch.ones(2, 2))


def test_a_stopped_run_with_muon_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    with torch.enable_grad():
        whole = audio_vae.AudioVAETraining(tmp_path / "whole", PACE)
        whole.run(lambda _: None)
        first = audio_vae.AudioVAETraining(tmp_path / "parts", PACE)
        for step in range(2):
            first.loop.learn(first.losses(step), lambda _: None)
        first.loop.save()
        second = audio_vae.AudioVAETraining(tmp_path / "parts", PACE)
        second.run(lambda _: None)
    for name, value in whole.loop.parameters.items():
        assert torch.equal(value, second.loop.parameters[name]), name
