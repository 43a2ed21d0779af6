"""Every network on a device that is not the CPU: no tensor of its own may stay behind.

`meta` tensors have a device and no data, and like a GPU's they refuse arithmetic with the CPU's; so
this finds on any machine what otherwise only a user's card finds. (Fake CUDA tensors cannot be
indexed by a build of torch without CUDA.)
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ltxlite import conditioning
from ltxlite.demo import CONFIG, UPSCALER_CONFIG
from ltxlite.geometry import AudioGrid, LatentGrid, audio_positions, video_positions
from ltxlite.models.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.mel import log_mel
from ltxlite.models.passes import (
    Pass,
    Perturbation,
    RowWeights,
    Skip,
    StreamInput,
    StreamRope,
    Timesteps,
)
from ltxlite.models.rolling import decode_frames, encode_frames
from ltxlite.models.rope import Rope
from ltxlite.models.settings import Settings
from ltxlite.models.text_projection import TextProjection, TextProjectionConfig
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.models.upscaler import LatentUpscaler, UpscalerConfig, upscale_normalised
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.models.vocoder import VocoderConfig, build_vocoder

AWAY = torch.device("meta")


def settings(section: str) -> Settings:
    return Settings(CONFIG[section], section)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without data."""
    return torch.empty(*shape, device=AWAY, dtype=dtype)


def moved(build: Callable[..., nn.Module], *arguments: object) -> nn.Module:
    with torch.device("meta"):
        network = build(*arguments)
    values = {name: random(*value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(values, assign=True)
    return network


def stream(transformer: Transformer, sound: bool, dtype: torch.dtype) -> StreamInput:
    config = transformer.config
    part = config.audio if sound else config.video
    grid = (2, 3, 2)
    positions = (
        audio_positions(12, AudioGrid()) if sound else video_positions(grid, 24.0, LatentGrid())
    )
    ropes = transformer.rope(positions, sound)
    index = torch.arange(12, device=AWAY).expand(2, 12) % 2
    return StreamInput(
        latent=random(2, 12, part.channels),
        sigma=random(2),
        timesteps=Timesteps(random(2), index),
        positions=positions.to(AWAY),
        context=random(2, 5, part.context, dtype=dtype),
        context_mask=torch.ones(2, 5, device=AWAY),
        weights=(RowWeights(0, 7, random(1, 1, 12)),),
        rope=StreamRope(away(ropes.own), away(ropes.cross)),
    )


def away(rope: Rope) -> Rope:
    """Move a table; building one looks at the positions, which `meta` tensors do not have."""
    assert rope.index is not None
    tensors = (rope.cosines, rope.sines, rope.index)
    cosines, sines, index = (value.to(AWAY) for value in tensors)
    return Rope(cosines, sines, rope.layout, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_stays_on_its_device(dtype: torch.dtype) -> None:
    config = TransformerConfig.from_settings(settings("transformer"))
    transformer = moved(Transformer, config)
    for name, parameter in transformer.named_parameters():
        if not name.endswith("table"):
            parameter.data = parameter.data.to(dtype)
    transformer.chunk = 5
    mixed = (Perturbation(((Skip.VIDEO_SELF, None), (Skip.VIDEO_TO_AUDIO, None))), Perturbation())
    given = Pass(stream(transformer, False, dtype), stream(transformer, True, dtype), mixed)
    velocity = transformer(given)
    for predicted in (velocity.video, velocity.audio):
        assert predicted.device == AWAY
        assert predicted.dtype == torch.float32


def test_latent_states_follow_their_tokens() -> None:
    positions = video_positions((2, 1, 3), 24.0, LatentGrid())
    state = conditioning.start(random(1, 6, 5), positions.to(AWAY))
    state = conditioning.place_image(state, torch.zeros(1, 5, 1, 1, 3), 0, 0.5)
    state = conditioning.append(state, torch.zeros(1, 5, 2, 1, 3), positions, 1.0)
    state = conditioning.mask_interval(state, 0.1, 0.2)
    assert state.noised(random(1, 12, 5), 0.9).device == AWAY
    assert state.blend(random(1, 12, 5)).device == AWAY
    assert conditioning.freeze(state).mask.device == AWAY


def test_the_text_path_stays_on_its_device() -> None:
    gemma = GemmaConfig(
        hidden=8, layers=2, heads=2, kv_heads=1, head_dim=4, inner=8, vocabulary=9, window=3
    )
    section = settings("transformer")
    projection = moved(TextProjection, TextProjectionConfig.from_settings(section, gemma))
    states = [random(1, 5, 8) for _ in range(3)]
    video, audio = projection.features(states)
    assert video.device == audio.device == AWAY


def test_the_video_vae_stays_on_its_device() -> None:
    config = VideoVAEConfig.from_settings(settings("vae"))
    decoder, encoder = moved(VideoDecoder, config), moved(VideoEncoder, config)
    latent = random(1, 8, 3, 1, 2)
    assert decoder(latent).device == AWAY
    assert all(frames.device == AWAY for frames in decode_frames(decoder, latent))
    assert encoder(random(1, 3, 9, 32, 64)).device == AWAY
    assert encode_frames(encoder, [random(1, 3, 9, 32, 64)]).device == AWAY


def test_the_sound_networks_stay_on_their_device() -> None:
    config = AudioVAEConfig.from_settings(settings("audio_vae"))
    mel = moved(AudioDecoder, config)(random(1, 2, 6, 16))
    assert mel.device == AWAY
    vocoder = moved(build_vocoder, VocoderConfig.from_settings(settings("vocoder")))
    assert vocoder(mel).device == AWAY
    spectrogram = log_mel(random(1, 2, 4800), 48000)
    assert moved(AudioEncoder, config)(spectrogram).device == AWAY


def test_the_upscaler_stays_on_its_device() -> None:
    config = UpscalerConfig.from_settings(Settings(UPSCALER_CONFIG, "upscaler"))
    upscaler = moved(LatentUpscaler, config)
    mean, std = random(8), random(8)
    assert upscale_normalised(upscaler, random(1, 8, 2, 3, 2), mean, std).device == AWAY


def test_a_tensor_left_on_the_cpu_would_be_found() -> None:
    with pytest.raises(RuntimeError, match="expected device"):
        random(2) + torch.ones(2)
