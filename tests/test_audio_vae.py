"""The audio VAE: configuration, names, causality and what the reference values do not reach."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ltxlite.checkpoint.assemble import Naming
from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.memory.meter import ActivationMeter
from ltxlite.models import audio_vae
from ltxlite.models.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig, PixelNorm
from ltxlite.models.settings import Settings

GOLDEN = Path(__file__).parent / "golden"
NAMING = Naming(audio_vae.RENAMES, audio_vae.IGNORED)
TINY = AudioVAEConfig(width=32, multipliers=(1, 2, 2), latent_channels=2)
ODD = AudioVAEConfig(width=6, multipliers=(2, 1, 3, 3), blocks=1, latent_channels=3)


def full_size() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / "real_22b_keys.json").read_text())
    return data


def own_names(names: list[str], half: str) -> dict[str, str]:
    """Map the checkpoint's names that belong to a half to the module's."""
    pattern = re.compile(rf"audio_vae\.(?:{half}\.(.+)|(per_channel_statistics\..+))")
    stripped = {name: m[1] or m[2] for name in names if (m := pattern.fullmatch(name))}
    return {
        name: NAMING.rename(rest) for name, rest in stripped.items() if not NAMING.is_ignored(rest)
    }


def tiny(half: str) -> nn.Module:
    """Load a half of the tiny checkpoint in fp32, strictly."""
    stored = load_file(GOLDEN / "models" / "tiny-2.3-distilled.safetensors")
    with torch.device("meta"):
        network = AudioEncoder(TINY) if half == "encoder" else AudioDecoder(TINY)
    names = own_names(list(stored), half)
    weights = {ours: stored[theirs].float() for theirs, ours in names.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network


def random_weights(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for tensor in network.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return network


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_full_size_names_and_shapes_are_the_checkpoints(half: str) -> None:
    data = full_size()
    settings = Settings(data["config"]["audio_vae"], "audio_vae")
    config = AudioVAEConfig.from_settings(settings)
    with torch.device("meta"):
        network = AudioEncoder(config) if half == "encoder" else AudioDecoder(config)
    stored = data["tensors"]
    wanted = {ours: tuple(stored[name]) for name, ours in own_names(list(stored), half).items()}
    assert {name: tuple(t.shape) for name, t in network.state_dict().items()} == wanted
    assert len(wanted) == {"encoder": 44, "decoder": 56}[half] + 2
    assert config == AudioVAEConfig() and settings.unread() == []


def test_every_audio_vae_tensor_of_the_full_size_file_is_used() -> None:
    names = [name for name in full_size()["tensors"] if name.startswith("audio_vae.")]
    used = own_names(names, "encoder").keys() | own_names(names, "decoder").keys()
    assert len(names) == 102 and used == set(names)


def test_the_unused_statistics_of_release_files_are_ignored_by_name() -> None:
    unused = ["mean-of-stds", "mean-of-stds_over_std-of-means", "channel"]
    assert all(NAMING.is_ignored(f"per_channel_statistics.{name}") for name in unused)
    assert not NAMING.is_ignored("per_channel_statistics.mean-of-means")
    assert not NAMING.is_ignored("per_channel_statistics.mean-of-stds.weight")


def test_halves_reproduce_the_reference_values() -> None:
    # Same operations in the same order as the reference: equal here, 1e-5 on another machine.
    encoded = load_file(GOLDEN / "golden" / "audio_encode.safetensors")
    latent = tiny("encoder")(encoded["in.mel"])
    torch.testing.assert_close(latent, encoded["latent"], atol=1e-5, rtol=0)
    decoded = load_file(GOLDEN / "golden" / "audio_decode.safetensors")
    spectrogram = tiny("decoder")(decoded["in.latent"])
    torch.testing.assert_close(spectrogram, decoded["mel"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 17])
def test_time_is_quartered_rounding_up(frames: int) -> None:
    assert tiny("encoder")(noise(1, 2, frames, 64)).shape == (1, 2, -(-frames // 4), 16)


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_decoding_gives_four_frames_less_three(frames: int) -> None:
    assert tiny("decoder")(noise(2, 2, frames, 16)).shape == (2, 2, 4 * frames - 3, 64)


def test_another_number_of_levels_scales_with_it() -> None:
    encoder, decoder = random_weights(AudioEncoder(ODD)), random_weights(AudioDecoder(ODD))
    latent = encoder(noise(1, 2, 19, 64))
    assert latent.shape == (1, 3, 3, 8)
    assert decoder(latent).shape == (1, 2, 8 * 3 - 7, 64)


def test_latents_do_not_depend_on_later_sound() -> None:
    encoder, spectrogram = tiny("encoder"), noise(1, 2, 29, 64)
    changed = spectrogram.clone()
    changed[:, :, 17:] += 1.0
    before, after = encoder(spectrogram), encoder(changed)
    # Latent i hears mel frames up to 4 i, so frame 17 reaches latent 5 first.
    torch.testing.assert_close(before[:, :, :5], after[:, :, :5], atol=1e-6, rtol=0)
    assert (before[:, :, 5] - after[:, :, 5]).abs().max() > 1e-3


def test_decoded_sound_does_not_depend_on_later_latents() -> None:
    decoder, latent = tiny("decoder"), noise(1, 2, 9, 16)
    changed = latent.clone()
    changed[:, :, 6:] += 1.0
    before, after = decoder(latent), decoder(changed)
    first = 4 * 6 - 3  # latent i stands for mel frames 4 i - 3 to 4 i
    torch.testing.assert_close(before[:, :, :first], after[:, :, :first], atol=1e-6, rtol=0)
    assert (before[:, :, first] - after[:, :, first]).abs().max() > 1e-3


def test_statistics_are_per_channel_and_bin() -> None:
    encoder = tiny("encoder")
    spectrogram = noise(1, 2, 9, 64)
    mean, std = encoder.latent_mean.clone(), encoder.latent_std.clone()
    encoder.latent_mean.zero_()
    encoder.latent_std.fill_(1.0)
    raw = encoder(spectrogram).permute(0, 2, 1, 3).flatten(2)  # tokens (B, T, C * bins)
    encoder.latent_mean.copy_(mean)
    encoder.latent_std.copy_(std)
    tokens = encoder(spectrogram).permute(0, 2, 1, 3).flatten(2)
    torch.testing.assert_close(tokens, (raw - mean) / std)


def test_pixel_norm_adds_its_epsilon_inside_the_root() -> None:
    x = noise(1, 5, 3, 4) * 1e-3  # a mean square of the epsilon's size
    exact = x.double() / (x.double().pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(PixelNorm()(x).double(), exact, atol=1e-6, rtol=1e-6)


def settings_with(**changes: Any) -> Settings:
    """Return the full-size settings with some `ddconfig` keys changed (None: removed)."""
    section = copy.deepcopy(full_size()["config"]["audio_vae"])
    network = section["model"]["params"]["ddconfig"]
    for key, value in changes.items():
        network.pop(key)
        network |= {} if value is None else {key: value}
    return Settings(section, "audio_vae")


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_add_attention": None},
        {"mid_block_add_attention": True},
        {"attn_resolutions": [64]},
        {"norm_type": "group"},
        {"causality_axis": "width"},
        {"double_z": False},
        {"mel_bins": 80},
        {"in_channels": 1},
        {"ch_mult": [1] * 8},
    ],
)
def test_values_that_are_not_implemented_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        AudioVAEConfig.from_settings(settings_with(**changes))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("stft", "hop_length", 256), ("mel", "mel_fmax", 7600), ("audio", "sampling_rate", 24000)],
)
def test_another_spectrogram_is_refused(part: str, key: str, value: int) -> None:
    section = copy.deepcopy(full_size()["config"]["audio_vae"])
    section["preprocessing"][part][key] = value
    with pytest.raises(CheckpointError, match=f"{part}.{key}"):
        AudioVAEConfig.from_settings(Settings(section, "audio_vae"))


def test_other_layouts_are_refused() -> None:
    with pytest.raises(ShapeError, match="AudioEncoder"):
        tiny("encoder")(noise(1, 1, 9, 64))
    with pytest.raises(ShapeError, match="AudioDecoder"):
        tiny("decoder")(noise(1, 16, 9, 2))


@pytest.mark.parametrize("config", [TINY, ODD])
def test_long_sound_decodes_in_parts_as_at_once(
    config: AudioVAEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = random_weights(AudioDecoder(config)).double()
    latent = noise(1, config.latent_channels, 61, config.latent_bins).double()
    wanted = decoder(latent)
    monkeypatch.setattr(audio_vae, "MOST_LATENTS", 20)
    got = decoder(latent)
    # float64: the same sums of the same numbers, 1e-12 of the range for another order of them.
    assert (got - wanted).abs().max() < 1e-12 * wanted.abs().max()
    early = copy.copy(decoder)
    early.reach = config.reach // 2  # that no frame looks back further would be news
    assert (early(latent) - wanted).abs().max() > 1e-9 * wanted.abs().max()


def test_memory_of_decoding_sound_does_not_grow_with_it() -> None:
    with torch.device("meta"):
        decoder = AudioDecoder(AudioVAEConfig()).bfloat16()
    peaks = []
    for latents in (126, 480, 960):
        with ActivationMeter() as meter:
            decoder(torch.empty(1, 8, latents, 16, device="meta", dtype=torch.bfloat16))
        peaks.append(meter.peak_bytes)
    assert max(peaks) < 0.1e9
    # Whatever the length, only the spectrogram itself grows: 4 frames of 2 x 64 in bf16, twice.
    assert peaks[2] - peaks[1] <= 480 * 4 * 2 * 64 * 2 * 2
