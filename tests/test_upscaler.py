"""Latent upscalers against the network written out: every kind, odd sizes, configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ltxlite.checkpoint.assemble import Naming
from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.memory.meter import ActivationMeter
from ltxlite.models import upscaler
from ltxlite.models.settings import Settings
from ltxlite.models.upscaler import LatentUpscaler, UpscalerConfig, upscale_normalised

GOLDEN = Path(__file__).parent / "golden"
NAMING = Naming(upscaler.RENAMES, upscaler.IGNORED)
FILES = {
    "spatial_x2": "tiny-2.3-spatial-upscaler-x2.safetensors",
    "spatial_x1.5": "tiny-2.3-spatial-upscaler-x1.5.safetensors",
    "temporal_x2": "tiny-2.3-temporal-upscaler-x2.safetensors",
}
KINDS = {
    "x2": {"space": (2, 1)},
    "x1.5": {"space": (3, 2)},
    "temporal x2": {"space": (1, 1), "time": True},
    "x2 and temporal x2": {"space": (2, 1), "time": True},
}


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config_of(kind: str) -> UpscalerConfig:
    return UpscalerConfig(latent_channels=3, width=64, blocks=1, **KINDS[kind])


def random_upscaler(kind: str, scale: float = 0.05) -> LatentUpscaler:
    network = LatentUpscaler(config_of(kind))
    for index, tensor in enumerate(network.state_dict().values()):
        tensor.copy_(noise(*tensor.shape, seed=index) * scale)
    return network


def tiny(name: str) -> tuple[UpscalerConfig, UpscalerConfig, LatentUpscaler]:
    """Return what a tiny file's JSON and its tensors say, and the network, loaded strictly."""
    path = GOLDEN / "models" / FILES[name]
    with safe_open(path, "pt") as file:
        settings = Settings(json.loads(file.metadata()["config"]), name)
    stored = load_file(path)
    given = UpscalerConfig.from_settings(settings)
    assert settings.unread() == []
    with torch.device("meta"):
        network = LatentUpscaler(given)
    weights = {
        NAMING.rename(key): tensor.float()
        for key, tensor in stored.items()
        if not NAMING.is_ignored(key)
    }
    network.load_state_dict(weights, strict=True, assign=True)
    return given, UpscalerConfig.from_shapes(shapes_of(stored)), network


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise each of 32 groups over its channels, all frames and the whole picture."""
    groups = x.reshape(x.shape[0], 32, -1)
    centred = groups - groups.mean(dim=2, keepdim=True)
    scaled = centred / (centred.pow(2).mean(dim=2, keepdim=True) + 1e-5).sqrt()
    return scaled.reshape(x.shape) * weight[:, None, None, None] + bias[:, None, None, None]


def written_out(network: LatentUpscaler, latent: Tensor, kind: str) -> Tensor:
    """Evaluate the whole network in double precision, pixel shuffles by strided assignment."""
    weights = {name: tensor.double() for name, tensor in network.state_dict().items()}

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv3d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    def norm(x: Tensor, name: str) -> Tensor:
        return group_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def block(x: Tensor, name: str) -> Tensor:
        hidden = F.silu(norm(conv(x, f"{name}.conv1"), f"{name}.norm1"))
        return F.silu(x + norm(conv(hidden, f"{name}.conv2"), f"{name}.norm2"))

    x = F.silu(norm(conv(latent.double(), "initial_conv"), "initial_norm"))
    x = block(x, "res_blocks.0")
    x = upsampled(x, weights["upsampler.conv.weight"], weights["upsampler.conv.bias"], kind)
    return conv(block(x, "post_upsample_res_blocks.0"), "final_conv")


def upsampled(x: Tensor, weight: Tensor, bias: Tensor, kind: str) -> Tensor:
    """Upsample by assigning each channel's plane to its place."""
    time = 2 if "temporal" in kind else 1
    side = {"x2": 2, "x1.5": 3, "temporal x2": 1, "x2 and temporal x2": 2}[kind]
    if weight.ndim == 4:
        weight = F.pad(weight[:, :, None], (0, 0, 0, 0, 1, 1))  # sees only its own frame
    wide = F.conv3d(x, weight, bias, padding=1)
    batch, channels, frames, rows, columns = x.shape
    big = wide.new_zeros(batch, channels, time * frames, side * rows, side * columns)
    for index in range(wide.shape[1]):
        rest, at_x = divmod(index, side)
        rest, at_y = divmod(rest, side)
        channel, at_t = divmod(rest, time)
        big[:, channel, at_t::time, at_y::side, at_x::side] = wide[:, index]
    if kind == "x1.5":
        taps = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64) / 16
        padded = F.pad(big, (2, 2, 2, 2))
        windows = padded.unfold(3, 5, 2).unfold(4, 5, 2)
        big = torch.einsum("bcfyxij,i,j->bcfyx", windows, taps, taps)
    return big[:, :, time - 1 :]


