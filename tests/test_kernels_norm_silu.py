"""Channels normed at each place and activated, in the layouts the video VAE has."""

from types import SimpleNamespace

import pytest
import torch
from kernel_device import kernel_device, run_interpreted
from narrow_vae import narrow_decoder, narrow_encoder
from torch import Tensor
from torch.nn import Conv3d

from ltxlite.memory.meter import ActivationMeter
from ltxlite.models import causal_conv
from ltxlite.models.causal_conv import CausalConv3d, Piece
from ltxlite.models.rolling import GROUP_BYTES, decode_frames, encode_frames
from ltxlite.models.tiled_window import decode_window
from ltxlite.models.tiling import Span
from ltxlite.models.video_vae import VideoDecoder, depth_to_space, space_to_depth
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.models.window import DecodeWindow
from ltxlite_kernels import norm_silu as kernels
from ltxlite_kernels import reference_rows
from ltxlite_kernels.norm_silu import SLOTS, norm_silu, spread
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


def activated(x: Tensor) -> Tensor:
    wide = x.double()
    wide = wide / (wide.square().mean(2, keepdim=True) + EPS).sqrt()
    return wide * (1 + torch.tanh(wide / 2)) / 2


def assert_near(found: Tensor, x: Tensor) -> None:
    wanted = activated(x)
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


