"""Both vocoders: names, the 2.0 network written out, bounds, rates and the extension's ears."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ltxlite.checkpoint.assemble import Naming
from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.memory.meter import ActivationMeter
from ltxlite.models import generator, vocoder
from ltxlite.models.generator import AntiAliasedSnake, Generator, GeneratorConfig
from ltxlite.models.settings import Settings
from ltxlite.models.vocoder import ExtendedVocoder, ExtensionConfig, VocoderConfig, build_vocoder

GOLDEN = Path(__file__).parent / "golden"
NAMING = Naming(vocoder.RENAMES, vocoder.IGNORED)
SMALL = GeneratorConfig(
    width=16,
    rates=(3, 2),
    kernels=(7, 4),
    block_kernels=(3, 5),
    block_dilations=((1, 3), (1, 2)),
)


def full_size() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / "real_22b_keys.json").read_text())
    return data


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(network: nn.Module, scale: float = 0.2) -> dict[str, Tensor]:
    weights = network.state_dict()
    for index, tensor in enumerate(weights.values()):
        tensor.copy_(noise(*tensor.shape, seed=index) * scale)
    return weights


def tiny() -> ExtendedVocoder:
    """Load the vocoder of the tiny checkpoint in fp32, strictly."""
    stored = load_file(GOLDEN / "models" / "tiny-2.3-distilled.safetensors")
    names = [name.removeprefix("vocoder.") for name in stored if name.startswith("vocoder.")]
    weights = {
        NAMING.rename(name): stored[f"vocoder.{name}"].float()
        for name in names
        if not NAMING.is_ignored(name)
    }
    core = replace(vocoder.CORE_2_3, width=64)
    extension = ExtensionConfig(replace(vocoder.RESIDUAL_2_3, width=64), window=256)
    with torch.device("meta"):
        network = ExtendedVocoder(VocoderConfig(core, extension))
    network.load_state_dict(weights, strict=True, assign=True)
    return network


def hifigan(weights: Mapping[str, Tensor], mel: Tensor, config: GeneratorConfig) -> Tensor:
    """Write the 2.0 vocoder out over checkpoint names; mel: (B, 2, T, 64)."""

    def conv(x: Tensor, name: str, dilation: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        padding = (weight.shape[-1] - 1) // 2 * dilation
        return F.conv1d(x, weight, weights[f"{name}.bias"], padding=padding, dilation=dilation)

    x = conv(torch.cat([mel[:, ear].transpose(1, 2) for ear in range(2)], dim=1), "conv_pre")
    for stage, (rate, kernel) in enumerate(zip(config.rates, config.kernels, strict=True)):
        up = f"ups.{stage}"
        x = F.conv_transpose1d(
            F.leaky_relu(x, 0.1), weights[f"{up}.weight"], weights[f"{up}.bias"], stride=rate
        )
        margin = (kernel - rate) // 2
        x = x[..., margin : x.shape[-1] - margin]
        branches = []
        for branch, dilations in enumerate(config.block_dilations):
            block, y = f"resblocks.{stage * len(config.block_dilations) + branch}", x
            for index, dilation in enumerate(dilations):
                inner = conv(F.leaky_relu(y, 0.1), f"{block}.convs1.{index}", dilation)
                y = y + conv(F.leaky_relu(inner, 0.1), f"{block}.convs2.{index}")
            branches.append(y)
        x = torch.stack(branches).mean(dim=0)
    return torch.tanh(conv(F.leaky_relu(x, 0.01), "conv_post"))


def test_full_size_names_and_shapes_are_the_checkpoints() -> None:
    data = full_size()
    settings = Settings(data["config"]["vocoder"], "vocoder")
    config = VocoderConfig.from_settings(settings)
    with torch.device("meta"):
        network = build_vocoder(config)
    stored = {n: s for n, s in data["tensors"].items() if n.startswith("vocoder.")}
    names = {name.removeprefix("vocoder."): tuple(shape) for name, shape in stored.items()}
    ignored = [name for name in names if NAMING.is_ignored(name)]
    wanted = {NAMING.rename(name): shape for name, shape in names.items() if name not in ignored}
    assert {name: tuple(t.shape) for name, t in network.state_dict().items()} == wanted
    assert len(names) == 1227 and ignored == ["mel_stft.stft_fn.inverse_basis"]
    assert config == VocoderConfig() == VocoderConfig.released("2.3")
    assert network.sample_rate == 48000 and settings.unread() == []


def test_the_2_0_vocoder_equals_the_network_written_out() -> None:
    network = Generator(SMALL, 24000)
    weights = random_weights(network)
    mel = noise(2, 2, 5, 64)
    waveform = network(mel)
    assert waveform.shape == (2, 2, 30) and waveform.abs().max() > 0.1
    # Same sums in another order: a few ulp of values around one.
    torch.testing.assert_close(waveform, hifigan(weights, mel, SMALL), atol=2e-6, rtol=0)


def test_a_flat_section_is_the_2_0_vocoder() -> None:
    section = {
        "resblock": "1",
        "stereo": True,
        "upsample_initial_channel": 1024,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [16, 15, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    }
    settings = Settings(section, "vocoder")
    config = VocoderConfig.from_settings(settings)
    assert config == VocoderConfig.released("2.0") and settings.unread() == []
    with torch.device("meta"):
        network = build_vocoder(config)
    assert network.sample_rate == 24000 and config.core.hop == 240
    names = network.state_dict()
    assert names["ups.0.weight"].shape == (1024, 512, 16)
    assert names["conv_post.bias"].shape == (2,)
    assert round(sum(tensor.numel() for tensor in names.values()) / 1e6, 1) == 55.6
    assert not any(NAMING.rename(name) != name for name in names)


def test_stages_reproduce_the_reference_values() -> None:
    network, wanted = tiny(), load_file(GOLDEN / "golden" / "vocoder.safetensors")
    low = network.core_waveform(wanted["in.mel"])
    padded = network.padded(low)
    # Equal with the reference's thread count; 7e-6 of the largest value with another, where sums
    # run in another order, in the logarithms of quiet bins.
    for result, name in [
        (low, "vocoder_16k"),
        (network.bwe_mel(padded), "bwe_mel"),
        (network.residual(padded), "bwe_residual"),
        (network.skip(padded), "skip"),
        (network(wanted["in.mel"]), "waveform"),
    ]:
        tolerance = 2e-5 * wanted[name].abs().max().item()
        torch.testing.assert_close(result, wanted[name], atol=tolerance, rtol=0, msg=name)


def test_the_core_is_clamped_and_the_extension_is_not() -> None:
    network, mel = tiny(), noise(1, 2, 3, 64)
    network.core.conv_post.weight.mul_(50)
    network.extension.conv_post.weight.mul_(50)
    low = network.core_waveform(mel)
    network.core.bound = "none"
    loud = network.core_waveform(mel)
    assert loud.abs().max() > 1 and torch.equal(low, loud.clamp(-1, 1))
    assert network.residual(low).abs().max() > 1


def test_the_final_waveform_is_clamped() -> None:
    network, mel = tiny(), noise(1, 2, 3, 64)
    network.extension.conv_post.weight.mul_(50)
    low = network.core_waveform(mel)
    loud = network.residual(low) + network.skip(low)
    assert loud.abs().max() > 1 and torch.equal(network(mel), loud.clamp(-1, 1))


def test_a_core_that_ends_inside_a_frame_is_padded_and_cropped_again() -> None:
    core = GeneratorConfig(16, (7,), (9,), snake=True, final_bias=False, bound="clamp")
    extension = tiny().extension
    network = ExtendedVocoder(VocoderConfig(core, ExtensionConfig(window=256)))
    random_weights(network)
    network.extension = extension
    mel = noise(1, 2, 13, 64)
    low = network.core_waveform(mel)
    padded = network.padded(low)
    assert low.shape[-1] == 91 and padded.shape[-1] == 160
    assert torch.equal(padded[..., :91], low) and not padded[..., 91:].any()
    full = (network.residual(padded) + network.skip(padded)).clamp(-1, 1)
    assert torch.equal(network(mel), full[..., : 3 * 91])


def test_an_extension_may_double_the_rate() -> None:
    """Every release triples it; the official code takes any whole factor."""
    double = replace(SMALL, rates=(5, 4, 4, 2), kernels=(9, 8, 8, 4), snake=True, bound="none")
    config = ExtensionConfig(double, window=128, output_rate=32000)
    network = ExtendedVocoder(VocoderConfig(replace(SMALL, snake=True), config))
    random_weights(network, 0.1)
    assert network(noise(1, 2, 40, 64)).shape == (1, 2, 2 * 6 * 40)
    time = torch.arange(1600) / 16000
    low = torch.sin(2 * math.pi * 500 * time).expand(1, 2, -1)
    full = network.skip(low)
    wanted = torch.sin(2 * math.pi * 500 * torch.arange(3200) / 32000).expand(1, 2, -1)
    # Six zero crossings of a windowed sinc pass 500 Hz to 2e-3; the ends see repeated samples.
    assert (full - wanted)[..., 32:-32].abs().max() < 5e-3


def test_the_skip_path_interpolates_a_sine() -> None:
    def sine(rate: int, samples: int) -> Tensor:
        return torch.sin(2 * math.pi * 1000 * torch.arange(samples) / rate).expand(1, 2, -1)

    full = tiny().skip(sine(16000, 400))
    assert full.shape == (1, 2, 1200)
    # 6 zero crossings under a Hann lobe let through ripple of about 1e-3; the edges are repeated.
    torch.testing.assert_close(full[..., 48:-48], sine(48000, 1200)[..., 48:-48], atol=2e-3, rtol=0)


def test_the_extension_hears_causal_frames_on_the_mel_scale() -> None:
    network = tiny()
    window, bins = 64, 33
    taps = torch.hann_window(window)
    angles = 2 * math.pi * torch.arange(bins)[:, None] * torch.arange(window) / window
    network.window, network.hop = window, 16
    network.transform = torch.cat([angles.cos() * taps, -angles.sin() * taps])[:, None]
    network.mel_basis = noise(64, bins).abs()
    low = noise(1, 2, 160)
    spectrum = torch.stft(
        F.pad(low[0], (48, 0)), 64, 16, window=taps, center=False, return_complex=True
    )
    wanted = (network.mel_basis @ spectrum.abs()).clamp(min=1e-5).log()[None]
    heard = network.bwe_mel(low)
    assert heard.shape == (1, 2, 64, 10)
    # Two fp32 transforms of 64 points, logarithms of values above 0.1.
    torch.testing.assert_close(heard, wanted, atol=1e-5, rtol=0)


def test_silence_is_heard_as_the_floor() -> None:
    heard = tiny().bwe_mel(torch.zeros(1, 2, 160))
    assert torch.equal(heard, torch.full_like(heard, 1e-5).log())


def test_the_snake_adds_its_epsilon_to_beta() -> None:
    snake = AntiAliasedSnake(3)
    snake.alpha.fill_(math.log(2.0))
    snake.beta.fill_(math.log(1e-9))  # as large as the epsilon
    x = noise(1, 3, 11) * 1e-3
    exact = x.double() + torch.sin(2 * x.double()) ** 2 / 2e-9
    # exp(log(1e-9)) is off by 1e-6 in fp32: its argument is near 21.
    torch.testing.assert_close(snake._bend(x).double(), exact, atol=0, rtol=5e-6)


def test_anti_aliasing_keeps_the_length_and_a_linear_signal() -> None:
    snake = AntiAliasedSnake(2)
    snake.beta.fill_(50.0)  # sin² / e^50 vanishes: only the two filters remain
    times = torch.arange(-5.5, 6.0)
    taps = 0.5 * torch.sinc(0.5 * times) * torch.kaiser_window(12, periodic=False, beta=4.664)
    snake.up_filter.copy_(taps / taps.sum())
    snake.down_filter.copy_(taps / taps.sum())
    x = torch.sin(torch.arange(101) * 0.3).expand(1, 2, -1)
    out = snake(x)
    assert out.shape == x.shape
    # The pass band of a 12-tap low-pass is flat to 1e-2; ends repeat their last sample.
    torch.testing.assert_close(out[..., 8:-8], x[..., 8:-8], atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_not_fp32_are_refused(dtype: torch.dtype) -> None:
    network = tiny()
    network.transform = network.transform.to(dtype)
    with pytest.raises(ShapeError, match="float32"):
        network(noise(1, 2, 3, 64))
    with pytest.raises(ShapeError, match=r"conv_pre.*float32.*\.float\(\)"):
        Generator(SMALL, 24000).to(dtype)(noise(1, 2, 3, 64))


def test_a_bf16_spectrogram_is_played_in_fp32() -> None:
    network, mel = Generator(SMALL, 24000), noise(1, 2, 3, 64).bfloat16()
    random_weights(network)
    assert torch.equal(network(mel), network(mel.float()))


def test_other_layouts_are_refused() -> None:
    for shape in [(1, 1, 3, 64), (1, 2, 64, 3), (2, 3, 64), (1, 2, 0, 64)]:
        with pytest.raises(ShapeError, match="wanted"):
            Generator(SMALL, 24000)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("bwe", "output_sampling_rate", 32000),  # twice the input; hop and rates say three times
        ("bwe", "output_sampling_rate", 40000),
        ("bwe", "hop_length", 160),
        ("bwe", "n_fft", 1024),
        ("bwe", "num_mels", 80),
        ("bwe", "apply_final_activation", True),
        ("vocoder", "resblock", "2"),
        ("vocoder", "activation", "snake"),
        ("vocoder", "stereo", False),
        ("vocoder", "upsample_kernel_sizes", [11, 4, 4, 4, 4]),
        ("vocoder", "upsample_kernel_sizes", [10, 4, 4, 4, 4, 4]),
        ("vocoder", "resblock_kernel_sizes", [3, 7]),
        ("vocoder", "resblock_kernel_sizes", [3, 7, 10]),
        ("vocoder", "resblock_dilation_sizes", 3),
    ],
)
def test_values_that_are_not_implemented_are_refused(part: str, key: str, value: Any) -> None:
    section = copy.deepcopy(full_size()["config"]["vocoder"])
    section[part][key] = value
    with pytest.raises(CheckpointError):
        VocoderConfig.from_settings(Settings(section, "vocoder"))


def test_missing_final_keys_mean_tanh_and_a_bias() -> None:
    config = GeneratorConfig.from_settings(Settings({}, "vocoder"))
    assert config == GeneratorConfig() and config.final_bias and config.bound == "tanh"
    section = copy.deepcopy(full_size()["config"]["vocoder"])
    section["vocoder"]["apply_final_activation"] = False  # the released code bounds it anyway
    assert VocoderConfig.from_settings(Settings(section, "vocoder")).core.bound == "clamp"


@pytest.mark.parametrize("snake", [False, True])
def test_long_sound_plays_in_parts_as_at_once(snake: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, snake=snake, bound="none")
    network = Generator(config, 1)
    random_weights(network, 0.3)
    spectrogram = noise(2, 2, 201, 64)
    wanted = network(spectrogram)
    monkeypatch.setattr(generator, "MOST_FRAMES", 40)
    # fp32 sums in another order; a part that begins too late is 1e-3 off where it begins.
    torch.testing.assert_close(network(spectrogram), wanted, rtol=0, atol=1e-5 * wanted.abs().max())
    network.reach = 2
    assert (network(spectrogram) - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_the_released_generators_reach_half_a_second() -> None:
    assert vocoder.CORE_2_3.reach == 46
    assert vocoder.RESIDUAL_2_3.reach == 29
    assert GeneratorConfig().reach == 22


@pytest.mark.parametrize("family", ["2.0", "2.3"])
def test_only_the_waveforms_grow_with_long_sound(family: str) -> None:
    with torch.device("meta"):
        network = build_vocoder(VocoderConfig.released(family))
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    peaks = []
    for seconds in (19.2, 38.4):  # parts of the core and of the extension are full ones
        with ActivationMeter() as meter:
            waveform = network(torch.empty(1, 2, round(100 * seconds), 64, device="meta"))
        assert waveform.shape[2] == round(seconds * network.sample_rate)
        peaks.append((meter.peak_bytes, waveform.nbytes))
    (short, _), (long, played) = peaks
    assert 0 <= long - short <= 1.1 * played  # which doubled; there are two rates and a sum
    assert weights + long < 0.7e9