@pytest.mark.parametrize("name", FILES)
def test_tiny_files_reproduce_the_reference_values(name: str) -> None:
    wanted = load_file(GOLDEN / "golden" / "upsamplers.safetensors")
    vae = load_file(GOLDEN / "models" / "tiny-2.3-distilled.safetensors")
    mean, std = (vae[f"vae.per_channel_statistics.{key}-of-means"] for key in ("mean", "std"))
    given, found, network = tiny(name)
    assert given == found
    latent = wanted["in.latent"]
    # Same operations in the same order as the reference: equal here, 1e-5 on another machine.
    torch.testing.assert_close(network(latent), wanted[f"{name}.raw"], atol=4e-5, rtol=0)
    normalised = upscale_normalised(network, latent, mean.float(), std.float())
    torch.testing.assert_close(normalised, wanted[f"{name}.normalised"], atol=4e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("x2", (3, 6, 10)),
        ("x1.5", (3, 5, 8)),  # odd rows round up: ceil(7.5) = 8, columns 12
        ("temporal x2", (5, 3, 5)),
        ("x2 and temporal x2", (5, 6, 10)),
    ],
)
def test_every_kind_equals_the_network_written_out_in_double(
    kind: str, size: tuple[int, int, int]
) -> None:
    network, latent = random_upscaler(kind), noise(2, 3, 3, 3, 5)
    result = network(latent)
    assert result.shape == (2, 3, *size)
    # fp32 sums of 27 * 64 terms through three normalised stages.
    wanted = written_out(network, latent, kind)
    torch.testing.assert_close(result.double(), wanted, atol=2e-5, rtol=0)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["x2", "temporal x2"])
@pytest.mark.parametrize("frames", [4, 5, 9])  # one part of a convolution, two, three
def test_clips_longer_than_a_part_equal_the_network_written_out(kind: str, frames: int) -> None:
    network, latent = random_upscaler(kind), noise(1, 3, frames, 2, 3)
    wanted = written_out(network, latent, kind)
    torch.testing.assert_close(network(latent).double(), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("latents", "most"), [(16, 0.2e9), (31, 0.33e9)])
def test_upscaling_to_1920x1088_holds_two_tensors_and_a_part(latents: int, most: float) -> None:
    with torch.device("meta"):
        network = LatentUpscaler(UpscalerConfig(width=1024)).bfloat16()
        latent = torch.empty(1, 128, latents, 17, 30, dtype=torch.bfloat16)
    with ActivationMeter() as meter:
        large = network(latent)
    clip = 1024 * latents * 34 * 60 * 2
    part = 1024 * (6 + 4 + 1 + 4) * 34 * 60 * 2  # what a part sees and makes, frames around it
    assert large.shape == (1, 128, latents, 34, 60)
    assert meter.peak_bytes < 2 * clip + part < most