def inside(x: Tensor) -> Tensor:
    """The same frames, channels side by side."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


@pytest.mark.parametrize("sides", ["in", "out", "in out"])
@pytest.mark.parametrize("shape", [(2, 2, 40, 3, 5), (1, 1, 128, 4, 17), (1, 2, 1, 2, 3)])
def test_kernel_norms_channels_that_lie_side_by_side(device, shape, sides):
    x = (randoms(*shape, seed=6) * 30).bfloat16()
    given, out = x.to(device), torch.full_like(x, torch.nan).to(device)
    given = inside(given) if "in" in sides.split() else given
    out = inside(out) if "out" in sides else out
    assert norm_silu(given, EPS, out) is out
    assert_near(out, x)


@pytest.mark.parametrize("eps", [EPS, None])
@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize(
    ("count", "first", "frames"), [(1, 0, 3), (4, 0, 2), (4, 3, 3), (4, 5, 1), (3, 1, 3)]
)
@pytest.mark.parametrize("lie", [inside, torch.Tensor.contiguous])
def test_kernel_writes_frames_into_each_window_that_has_them(
    device, lie, count, first, frames, margin, eps
):
    x = (randoms(2, frames, 24, 3, 5, seed=7) * 30).bfloat16()
    room = torch.full((2, count, 3 + 2 * margin, 5 + 2 * margin, SLOTS, 24), torch.nan)
    windows = room.bfloat16().to(device).permute(0, 1, 4, 5, 2, 3)
    inner = windows[..., margin : margin + 3, margin : margin + 5]
    spread(lie(x.to(device)), inner, first, eps)
    twin = torch.full_like(inner, torch.nan).cpu()
    reference_rows.spread(x, twin, first, eps)
    written = 0
    for window in range(count):
        for slot in range(SLOTS):
            frame = window + slot - first
            if not 0 <= frame < frames:
                continue
            written += 1
            for found in (inner[:, window, slot].cpu(), twin[:, window, slot]):
                seen = x[:, frame]
                if eps is None:
                    assert torch.equal(found, seen)
                else:
                    assert_near(found[:, None], seen[:, None])
    # Nothing else was written, in other slots or beside the frames.
    assert int((~windows.isnan()).sum()) == written * x[:, 0].numel() > 0


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
    assert "64 passed" in run_interpreted("test_kernels_norm_silu.py")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2, 3, 4), "B, F, C, Y, X"),
        (torch.zeros(1, 1, 4096, 1, 1), "at most 2048"),
        (torch.zeros(1, 1, 4, 4, 8)[..., ::2], "columns side by side"),
        (torch.zeros(1, 1, 4, 4, 4, dtype=torch.int8), "int8"),
    ],
)
def test_frames_that_do_not_fit_are_refused(x, message):
    with pytest.raises(FormatError, match=message):
        norm_silu(x, EPS)


@pytest.mark.parametrize(
    "windows", [torch.zeros(1, 1, 2, 4, 5, 6), torch.zeros(1, 1, 3, 4, 5, 7), torch.zeros(4)]
)
def test_windows_of_another_shape_are_refused(windows):
    with pytest.raises(FormatError, match="windows of frames"):
        spread(torch.zeros(1, 1, 4, 5, 6), windows, 0)
    with pytest.raises(FormatError, match="x is"):
        spread(torch.zeros(1, 1, 4, 5, 12)[..., ::2], torch.zeros(1, 1, 3, 4, 5, 6), 0)


# The path of a card, on this machine: the twins, and torch's convolutions, channels inside.


@pytest.fixture
def card_path(monkeypatch):
    """Return a switch that makes networks take it."""
    return lambda: monkeypatch.setattr(kernels, "fuses", lambda x: kernels.takes(x))


def assert_close(found: Tensor, plain: Tensor, limit: float = 1e-5) -> None:
    assert found.shape == plain.shape
    # 2^-24 of each value, in 40 convolutions of random networks, is 1e-6; a norm left out or a
    # frame in a wrong slot shows as 1e-1 or more.
    assert float((found - plain).norm() / plain.norm()) < limit


def assert_turned(network: torch.nn.Module) -> None:
    """All convolutions read their weights with channels inside, none fell back to planes."""
    strides = [conv.weight.stride(1) for conv in network.modules() if isinstance(conv, Conv3d)]
    assert len(strides) > 30 and set(strides) == {1}


FAMILIES = pytest.mark.parametrize(
    ("family", "padding"), [("2.3", "zeros"), ("2.0", "reflect"), ("2.0", "zeros")]
)


@FAMILIES
def test_the_decoder_computes_the_same_on_the_path_of_a_card(card_path, family, padding):
    decoder, latent = narrow_decoder(family, padding).float(), randoms(2, 8, 3, 2, 3, seed=5)
    with torch.no_grad():
        plain = decoder(latent)
        card_path()
        assert_close(decoder(latent), plain)
        for group_bytes in (1, 50_000, GROUP_BYTES):
            rolled = list(decode_frames(decoder, latent, group_bytes))
            assert_close(torch.cat(rolled, dim=2), plain)
    assert_turned(decoder)


@FAMILIES
def test_the_encoder_computes_the_same_on_the_path_of_a_card(card_path, family, padding):
    encoder, pixels = narrow_encoder(family, padding).float(), randoms(2, 3, 17, 64, 96, seed=5)
    with torch.no_grad():
        plain = encoder(pixels)
        card_path()
        assert_close(encoder(pixels), plain)
        for frames, group_bytes in ((1, 1), (4, 50_000), (17, GROUP_BYTES)):
            assert_close(encode_frames(encoder, pixels.split(frames, dim=2), group_bytes), plain)
    assert_turned(encoder)


@pytest.mark.parametrize("frames", [Span(), Span(3, 1)])
def test_tiles_are_the_same_on_the_path_of_a_card(card_path, frames):
    decoder, latent = narrow_decoder("2.0", "reflect").float(), randoms(1, 8, 4, 5, 4, seed=5)
    window = DecodeWindow(1, Span(4, 2), Span(3, 2), frames=frames)
    plain = torch.cat(list(decode_window(decoder, latent, window)), dim=2)
    card_path()
    found = torch.cat(list(decode_window(decoder, latent, window)), dim=2)
    # Tiles of space wait in fp16: 2^-11, of the few values that then round to the other side.
    assert_close(found, plain, 1e-5 if window.is_classical else 1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("most", [1, 2, 64])
def test_a_convolution_is_the_same_with_channels_inside(card_path, causal, padding, most):
    conv, x = CausalConv3d(5, 7, causal, padding), randoms(2, 5, 5, 3, 4, seed=8)
    with torch.no_grad():
        plain = conv(x, Piece.activated)
        card_path()
        pieces = [x[:, :1]] * conv.before + [inside(x[:, :2]), x[:, 2:]] + [x[:, 4:]] * conv.after
        found = conv.convolve([Piece.activated(piece) for piece in pieces], most)
        assert found.stride(2) == 1  # and it stays so
        assert_close(found, plain)


def test_a_weight_is_turned_in_its_own_memory_and_keeps_its_values(card_path, monkeypatch):
    monkeypatch.setattr(causal_conv, "TURNED_BYTES", 7 * 27 * 6 * 4)  # 300 rows are no multiple
    conv = CausalConv3d(6, 300, False, "zeros")
    before, address = conv.conv.weight.detach().clone(), conv.conv.weight.data_ptr()
    with torch.no_grad():
        plain = conv(randoms(1, 2, 6, 3, 4))
        card_path()
        for _ in range(2):
            assert_close(conv(randoms(1, 2, 6, 3, 4)), plain)
            weight = conv.conv.weight
            assert torch.equal(weight, before) and weight.data_ptr() == address
            assert weight.transpose(1, 2).flatten(1, 2).data_ptr() == address  # no copy of it
            assert weight.stride() == (27 * 6, 1, 6, 9 * 6, 3 * 6)


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("frames", [2, 4])
def test_folding_leaves_channels_inside(stride, frames):
    x = randoms(2, frames, 8, 4, 6)
    for fold in (space_to_depth, depth_to_space):
        found = fold(inside(x), stride)
        assert torch.equal(found, fold(x, stride)) and found.stride(2) == 1
        one = fold(inside(x)[:1, :1] if fold is depth_to_space else inside(x)[:1], stride)
        assert one.stride(2) == 1


@pytest.mark.parametrize("group_bytes", [1, 4 << 20, GROUP_BYTES])
@pytest.mark.parametrize(("family", "latents"), [("2.3", 5), ("2.0", 4)])
def test_the_path_of_a_card_needs_no_more_than_the_account_says(
    card_path, family, latents, group_bytes
):
    with torch.device("meta"):
        decoder = VideoDecoder(VideoVAEConfig.released(family)).bfloat16()
    latent = torch.empty(1, 128, latents, 8, 12, dtype=torch.bfloat16, device="meta")

    def peak() -> int:
        with ActivationMeter() as meter:
            for part in decode_frames(decoder, latent, group_bytes):
                del part
        return meter.peak_bytes

    account = peak()
    card_path()
    peak()  # turns the weights
    assert account * 0.8 < peak() <= account


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
