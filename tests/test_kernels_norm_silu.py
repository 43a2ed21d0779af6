"""Channels normed at each place and activated, in the layouts the video VAE has."""

from types import SimpleNamespace

import pytest
import torch
from kernel_device import kernel_device, run_interpreted
from narrow_vae import narrow_decoder
from torch import Tensor

from ltxlite.models.rolling import decode_frames
from ltxlite_kernels import norm_silu as kernels
from ltxlite_kernels import reference_rows
from ltxlite_kernels.norm_silu import norm_silu
from ltxlite_kernels.rotate import HAVE_TRITON
from ltxlite_quant.formats import FormatError

EPS = 1e-8
# One rounding to the type; fp32 leaves 2^-19 of a value: sums of 1024 squares, exp, a quotient.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


@pytest.fixture
def device() -> str:
    return kernel_device()


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Tensor, x: Tensor) -> None:
    wide = x.double()
    wide = wide / (wide.square().mean(2, keepdim=True) + EPS).sqrt()
    wanted = wide * (1 + torch.tanh(wide / 2)) / 2
    off = (found.cpu().double() - wanted).abs()
    # Values that SiLU makes small are the product of a value and a small gate: relative as well.
    limit = (ROUNDING[found.dtype] + 2**-19) * wanted.abs() + torch.finfo(found.dtype).tiny
    assert (off <= limit).all()


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    "shape", [(1, 2, 128, 5, 7), (2, 1, 100, 3, 40), (1, 1, 1024, 1, 3), (1, 3, 1, 2, 2)]
)
def test_kernel_norms_and_activates_channels(device, dtype, shape):
    x = (randoms(*shape, seed=1) * 30).to(dtype)
    found = norm_silu(x.to(device), EPS)
    assert found.dtype == dtype and found.is_contiguous()
    assert_near(found, x)
    assert_near(reference_rows.norm_silu(x, EPS), x)


def test_kernel_writes_into_the_room_of_a_convolution_within_its_margin(device):
    x = (randoms(2, 5, 24, 3, 70, seed=2)).bfloat16()[:, 1:4]  # some frames of more
    room = torch.full((2, 24, 6, 5, 72), torch.nan, dtype=torch.bfloat16, device=device)
    target = room[..., 1:-1, 1:-1].transpose(1, 2)[:, 2:5]
    norm_silu(x.to(device), EPS, out=target)
    assert_near(target, x)
    target.fill_(torch.nan)
    assert room.isnan().all()  # nothing beside it was written


def test_kernel_works_in_place(device):
    x = randoms(1, 2, 32, 4, 9, seed=3).half()
    given = x.clone().to(device)
    assert norm_silu(given, EPS, out=given) is given
    assert_near(given, x)


def test_kernel_keeps_zeros_and_passes_nan_on_at_its_place(device):
    x = randoms(1, 1, 16, 1, 3, seed=4)
    x[..., 0], x[0, 0, 3, 0, 1] = 0, torch.nan
    found = norm_silu(x.to(device), EPS)[0, 0, :, 0].T
    assert (found[0] == 0).all()
    assert found[1].isnan().all()
    assert found[2].isfinite().all()


def test_the_norm_silu_kernels_pass_under_the_interpreter():
    assert "15 passed" in run_interpreted("test_kernels_norm_silu.py")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2, 3, 4), "B, F, C, Y, X"),
        (torch.zeros(1, 1, 4096, 1, 1), "at most 2048"),
        (torch.zeros(1, 1, 4, 4, 4).transpose(3, 4), "columns side by side"),
        (torch.zeros(1, 1, 4, 4, 4, dtype=torch.int8), "int8"),
    ],
)
def test_frames_that_do_not_fit_are_refused(x, message):
    with pytest.raises(FormatError, match=message):
        norm_silu(x, EPS)


@pytest.mark.parametrize(("family", "padding"), [("2.3", "zeros"), ("2.0", "reflect")])
def test_the_video_vae_computes_the_same_with_the_kernel(monkeypatch, family, padding):
    decoder, latent = narrow_decoder(family, padding).float(), randoms(1, 8, 2, 2, 3, seed=5)
    with torch.no_grad():
        plain = decoder(latent)
        asked = []
        monkeypatch.setattr(kernels, "fuses", lambda x: asked.append(x) or True)
        whole = decoder(latent)
        rolled = torch.cat(list(decode_frames(decoder, latent, group_bytes=1)), dim=2)
    assert len(asked) > 40
    # 2^-24 of each value, in 40 convolutions of random networks, is 1e-6; a norm left out shows
    # as 1e-1 or more.
    for found in (whole, rolled):
        assert float((found - plain).norm() / plain.norm()) < 1e-4


def test_the_kernel_is_for_cards_and_without_gradients():
    with torch.no_grad():
        assert not kernels.fuses(torch.zeros(1, 1, 4, 4, 4))
    frames = SimpleNamespace(is_cuda=True, dim=lambda: 5, dtype=torch.float32)
    frames.shape, frames.stride = (1, 1, 4, 4, 4), lambda _: 1
    with torch.enable_grad():
        assert not kernels.fuses(frames)
    with torch.no_grad():
        assert kernels.fuses(frames) == HAVE_TRITON


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(FormatError, match="out is"):
        norm_silu(torch.zeros(1, 1, 4, 4, 4), EPS, out=torch.zeros(1, 1, 4, 4, 5))
