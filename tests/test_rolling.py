"""Rolling along time must not change the result, and must not keep what it has passed."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from narrow_vae import narrow_config, narrow_decoder, narrow_encoder, shallow
from torch import Tensor

from ltxlite.errors import ShapeError
from ltxlite.memory.meter import ActivationMeter
from ltxlite.models.causal_conv import CausalConv3d
from ltxlite.models.rolling import GROUP_BYTES, decode_frames, encode_frames
from ltxlite.models.video_vae import (
    DepthToSpaceUpsample,
    VideoDecoder,
    VideoEncoder,
)
from ltxlite.models.video_vae_config import VideoVAEConfig

# float64 over some 40 convolutions of random networks: 0 measured where groups do not change how a
# convolution adds up, 1e-11 where they may; a wrong frame at an edge shows as 1e-2 or more.
TOLERANCE = 1e-11
SIZES = [(1, 3, 2), (2, 2, 3), (3, 3, 3), (5, 2, 2)]  # latent frames, rows, columns
FAMILIES = pytest.mark.parametrize("family", ["2.0", "2.3"])
PADDINGS = pytest.mark.parametrize("padding", ["zeros", "reflect"])


def relative_error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@FAMILIES
@PADDINGS
@pytest.mark.parametrize("size", SIZES)
def test_decoding_in_groups_equals_decoding_at_once(
    family: str, padding: Any, size: tuple[int, int, int]
) -> None:
    decoder = narrow_decoder(family, padding)
    latent = noise(2, 8, *size)
    wanted = decoder(latent)
    for group_bytes in (1, 50_000, GROUP_BYTES):  # one frame, some frames, the clip in one go
        got = torch.cat(list(decode_frames(decoder, latent, group_bytes)), dim=2)
        assert relative_error(got, wanted) < TOLERANCE


@pytest.mark.parametrize(("family", "padding"), [("2.0", "reflect"), ("2.3", "zeros")])
def test_121_frames_in_fp32_differ_by_rounding_only(family: str, padding: Any) -> None:
    decoder = narrow_decoder(family, padding).float()
    latent = noise(1, 8, 16, 3, 2).float()
    wanted = decoder(latent)
    for group_bytes in (60_000, 200_000):
        got = torch.cat(list(decode_frames(decoder, latent, group_bytes)), dim=2)
        assert relative_error(got, wanted) < 1e-5  # of the range; 1e-6 measured


def test_decoding_a_clip_longer_than_the_receptive_field_equals_decoding_at_once() -> None:
    decoder = narrow_decoder("2.3")
    latent = noise(1, 8, 18, 1, 2)  # 13.5 latents ahead are seen, so the last groups flow steadily
    parts = list(decode_frames(decoder, latent, group_bytes=1))
    assert len(parts) > 100
    assert relative_error(torch.cat(parts, dim=2), decoder(latent)) < TOLERANCE


@FAMILIES
@PADDINGS
@pytest.mark.parametrize("frames", [1, 17])
def test_encoding_in_groups_equals_encoding_at_once(family: str, padding: Any, frames: int) -> None:
    encoder = narrow_encoder(family, padding)
    pixels = noise(1, 3, frames, 64, 96)
    wanted = encoder(pixels)
    for pieces, group_bytes in ((1, 1), (4, 50_000), (frames, GROUP_BYTES)):
        got = encode_frames(encoder, pixels.split(pieces, dim=2), group_bytes)
        assert relative_error(got, wanted) < TOLERANCE


def test_encoding_leaves_out_the_frames_after_the_last_whole_latent() -> None:
    encoder = narrow_encoder("2.3")
    pixels = noise(1, 3, 15, 32, 64)
    got = encode_frames(encoder, pixels.split(4, dim=2))
    assert relative_error(got, encoder(pixels[:, :, :9])) < TOLERANCE


@functools.cache
def shallow_decoder() -> VideoDecoder:
    with torch.device("meta"):
        return VideoDecoder(shallow(narrow_config("2.3", "zeros")))


@functools.cache
def account_of_decoding(latents: int, group_bytes: int) -> tuple[int, int]:
    """Return the peak of live bytes, and what lives when the first frame is handed over."""
    decoder = shallow_decoder()
    latent = torch.empty(1, 8, latents, 4, 6, device="meta")
    with ActivationMeter() as meter:
        parts = decode_frames(decoder, latent, group_bytes)
        next(parts)
        first = meter.current_bytes
        for frames in parts:
            del frames
    assert meter.current_bytes == 0
    return meter.peak_bytes, first


def test_peak_memory_of_decoding_does_not_grow_with_the_clip() -> None:
    # Past the receptive field every group is like the one before, so the peak is the same byte for
    # byte. In one go it grows with the frames: 9 latents already take ten times as much.
    assert account_of_decoding(9, 1) == account_of_decoding(13, 1)
    assert account_of_decoding(9, 1)[0] < account_of_decoding(9, GROUP_BYTES)[0] / 10


def test_two_frames_are_kept_for_each_convolution_and_hardly_more() -> None:
    kept = 0

    def count(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal kept
        kept += 2 * inputs[0][:, :1].nbytes

    decoder = shallow_decoder()
    kinds = (CausalConv3d, DepthToSpaceUpsample)  # an upsampler does not call its convolution
    convolving = [module for module in decoder.modules() if isinstance(module, kinds)]
    hooks = [module.register_forward_pre_hook(count) for module in convolving]
    with torch.device("meta"):
        frame = decoder(torch.empty(1, 8, 1, 4, 6))
    for hook in hooks:
        hook.remove()
    _, first = account_of_decoding(9, 1)
    # Beside the first frame, which the caller has: pairs that an upsampler made stay together, a
    # frame per doubling of time, and roots, which are a 128th of a frame of the real width.
    assert kept <= first - frame.nbytes <= 1.1 * kept


def test_peak_memory_of_encoding_does_not_grow_with_the_clip() -> None:
    with torch.device("meta"):
        encoder = VideoEncoder(shallow(narrow_config("2.3", "zeros")))
    peaks = []
    for frames in (25, 41):
        with ActivationMeter() as meter:
            latent = encode_frames(encoder, blank_frames(frames), group_bytes=1)
        peaks.append(meter.peak_bytes - 2 * latent.nbytes)  # the latents and their concatenation
    assert peaks[1] <= peaks[0]


def blank_frames(count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield torch.empty(1, 3, 1, 64, 96, device="meta")


def test_the_first_frame_comes_out_before_the_clip_is_through() -> None:
    decoder = narrow_decoder("2.3").to("meta")
    latent = torch.empty(1, 8, 40, 2, 3, dtype=torch.float64, device="meta")
    seen = 0
    prepare = decoder.prepare

    def counting(part: Tensor) -> Tensor:
        nonlocal seen
        seen += part.shape[2]
        return prepare(part)

    parts = decode_frames(decoder, latent, group_bytes=1)
    decoder.prepare = counting  # type: ignore[method-assign]
    next(parts)
    assert seen == 15  # 13.5 latents of look-ahead and the latent itself


def test_nothing_is_recorded_for_gradients() -> None:
    decoder = narrow_decoder("2.3")
    with torch.enable_grad():
        parts = list(itertools.islice(decode_frames(decoder, noise(1, 8, 2, 1, 1)), 1))
        assert torch.is_grad_enabled()
    assert not parts[0].requires_grad


def test_wrong_layouts_are_refused_before_anything_is_computed() -> None:
    with pytest.raises(ShapeError, match=r"latent of shape \(1, 7, 2, 2, 2\), wanted \(batch, 8"):
        decode_frames(narrow_decoder("2.3"), noise(1, 7, 2, 2, 2))
    with pytest.raises(ShapeError, match="no frame"):
        encode_frames(narrow_encoder("2.3"), [])


@functools.cache
def released(family: str) -> tuple[VideoDecoder, VideoEncoder]:
    config = VideoVAEConfig.released(family)
    with torch.device("meta"):
        return VideoDecoder(config).bfloat16(), VideoEncoder(config).bfloat16()


PIXELS = 1088 * 1920


def full_size_peak(latents: int, group_bytes: int) -> int:
    decoder, _ = released("2.3")
    latent = torch.empty(1, 128, latents, 34, 60, device="meta", dtype=torch.bfloat16)
    with ActivationMeter() as meter:
        for frames in decode_frames(decoder, latent, group_bytes):
            assert frames.shape[3:] == (1088, 1920)
    return meter.peak_bytes


def test_a_1920x1088_clip_decodes_in_1000_bytes_a_pixel() -> None:
    # Two frames for each of 38 convolutions are 844 bytes a pixel. In flight at the finest level:
    # the new frame, its hidden one, three frames seen and one made, 16 each; two halves of pairs
    # wait at the three levels that double time, 56; the pixels given out, 6; roots, 2.
    assert 844 + 6 * 16 + 56 + 6 + 2 == 1004
    assert full_size_peak(7, group_bytes=1) <= 1004 * PIXELS  # all layers run from 5 latents on
    assert full_size_peak(9, group_bytes=32 << 20) <= 1004 * PIXELS + (32 << 20)


def test_larger_groups_of_241_frames_cost_a_few_times_their_bytes() -> None:
    # What may wait at each of three levels, and what one layer works on: at most six groups.
    assert full_size_peak(31, 128 << 20) <= 1004 * PIXELS + 6 * (128 << 20)


def test_a_1920x1088_picture_is_encoded_in_a_quarter_of_a_gigabyte() -> None:
    encoder = released("2.3")[1]
    picture = torch.empty(1, 3, 1, 1088, 1920, device="meta", dtype=torch.bfloat16)
    for run in (encoder, lambda x: encode_frames(encoder, [x])):
        with ActivationMeter() as meter:
            run(picture)
        assert meter.peak_bytes < 0.25e9


def test_a_1920x1088_clip_is_encoded_in_1040_bytes_a_pixel() -> None:
    # 928 kept: as in decoding, and an odd frame before each of three layers that halve time.
    _, encoder = released("2.3")
    pieces = (torch.empty(1, 3, 1, 1088, 1920, device="meta", dtype=torch.bfloat16),) * 18
    with ActivationMeter() as meter:
        encode_frames(encoder, pieces, group_bytes=1)
    assert meter.peak_bytes < 1040 * PIXELS
