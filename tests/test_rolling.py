"""Rolling along time must not change the result, and must not keep what it has passed."""

import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from narrow_vae import narrow_config, narrow_decoder, narrow_encoder, shallow
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ltxlite.errors import ShapeError
from ltxlite.models.rolling import GROUP_BYTES, decode_frames, encode_frames
from ltxlite.models.video_vae import (
    CausalConv3d,
    DepthToSpaceUpsample,
    VideoDecoder,
    VideoEncoder,
)

# float64 over some 40 convolutions of random networks: 0 measured where groups do not change how a
# convolution adds up, 1e-11 where they may; a wrong frame at an edge shows as 1e-2 or more.
TOLERANCE = 1e-11
FAMILIES = pytest.mark.parametrize("family", ["2.0", "2.3"])
PADDINGS = pytest.mark.parametrize("padding", ["zeros", "reflect"])


def relative_error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@FAMILIES
@PADDINGS
@pytest.mark.parametrize("latents", [1, 2, 5])
def test_decoding_in_groups_equals_decoding_at_once(
    family: str, padding: Any, latents: int
) -> None:
    decoder = narrow_decoder(family, padding)
    latent = noise(2, 8, latents, 3, 2)
    wanted = decoder(latent)
    for group_bytes in (1, 50_000, GROUP_BYTES):  # one frame, some frames, the clip in one go
        got = torch.cat(list(decode_frames(decoder, latent, group_bytes)), dim=2)
        assert relative_error(got, wanted) < TOLERANCE


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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, from its birth to its death."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def ignore(self, *tensors: Tensor) -> None:
        """Do not count views of these."""
        self.known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@functools.cache
def shallow_decoder() -> VideoDecoder:
    with torch.device("meta"):
        return VideoDecoder(shallow(narrow_config("2.3", "zeros")))


@functools.cache
def account_of_decoding(latents: int, group_bytes: int) -> tuple[int, int]:
    """Return the peak of live bytes, and what lives when the first frame is handed over."""
    decoder = shallow_decoder()
    latent = torch.empty(1, 8, latents, 4, 6, device="meta")
    with LiveBytes() as meter:
        meter.ignore(latent, *decoder.parameters(), *decoder.buffers())
        parts = decode_frames(decoder, latent, group_bytes)
        next(parts)
        first = meter.live
        for frames in parts:
            del frames
    assert meter.live == 0
    return meter.peak, first


def test_peak_memory_of_decoding_does_not_grow_with_the_clip() -> None:
    # Past the receptive field every group is like the one before, so the peak is the same byte for
    # byte. In one go it grows with the frames: 9 latents already take ten times as much.
    assert account_of_decoding(9, 1) == account_of_decoding(13, 1)
    assert account_of_decoding(9, 1)[0] < account_of_decoding(9, GROUP_BYTES)[0] / 10


def test_two_frames_are_kept_for_each_convolution_and_nothing_else() -> None:
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
    assert first == kept + 2 * frame.nbytes  # the first frame, and before its last rearrangement


def test_peak_memory_of_encoding_does_not_grow_with_the_clip() -> None:
    with torch.device("meta"):
        encoder = VideoEncoder(shallow(narrow_config("2.3", "zeros")))
    peaks = []
    for frames in (25, 41):
        with LiveBytes() as meter:
            meter.ignore(*encoder.parameters(), *encoder.buffers())
            latent = encode_frames(encoder, blank_frames(frames), group_bytes=1)
        peaks.append(meter.peak - 2 * latent.nbytes)  # the latents and their concatenation
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
