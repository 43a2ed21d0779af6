"""Training: gradients through every network, losses that fall, runs that go on, files that load."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ltxlite.errors import CheckpointError, RequestError
from ltxlite.models.settings import Settings
from ltxlite.models.upscaler import LatentUpscaler, UpscalerConfig
from ltxlite.training import audio_vae, recipe, text, transformer, upscaler, video_vae, vocoder
from ltxlite.training.differentiable import decode, encode, upscale
from ltxlite.training.loop import CPU, Loop, Pace, trained
from ltxlite.training.world import every_fact

PACE = Pace(steps=4, rate=2e-3, warmup=2)
CROSS = re.compile(r"audio_to_video|video_to_audio|cross_|gate_adaln")


@pytest.fixture
def _gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def quiet(_: str) -> None:
    """Take notes and drop them."""


def test_video_vae_under_gradients_computes_what_the_runtime_computes() -> None:
    encoder, decoder = video_vae.build()
    pixels = torch.randn(2, 3, 9, 64, 96, generator=torch.Generator().manual_seed(2))
    latent = encoder(pixels)
    # Sums of up to 1728 fp32 terms in another order; values are about 1.
    torch.testing.assert_close(encode(encoder, pixels), latent, rtol=0, atol=1e-5)
    torch.testing.assert_close(decode(decoder, latent), decoder(latent), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"spatial_upsample": False, "temporal_upsample": True},
        {"temporal_upsample": True},
        {"spatial_scale": 1.5, "rational_resampler": True},
    ],
    ids=["x2", "temporal", "both", "x1.5"],
)
def test_upscalers_under_gradients_compute_what_the_runtime_computes(
    settings: dict[str, object],
) -> None:
    values = {"in_channels": 32, "mid_channels": 32, "num_blocks_per_stage": 1, **settings}
    network = LatentUpscaler(UpscalerConfig.from_settings(Settings(values, "test")))
    latent = torch.randn(2, 32, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(upscale(network, latent), network(latent), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_gradients")
def test_every_weight_of_the_video_vae_learns(tmp_path: Path) -> None:
    training = video_vae.VideoVAETraining(tmp_path, PACE, scenes=16)
    learn(training.loop, training.losses, 1)
    assert not unmoved(training.loop)


@pytest.mark.usefixtures("_gradients")
def test_the_decoder_goes_on_alone_from_where_both_halves_ended(tmp_path: Path) -> None:
    both = video_vae.VideoVAETraining(tmp_path, PACE, scenes=16)
    both.loop.save()
    alone = video_vae.VideoDecoderTraining(tmp_path, PACE, scenes=16)
    assert torch.equal(alone.decoder.conv_out.conv.weight, both.decoder.conv_out.conv.weight)
    learn(alone.loop, alone.losses, 1)
    assert not unmoved(alone.loop)
    for name, value in both.encoder.state_dict().items():
        assert torch.equal(alone.encoder.state_dict()[name], value), name


@pytest.mark.usefixtures("_gradients")
def test_the_encoder_alone_and_then_the_rest_are_one_run(tmp_path: Path) -> None:
    whole = video_vae.VideoVAETraining(tmp_path / "whole", PACE, scenes=16)
    whole.run(quiet)
    first = video_vae.VideoEncoderTraining(tmp_path / "parts", PACE, scenes=16)
    first.run(quiet)
    assert first.loop.step == 3  # of four: 60 % and no less
    rest = video_vae.VideoVAETraining(tmp_path / "parts", PACE, scenes=16)
    rest.run(quiet)
    for name, value in whole.loop._state().items():
        assert torch.equal(rest.loop._state()[name], value), name
    for name, value in first.encoder.state_dict().items():
        assert torch.equal(rest.encoder.state_dict()[name], value), name


@pytest.mark.usefixtures("_gradients")
def test_audio_losses_fall_and_every_weight_learns(tmp_path: Path) -> None:
    training = audio_vae.AudioVAETraining(tmp_path, Pace(steps=40, rate=2e-3, warmup=2))
    losses = learn(training.loop, training.losses, 12)
    assert losses[-1] < 0.8 * losses[0]
    assert not unmoved(training.loop)


@pytest.mark.usefixtures("_gradients")
def test_every_weight_of_the_vocoders_core_learns_and_its_extension_adds_nothing(
    tmp_path: Path,
) -> None:
    training = vocoder.VocoderTraining(tmp_path, PACE)
    learn(training.loop, training.losses, 1)
    assert not unmoved(training.loop)
    low = torch.randn(1, 2, 960, generator=torch.Generator().manual_seed(1))
    assert not bool(training.vocoder.residual(low).any())


@pytest.mark.usefixtures("_gradients")
def test_the_transformers_losses_fall_and_every_weight_learns(small_latents: Path) -> None:
    training = transformer.TransformerTraining(small_latents, Pace(40, 3e-3, warmup=2))
    losses = learn(training.loop, training.losses, 6)
    assert losses[-1] < losses[0]
    # Streams do not attend to each other yet; nothing else is left out.
    assert all(CROSS.search(name) for name in unmoved(training.loop))
    learn(training.loop, lambda step: training.losses(step + 20), 6)
    assert not unmoved(training.loop)


def learn(loop: Loop, losses: object, steps: int) -> list[float]:
    """Take some steps; return the sums of their losses."""
    assert callable(losses)
    found = []
    for step in range(steps):
        values: dict[str, Tensor] = losses(step)
        found.append(sum(float(value.detach()) for value in values.values()))
        loop.learn(values, quiet)
    return found


def unmoved(loop: Loop) -> list[str]:
    """Return the weights that no gradient has reached yet."""
    state = loop._state()
    return [
        name for name in loop.parameters if f"m.{name}" not in state or not state[f"m.{name}"].any()
    ]


@pytest.fixture
def small_latents(tmp_path: Path) -> Path:
    """Write latents of noise, as if eight clips of three kinds had been encoded."""
    from safetensors.torch import save_file

    from ltxlite.training.latents import FILE, KINDS

    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for kind in (KINDS[0], KINDS[2], KINDS[9]):
        size = (kind.frames // 8 + 1, kind.height // 32, kind.width // 32)
        tensors[f"{kind.name}.facts"] = torch.arange(8) * 100
        tensors[f"{kind.name}.video"] = torch.randn(8, 32, *size, generator=generator)
        tensors[f"{kind.name}.audio"] = torch.randn(8, 2, kind.sound, 16, generator=generator)
    save_file(tensors, tmp_path / FILE)
    return tmp_path


def test_sampled_registers_stand_for_all_of_them_when_each_is_there_as_often() -> None:
    # Each of the few counts for as many as it stands for, so that all weigh what 1024 rows weigh.
    _, path = transformer.build()
    rows = text.CaptionRows(path).of([every_fact()[0].caption()])
    video, _, bias = text.sampled_contexts(path, rows, torch.Generator().manual_seed(0))
    hidden = 1024 - rows[0].shape[1]
    assert video.shape[1] == bias.shape[-1]
    assert float(bias.exp().sum()) == pytest.approx(1024, rel=1e-5)
    assert float(bias.exp()[..., -1] * (video.shape[1] - rows[0].shape[1])) == pytest.approx(
        hidden, rel=1e-5
    )


def test_all_captions_of_a_phrase_have_as_many_tokens() -> None:
    _, path = transformer.build()
    rows = text.CaptionRows(path)
    for phrase in range(3):
        captions = [facts.caption(phrase) for facts in every_fact()[::31]]
        assert len({len(rows.tokenizer.encode(caption).ids) for caption in captions}) == 1


@pytest.mark.usefixtures("_gradients")
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = audio_vae.AudioVAETraining(tmp_path / "whole", PACE)
    whole.run(quiet)
    first = audio_vae.AudioVAETraining(tmp_path / "parts", PACE)
    learn(first.loop, first.losses, 2)
    first.loop.save()
    second = audio_vae.AudioVAETraining(tmp_path / "parts", PACE)
    second.run(quiet)
    for name, value in whole.loop.parameters.items():
        assert torch.equal(value, second.loop.parameters[name]), name


def test_a_missing_state_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train what comes before"):
        trained(tmp_path / "none.safetensors", "encoder", video_vae.build()[0])


def test_a_finished_run_is_not_overwritten_without_being_asked(tmp_path: Path) -> None:
    from ltxlite.progress import Report
    from ltxlite.training.course import train_world

    (tmp_path / "video_vae.state.safetensors").touch()
    with pytest.raises(RequestError, match="--resume"):
        train_world(tmp_path, False, CPU, Report())


def test_the_rate_rises_stays_and_falls() -> None:
    pace = Pace(steps=100, rate=1.0, warmup=10, decay=0.5)
    rates = [pace.rate * pace.share_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:50]) == {1.0}
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] < 0.002


def test_recipes_are_read_by_the_same_code_as_release_files() -> None:
    # Every key is one that the runtime reads or names as inert.
    settings = Settings(recipe.TRANSFORMER, "recipe")
    from ltxlite.models.transformer_config import TransformerConfig

    assert TransformerConfig.from_settings(settings).unread == ()
    assert upscaler.build(temporal=True) is not None