def test_norms_have_the_released_epsilon() -> None:
    network, latent = random_upscaler("x2", scale=1e-3), noise(1, 3, 1, 3, 5)
    variance = network.initial_conv(latent).var()
    assert variance < 1e-4  # of the epsilon's size: 1e-6 or 1e-4 instead would show
    wanted = written_out(network, latent, "x2")
    error = (network(latent).double() - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5  # fp32 rounding


@pytest.mark.parametrize(("size", "wanted"), [(1, 2), (2, 3), (3, 5), (17, 26), (30, 45)])
def test_one_and_a_half_rounds_odd_sizes_up(size: int, wanted: int) -> None:
    assert random_upscaler("x1.5")(noise(1, 3, 1, size, 2)).shape == (1, 3, 1, wanted, 3)


def test_a_single_frame_stays_single_in_time() -> None:
    assert random_upscaler("temporal x2")(noise(1, 3, 1, 3, 2)).shape == (1, 3, 1, 3, 2)


def test_the_stored_blur_that_is_ignored_is_the_binomial_one() -> None:
    stored = load_file(GOLDEN / "models" / FILES["spatial_x1.5"])["upsampler.blur_down.kernel"]
    taps = torch.tensor(upscaler.BLUR, dtype=stored.dtype)
    assert torch.equal(stored[0, 0], taps[:, None] * taps / 256)
    assert NAMING.is_ignored("upsampler.blur_down.kernel")


def test_upscaling_a_normalised_latent_leaves_its_scale() -> None:
    network, latent = random_upscaler("x2"), noise(1, 3, 2, 3, 2)
    mean, std = noise(3), noise(3, seed=1).abs() + 0.5
    wide = [vector[:, None, None, None] for vector in (mean, std)]
    wanted = (network(latent * wide[1] + wide[0]) - wide[0]) / wide[1]
    torch.testing.assert_close(upscale_normalised(network, latent, mean, std), wanted)


def test_another_layout_is_refused() -> None:
    with pytest.raises(ShapeError, match="batch, 3, frames"):
        random_upscaler("x2")(noise(1, 4, 2, 3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_alone_tell_the_kind(kind: str) -> None:
    shapes = shapes_of(LatentUpscaler(config_of(kind)).state_dict())
    assert UpscalerConfig.from_shapes(shapes) == config_of(kind)
    assert config_of(kind).kind == kind


def test_released_sizes_are_told_from_shapes() -> None:
    shapes = {
        "initial_conv.weight": (1024, 128, 3, 3, 3),
        "upsampler.0.weight": (4096, 1024, 3, 3),
        **{f"res_blocks.{i}.conv1.weight": (1024, 1024, 3, 3, 3) for i in range(4)},
        **{f"post_upsample_res_blocks.{i}.conv1.weight": (1024,) for i in range(4)},
    }
    assert UpscalerConfig.from_shapes(shapes) == UpscalerConfig(width=1024)
    shapes["upsampler.conv.weight"] = (9 * 1024, 1024, 3, 3)
    assert UpscalerConfig.from_shapes(shapes) == UpscalerConfig(width=1024, space=(3, 2))


@pytest.mark.parametrize(
    "shape", [(5 * 64, 64, 3, 3), (16 * 64, 64, 3, 3), (4 * 64, 64, 3, 3, 3), (9 * 64, 64, 3, 3)]
)
def test_other_upsamplings_are_refused(shape: tuple[int, ...]) -> None:
    shapes = {"initial_conv.weight": (64, 3, 3, 3, 3), "upsampler.0.weight": shape}
    with pytest.raises(CheckpointError, match=r"upsampler\.0\.weight"):
        UpscalerConfig.from_shapes(shapes)


def test_a_file_that_is_no_upscaler_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"initial_conv\.weight"):
        UpscalerConfig.from_shapes({"conv_in.weight": (64, 3, 3, 3)})


@pytest.mark.parametrize(
    "values",
    [
        {"dims": 2},
        {"spatial_scale": 1.5},
        {"spatial_scale": 4.0, "rational_resampler": True},
        {"spatial_upsample": False},
        {"mid_channels": 100},
        {"temporal_upsample": True, "spatial_scale": 1.5, "rational_resampler": True},
    ],
)
def test_values_that_are_not_implemented_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        UpscalerConfig.from_settings(Settings(values, "upscaler"))


def test_keys_that_a_file_leaves_out_have_the_released_defaults() -> None:
    assert UpscalerConfig.from_settings(Settings({}, "upscaler")) == UpscalerConfig()
    rational = Settings({"rational_resampler": True, "spatial_scale": 1.5}, "upscaler")
    assert UpscalerConfig.from_settings(rational).space == (3, 2)
