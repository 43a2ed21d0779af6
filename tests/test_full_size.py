"""All networks built from the full-size 2.3 configuration, against every entry of the release."""

import json
from pathlib import Path

import torch

from ltxlite.models.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from ltxlite.models.connector import Connector, ConnectorConfig
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.settings import Settings
from ltxlite.models.text_projection import TextProjection, TextProjectionConfig
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.models.vocoder import VocoderConfig, build_vocoder
from ltxlite.release import release_name

FULL = json.loads((Path(__file__).parent / "golden" / "real_22b_keys.json").read_text("utf-8"))


def test_the_networks_hold_exactly_the_5947_tensors_of_a_full_size_checkpoint() -> None:
    config = FULL["config"]
    transformer = Settings(config["transformer"], "transformer")
    video = VideoVAEConfig.from_settings(Settings(config["vae"], "vae"))
    audio = AudioVAEConfig.from_settings(Settings(config["audio_vae"], "audio_vae"))
    with torch.device("meta"):
        networks = {
            "transformer": Transformer(TransformerConfig.from_settings(transformer)),
            "video_connector": Connector(ConnectorConfig.from_settings(transformer)),
            "audio_connector": Connector(ConnectorConfig.from_settings(transformer, sound=True)),
            "text_projection": TextProjection(
                TextProjectionConfig.from_settings(transformer, GemmaConfig())
            ),
            "video_encoder": VideoEncoder(video),
            "video_decoder": VideoDecoder(video),
            "audio_encoder": AudioEncoder(audio),
            "audio_decoder": AudioDecoder(audio),
            "vocoder": build_vocoder(VocoderConfig.from_settings(Settings(config["vocoder"], "v"))),
        }
    ours = {
        release_name(component, name): list(value.shape)
        for component, network in networks.items()
        for name, value in network.state_dict().items()
    }
    release = FULL["tensors"]
    release = release if isinstance(release, dict) else {x["name"]: x["shape"] for x in release}
    # Deliberately not loaded: the vocoder's synthesis basis, which its extension never uses.
    ignored = release.keys() - ours.keys()
    assert ignored == {"vocoder.mel_stft.stft_fn.inverse_basis"}
    assert len(release) == 5947
    assert ours == {name: list(shape) for name, shape in release.items() if name not in ignored}
