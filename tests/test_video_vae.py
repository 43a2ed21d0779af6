"""The video VAE: blocks against index formulas, names and shapes against the full-size model."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrow_vae import narrow_decoder, narrow_encoder
from safetensors import safe_open
from torch import Tensor

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models import causal_conv
from ltxlite.models.causal_conv import CausalConv3d, Piece, activate, gather
from ltxlite.models.settings import Settings
from ltxlite.models.video_vae import (
    DECODER_IGNORED,
    ENCODER_IGNORED,
    IGNORED,
    RENAMES,
    DepthToSpaceUpsample,
    SpaceToDepthDownsample,
    VideoDecoder,
    VideoEncoder,
    depth_to_space,
    normalise,
    patchify,
    space_to_depth,
    unnormalise,
    unpatchify,
)
from ltxlite.models.video_vae_config import RELEASED, Block, Padding, VideoVAEConfig

GOLDEN = Path(__file__).parent / "golden"
STRIDES = [(1, 2, 2), (2, 1, 1), (2, 2, 2)]
# float64 sums of at most 27 * 8 products of unit size, in two orders: 216 * 1.1e-16, with room.
TOLERANCE = {"rtol": 0, "atol": 1e-12}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


def settings(**changes: Any) -> Settings:
    """The `vae` section of a 2.0 file, changed; None takes a key away."""
    values = {
        "encoder_blocks": [["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 2}]],
        "decoder_blocks": [["res_x", {"num_layers": 1}], ["compress_all", {"multiplier": 2}]],
    } | changes
    return Settings({key: value for key, value in values.items() if value is not None}, "vae")


# Rearrangements


def test_in_a_patch_the_column_is_the_slower_index() -> None:
    pixels = noise(1, 3, 2, 8, 12)
    x = patchify(pixels, 4)
    assert x.shape == (1, 2, 48, 2, 3)
    for c, column, row in [(0, 0, 1), (1, 3, 0), (2, 2, 3)]:
        assert torch.equal(x[0, 1, c * 16 + column * 4 + row], pixels[0, c, 1, row::4, column::4])
    assert not torch.equal(x[:, 0], F.pixel_unshuffle(pixels[:, :, 0], 4))
    assert torch.equal(unpatchify(x, 4), pixels)


@pytest.mark.parametrize("stride", STRIDES)
def test_in_a_box_the_column_is_the_fastest_index(stride: tuple[int, int, int]) -> None:
    st, sh, sw = stride
    x = noise(2, 2 * st, 3, 3 * sh, 5 * sw)
    folded = space_to_depth(x, stride)
    for c in range(3):
        for t, h, w in [(0, 0, 0), (st - 1, 0, sw - 1), (0, sh - 1, 0)]:
            channel = ((c * st + t) * sh + h) * sw + w
            assert torch.equal(folded[:, :, channel], x[:, t::st, c, h::sh, w::sw])
    assert torch.equal(depth_to_space(folded, stride), x)


# Blocks


def test_reflecting_takes_two_rows_and_columns() -> None:
    conv = CausalConv3d(2, 3, causal=True, padding="reflect").double()
    with pytest.raises(ShapeError, match=r"got 1 rows and 5 columns .* at least 2 of each"):
        conv(noise(1, 2, 2, 1, 5))


def test_pieces_that_share_much_memory_are_copied_before_they_are_kept() -> None:
    clip = Piece.activated(noise(1, 5, 2, 3, 4))
    assert clip.part(0, 3).compact().frames.untyped_storage().nbytes() == clip.frames.nbytes * 3 / 5
    pair = Piece(clip.frames[:, :2].clone())
    assert pair.part(1, 2).compact().frames.data_ptr() == pair.frames[:, 1:].data_ptr()
    kept = list(gather([clip, pair], 4, 6))
    assert [len(piece) for piece in kept] == [1, 1]
    seen = torch.empty(1, 1, 2, 3, 4, dtype=torch.float64)
    kept[0].compact().write(seen)
    assert torch.equal(seen, activate(clip.frames[:, 4:]))


def test_pixel_norm_has_an_epsilon_of_1e_8() -> None:
    x = torch.full((1, 1, 5, 1, 1), 1e-4, dtype=torch.float64)
    scaled = 1 / math.sqrt(2)  # x² is as large as the epsilon here; with 1e-6 it would be 0.1
    wanted = scaled / (1 + math.exp(-scaled))
    torch.testing.assert_close(activate(x), torch.full_like(x, wanted), **TOLERANCE)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("frames", "parts"), [(1, 1), (4, 1), (2, 2), (11, 3)])
def test_convolution_equals_conv3d(
    padding: Padding, causal: bool, frames: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = -(-frames // parts)
    frame_bytes = 2 * 7 * 3 * 4 * 8  # of the output, which has more channels
    monkeypatch.setattr(causal_conv, "WINDOW_BYTES", 4 * frame_bytes * at_once)
    conv = CausalConv3d(5, 7, causal, padding).double()
    x = noise(2, frames, 5, 3, 4)
    repeats = (2, 0) if causal else (1, 1)
    clip = F.pad(x.transpose(1, 2), (0, 0, 0, 0, *repeats), mode="replicate")
    mode = "constant" if padding == "zeros" else "reflect"
    clip = F.pad(clip, (1, 1, 1, 1, 0, 0), mode=mode)
    wanted = F.conv3d(clip, conv.conv.weight, conv.conv.bias).transpose(1, 2)
    torch.testing.assert_close(conv(x), wanted, **TOLERANCE)


@pytest.mark.parametrize("stride", STRIDES)
def test_downsampling_adds_the_mean_of_neighbouring_channels(stride: tuple[int, int, int]) -> None:
    block = SpaceToDepthDownsample(Block(stride=stride, multiplier=2), 8, "zeros").double()
    x = noise(1, 5 if stride[0] == 2 else 3, 8, 2, 4)
    padded = torch.cat([x[:, :1], x], dim=1) if stride[0] == 2 else x
    folded = space_to_depth(padded, stride)
    group = folded.shape[2] // 16
    skip = torch.stack([folded[:, :, i * group : (i + 1) * group].mean(2) for i in range(16)], 2)
    wanted = space_to_depth(block.conv(padded), stride) + skip
    assert wanted.shape[1] == 3
    torch.testing.assert_close(block(x), wanted, **TOLERANCE)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_upsampling_drops_the_first_frame_where_time_doubles(
    stride: tuple[int, int, int], multiplier: int
) -> None:
    block = DepthToSpaceUpsample(Block(stride=stride, multiplier=multiplier), 8, "zeros").double()
    x = noise(1, 3, 8, 2, 3)
    got = block(x)
    assert got.shape == (1, 3 * stride[0] - (stride[0] == 2), 8 // multiplier, *_scaled(x, stride))
    wanted = depth_to_space(block.conv(x), stride)
    torch.testing.assert_close(got[:, -1], wanted[:, -1], **TOLERANCE)


def _scaled(x: Tensor, stride: tuple[int, int, int]) -> tuple[int, int]:
    return x.shape[3] * stride[1], x.shape[4] * stride[2]


def test_residual_upsampling_repeats_the_unfolded_input_as_a_whole() -> None:
    block = DepthToSpaceUpsample(Block(0, (2, 2, 2), 2, residual=True), 16, "zeros").double()
    x = noise(1, 2, 16, 3, 2)
    skip = block(x) - depth_to_space(block.conv(x), (2, 2, 2))[:, 1:]
    for channel in range(8):  # 16 / 8 channels unfolded, four times over
        for frame in range(3):
            t, f = (frame + 1) % 2, (frame + 1) // 2
            source = x[0, f, (channel % 2) * 8 + t * 4 + 1 * 2 + 0]
            torch.testing.assert_close(skip[0, frame, channel, 1::2, 0::2], source, **TOLERANCE)


# Networks


@pytest.mark.parametrize("family", ["2.0", "2.3"])
@pytest.mark.parametrize("latents", [1, 3])
def test_a_clip_of_t_latents_has_8_t_minus_7_frames(family: str, latents: int) -> None:
    pixels = narrow_decoder(family)(noise(1, 8, latents, 1, 2))
    assert pixels.shape == (1, 3, 8 * latents - 7, 32, 64)
    assert narrow_encoder(family)(pixels).shape == (1, 8, latents, 1, 2)


def test_frames_after_the_last_whole_latent_are_left_out() -> None:
    encoder, pixels = narrow_encoder("2.3"), noise(1, 3, 15, 32, 32)
    assert torch.equal(encoder(pixels), encoder(pixels[:, :, :9]))


def test_the_encoder_looks_back_only_and_the_decoder_both_ways() -> None:
    encoder, pixels = narrow_encoder("2.3"), noise(1, 3, 17, 32, 32)
    changed = pixels.clone()
    changed[:, :, 9:] = 0.5
    difference = (encoder(pixels) - encoder(changed)).abs().amax(dim=(0, 1, 3, 4))
    assert difference[:2].max() < 1e-12 < 1e-3 < difference[2]
    decoder, latent = narrow_decoder("2.3"), noise(1, 8, 3, 1, 1)
    first = decoder(latent)[:, :, 0]
    latent[:, :, 2] = 0.5
    assert (decoder(latent)[:, :, 0] - first).abs().max() > 1e-3


@pytest.mark.parametrize("run", [narrow_encoder, narrow_decoder])
def test_padding_modes_differ_at_the_edges(run: Callable[..., Any]) -> None:
    x = noise(1, 3, 1, 64, 64) if run is narrow_encoder else noise(1, 8, 1, 2, 2)
    assert (run("2.3", "zeros")(x) - run("2.3", "reflect")(x)).abs().max() > 1e-2


def test_normalising_is_undone_and_needs_two_vectors_only() -> None:
    latent, mean, std = noise(2, 5, 1, 2, 3), noise(5).bfloat16(), noise(5).abs().bfloat16() + 1
    got = normalise(latent, mean, std)
    wanted = (latent[1, 4] - mean[4].double()) / std[4].double()
    torch.testing.assert_close(got[1, 4], wanted, **TOLERANCE)
    torch.testing.assert_close(unnormalise(got, mean, std), latent, **TOLERANCE)


def test_networks_work_in_the_dtype_of_their_weights() -> None:
    decoder, latent = narrow_decoder("2.0", "reflect"), noise(1, 8, 2, 2, 3)
    wanted = decoder(latent)
    got = decoder.bfloat16()(latent.float())
    assert got.dtype == torch.bfloat16
    # 8 bits of mantissa through 43 convolutions; the real decoder loses 2e-2.
    assert (got - wanted).abs().max() / wanted.abs().max() < 0.1
    assert narrow_encoder("2.0").bfloat16()(noise(1, 3, 1, 32, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 4, 1, 32, 32), (1, 3, 1, 48, 32), (3, 1, 32, 32)])
def test_pixels_off_the_grid_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"VideoEncoder: got pixels of shape .*multiples of 32"):
        narrow_encoder("2.3")(noise(*shape))


# Names and shapes


def parameters(network: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def renamed(names: dict[str, list[int]], ignored: tuple[str, ...]) -> dict[str, list[int]]:
    kept = {}
    for name, shape in names.items():
        if any(re.search(pattern, name) for pattern in ignored):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        kept[name] = shape
    return kept


def under_vae(names: dict[str, list[int]]) -> dict[str, list[int]]:
    return {n.removeprefix("vae."): shape for n, shape in names.items() if n.startswith("vae.")}


@pytest.fixture(scope="module")
def full_size() -> dict[str, Any]:
    return json.loads((GOLDEN / "real_22b_keys.json").read_text())


def test_names_and_shapes_are_those_of_the_full_size_model(full_size: dict[str, Any]) -> None:
    names = under_vae(full_size["tensors"])
    section = Settings(full_size["config"]["vae"], "vae")
    config = VideoVAEConfig.from_settings(section)
    assert section.unread() == []
    with torch.device("meta"):
        encoder, decoder = VideoEncoder(config), VideoDecoder(config)
    assert parameters(encoder) == renamed(names, ENCODER_IGNORED)
    assert parameters(decoder) == renamed(names, DECODER_IGNORED)
    assert len(names) == 84 + 84 + 2  # nothing is ignored here: only the used statistics are listed


def test_unused_statistics_of_a_checkpoint_are_ignored_by_name() -> None:
    with safe_open(GOLDEN / "models/tiny-2.3-distilled.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        config = VideoVAEConfig.from_settings(
            Settings(json.loads(file.metadata()["config"])["vae"], "vae")
        )
    names = under_vae(shapes)
    ignored = {name for name in names if any(re.search(pattern, name) for pattern in IGNORED)}
    assert len(ignored) == 3
    with torch.device("meta"):
        assert parameters(VideoEncoder(config)) == renamed(names, ENCODER_IGNORED)
        assert parameters(VideoDecoder(config)) == renamed(names, DECODER_IGNORED)


@pytest.mark.parametrize(("family", "millions"), [("2.0", (694.1, 528.4)), ("2.3", (318.9, 407.2))])
def test_built_in_configurations_have_the_released_sizes(
    family: str, millions: tuple[float, float]
) -> None:
    config = VideoVAEConfig.released(family)
    with torch.device("meta"):
        networks = VideoEncoder(config), VideoDecoder(config)
    for network, wanted in zip(networks, millions, strict=True):
        assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == wanted
    assert (config.time_scale, config.space_scale) == (8, 32)


# Configuration


def test_the_built_in_configuration_is_that_of_the_file_but_for_its_padding(
    full_size: dict[str, Any],
) -> None:
    values = full_size["config"]["vae"] | {"spatial_padding_mode": "zeros"}
    assert VideoVAEConfig.from_settings(Settings(values, "vae")) == RELEASED["2.3"]


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, ("zeros", "reflect")),
        ({"spatial_padding_mode": "zeros"}, ("zeros", "zeros")),
        ({"spatial_padding_mode": "reflect"}, ("reflect", "reflect")),
        ({"encoder_spatial_padding_mode": "reflect"}, ("reflect", "reflect")),
        ({"decoder_spatial_padding_mode": "zeros"}, ("zeros", "reflect")),  # read by nobody
        (
            {"spatial_padding_mode": "zeros", "encoder_spatial_padding_mode": "reflect"},
            ("zeros", "zeros"),
        ),
    ],
)
def test_padding_is_read_as_the_official_loader_reads_it(
    keys: dict[str, str], wanted: tuple[str, str]
) -> None:
    config = VideoVAEConfig.from_settings(settings(**keys))
    assert (config.encoder_padding, config.decoder_padding) == wanted


def test_absent_multipliers_are_two_for_the_encoder_and_one_for_the_decoder() -> None:
    config = VideoVAEConfig.from_settings(
        settings(
            encoder_blocks=[["res_x", 3], ["compress_all_res", {}]],
            decoder_blocks=[["compress_all", {"residual": True}]],
        )
    )
    assert config.encoder_blocks == (Block(layers=3), Block(stride=(2, 2, 2), multiplier=2))
    assert config.decoder_blocks == (Block(stride=(2, 2, 2), multiplier=1, residual=True),)
    assert (config.time_scale, config.space_scale) == (2, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "CausalDiffusionVAE"}, "CausalDiffusionVAE.*`conv` in its name"),
        ({"timestep_conditioning": True}, "vae.timestep_conditioning is True"),
        ({"causal_decoder": True}, "vae.causal_decoder is True"),
        ({"norm_layer": "group_norm"}, "vae.norm_layer is 'group_norm'.*'pixel_norm'"),
        ({"latent_log_var": "per_channel"}, "vae.latent_log_var is 'per_channel'"),
        ({"spatial_padding_mode": "circular"}, "vae.spatial_padding_mode is 'circular'"),
        ({"encoder_blocks": None}, "lacks 'encoder_blocks'"),
        ({"decoder_blocks": []}, "vae.decoder_blocks is"),
        ({"decoder_blocks": ["res_x"]}, r"vae.decoder_blocks\[0\] is 'res_x', wanted"),
        ({"encoder_blocks": [["attn", {}]]}, r"encoder_blocks\[0\] is a 'attn' block"),
        ({"decoder_blocks": [["res_x_y", {}]]}, "a 'res_x_y' block, ltxlite implements res_x"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "extra": 1}]]}, "unknown.*extra"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]}, "inject_noise"),
        ({"decoder_blocks": [["compress_time", {"residual": True}]]}, "residual is True"),
        ({"decoder_blocks": [["compress_space", {"multiplier": 2}]]}, "wanted the same"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        VideoVAEConfig.from_settings(settings(**changes))


def test_an_unknown_family_and_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"family '1.0', only for 2.0, 2.3"):
        VideoVAEConfig.released("1.0")
    with pytest.raises(CheckpointError, match="decoder_blocks: 4 channels do not divide by 8"):
        DepthToSpaceUpsample(Block(0, (2, 2, 2), 1, residual=True), 4, "zeros")
