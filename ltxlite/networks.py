"""Builds each network from the user's files. With `pipeline`, the only file that knows them all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ltxlite import text_encoder
from ltxlite.catalog import SOURCES
from ltxlite.checkpoint.assemble import LoadReport, Naming, assemble
from ltxlite.checkpoint.at_load import AtLoad
from ltxlite.checkpoint.config import model_version
from ltxlite.checkpoint.files import ModelFiles, OpenModel
from ltxlite.checkpoint.recognise import is_2_5
from ltxlite.checkpoint.stored import StoredTensor
from ltxlite.errors import CheckpointError
from ltxlite.geometry import AudioGrid, LatentGrid
from ltxlite.models import (
    audio_vae,
    connector,
    mel,
    text_projection,
    transformer,
    upscaler,
    video_vae,
    vocoder,
)
from ltxlite.models.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from ltxlite.models.connector import Connector, ConnectorConfig
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.generator import Generator
from ltxlite.models.settings import Settings
from ltxlite.models.text_projection import TextProjection, TextProjectionConfig
from ltxlite.models.tokenizer import Tokenizer
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.models.upscaler import LatentUpscaler, UpscalerConfig
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.models.vocoder import ExtendedVocoder, VocoderConfig, build_vocoder
from ltxlite_quant.tensor import QuantTensor

Module = TypeVar("Module", bound=nn.Module)

NAMINGS = {
    "transformer": Naming(transformer.RENAMES, transformer.IGNORED, transformer.FLOAT32),
    "video_connector": Naming(connector.RENAMES, connector.IGNORED),
    "audio_connector": Naming(connector.RENAMES, connector.IGNORED),
    "text_projection": Naming(text_projection.RENAMES, text_projection.IGNORED),
    "text_encoder": text_encoder.NAMING,
    "video_encoder": Naming(video_vae.RENAMES, video_vae.ENCODER_IGNORED),
    "video_decoder": Naming(video_vae.RENAMES, video_vae.DECODER_IGNORED),
    "audio_encoder": Naming(audio_vae.RENAMES, audio_vae.IGNORED),
    "audio_decoder": Naming(audio_vae.RENAMES, audio_vae.IGNORED),
    "vocoder": Naming(vocoder.RENAMES, vocoder.IGNORED),
    "upscaler": Naming(upscaler.RENAMES, upscaler.IGNORED),
}

# The section of the JSON configuration that describes a network.
SECTIONS = {
    "transformer": "transformer",
    "video_connector": "transformer",
    "audio_connector": "transformer",
    "video_encoder": "vae",
    "video_decoder": "vae",
    "audio_encoder": "audio_vae",
    "audio_decoder": "audio_vae",
    "vocoder": "vocoder",
}

# What a run from prompt to clip needs, in the order in which it is reported missing.
NEEDED = (
    "transformer",
    "video_connector",
    "audio_connector",
    "text_projection",
    "text_encoder",
    "video_decoder",
    "audio_decoder",
    "vocoder",
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A line of the load report: which network came from which file, stored how."""

    component: str
    path: Path
    report: LoadReport
    config_source: str
    at_load: str | None = None

    def line(self) -> str:
        """Return the report as text."""
        stored = ", ".join(
            f"{name}: {count} tensors, {self.report.nbytes[name] / 1e9:.3g} GB"
            for name, count in sorted(self.report.tensors.items())
        )
        ignored = f"; {len(self.report.ignored)} unused" if self.report.ignored else ""
        if self.report.quantized:
            ignored += f"; {self.report.quantized} quantized to {self.at_load} on loading"
        return f"{self.component}: {self.path} ({stored}{ignored}); config: {self.config_source}"


class Networks:
    """Builds networks on one device in one dtype; keeps none of them."""

    def __init__(
        self,
        files: ModelFiles,
        device: torch.device,
        dtype: torch.dtype,
        at_load: AtLoad | None = None,
    ) -> None:
        self.files, self.device, self.dtype, self.at_load = files, device, dtype, at_load
        # The first transcendental function of a process must not run on several threads: in torch
        # 2.13 half of its values may come out at 3e-4 (docs/log.md, 2026-11-21).
        torch.ones(1).exp()
        self.loaded: list[Loaded] = []
        self.on_load: Callable[[Loaded], None] | None = None

    def naming(self, component: str) -> Naming:
        """Return how a network's checkpoint names become module names."""
        return NAMINGS[component]

    # Configurations: read from headers, no data touched.

    def transformer_config(self) -> TransformerConfig:
        """Return the transformer's hyper-parameters, from JSON or, without any, from shapes."""
        shapes = self._shapes("transformer")
        if is_2_5(shapes):
            raise CheckpointError(
                f"{self._need('transformer').path}: this is LTX-2.5, which ltxlite does not run; "
                "take LTX-2.3: Lightricks/LTX-2.3"
            )
        settings = self._settings("transformer", SECTIONS["transformer"])
        if settings is None:
            return TransformerConfig.from_shapes(shapes)
        return TransformerConfig.from_settings(settings)

    def version(self) -> tuple[int, ...]:
        """Return the release that the transformer's file claims to be; () if it says nothing."""
        return model_version(self._need("transformer").metadata)

    def connector_config(self, sound: bool) -> ConnectorConfig:
        """Return the hyper-parameters of the video or the audio connector."""
        component = "audio_connector" if sound else "video_connector"
        settings = self._settings(component, "transformer")
        if settings is None:
            return ConnectorConfig.from_shapes(self._shapes(component))
        return ConnectorConfig.from_settings(settings, sound)

    def video_config(self) -> VideoVAEConfig:
        """Return the video VAE's hyper-parameters; without JSON, those of its family."""
        component = "video_decoder" if self.files.find("video_decoder") else "video_encoder"
        settings = self._settings(component, "vae")
        if settings is None:
            return VideoVAEConfig.released(self.transformer_config().family)
        return VideoVAEConfig.from_settings(settings)

    def audio_config(self) -> AudioVAEConfig:
        """Return the audio VAE's hyper-parameters; the same for every release without JSON."""
        component = "audio_decoder" if self.files.find("audio_decoder") else "audio_encoder"
        settings = self._settings(component, "audio_vae")
        return AudioVAEConfig() if settings is None else AudioVAEConfig.from_settings(settings)

    def vocoder_config(self) -> VocoderConfig:
        """Return the vocoder's hyper-parameters; without JSON, those its tensor names stand for."""
        settings = self._settings("vocoder", "vocoder")
        if settings is not None:
            return VocoderConfig.from_settings(settings)
        nested = any(name.startswith("vocoder.") for name in self._shapes("vocoder"))
        return VocoderConfig.released("2.3" if nested else "2.0")

    def gemma_config(self) -> GemmaConfig:
        """Return the text encoder's hyper-parameters."""
        return text_encoder.read_config(self._need("text_encoder"))

    def latent_grid(self) -> LatentGrid:
        """Return how pixels scale to video latents."""
        return self.video_config().grid

    def audio_grid(self) -> AudioGrid:
        """Return how samples scale to audio latents."""
        return AudioGrid(mel.SAMPLE_RATE, mel.HOP, self.audio_config().downscale)

    def audio_bins(self) -> int:
        """Return the frequency bins of an audio latent frame."""
        return self.audio_config().latent_bins

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (C,) of video latents, fp32, without the VAE."""
        model = self.files.find("video_decoder") or self._need("video_encoder")
        stored = model.named("video_decoder")
        names = ("mean-of-means", "std-of-means")
        pair = [stored[f"per_channel_statistics.{name}"].load() for name in names]
        mean, std = (_plain(value).float().to(self.device) for value in pair)
        return mean, std

    def upscaler_kind(self, model: OpenModel) -> str:
        """Return what an upscaler among the files does: "x2", "x1.5", "temporal x2"."""
        return upscaler_config(model).kind

    def check_families(self) -> None:
        """Raise CheckpointError where parts are of different generations or do not fit together.

        2.0 and 2.3 share most shapes; mixed, they run and give noise.
        """
        config = self.transformer_config()
        TextProjectionConfig.from_shapes(self._shapes("text_projection"), self.gemma_config())
        for component, family in self._families().items():
            if family != config.family:
                raise CheckpointError(
                    f"{self._need(component).path}: its {component} is LTX-{family}'s, the "
                    f"transformer is LTX-{config.family}'s; take it from the same release"
                )
        channels = self.video_config().latent_channels
        if channels != config.video.channels:
            raise CheckpointError(
                f"{self._need('video_decoder').path}: latents of {channels} channels, the "
                f"transformer makes {config.video.channels}; wrong video VAE"
            )
        audio = self.audio_config().latent_channels * self.audio_bins()
        if audio != config.audio.channels:
            raise CheckpointError(
                f"{self._need('audio_decoder').path}: {audio} values a latent frame, the "
                f"transformer makes {config.audio.channels}; wrong audio VAE"
            )

    def _families(self) -> dict[str, str]:
        """Return the generation of each part whose tensors tell it."""
        projection = self._shapes("text_projection")
        shared = "aggregate_embed.weight" in projection
        nested = any(name.startswith("vocoder.") for name in self._shapes("vocoder"))
        registers = self._shapes("video_connector")
        gated = any(name.endswith("to_gate_logits.weight") for name in registers)
        return {
            "text_projection": "2.0" if shared else "2.3",
            "video_connector": "2.3" if gated else "2.0",
            "vocoder": "2.3" if nested else "2.0",
        }

    # Networks: loaded when called; the caller decides how long they live.

    def transformer(self) -> Transformer:
        """Load the transformer."""
        config = self.transformer_config()
        return self._load("transformer", lambda: Transformer(config))

    def video_connector(self) -> Connector:
        """Load the connector of the picture stream."""
        config = self.connector_config(sound=False)
        return self._load("video_connector", lambda: Connector(config))

    def audio_connector(self) -> Connector:
        """Load the connector of the sound stream."""
        config = self.connector_config(sound=True)
        return self._load("audio_connector", lambda: Connector(config))

    def text_projection(self, encoder: GemmaConfig | None = None) -> TextProjection:
        """Load the projection of Gemma's states; `encoder` defaults to the one among the files."""
        shapes = self._shapes("text_projection")
        config = TextProjectionConfig.from_shapes(shapes, encoder or self.gemma_config())
        return self._load("text_projection", lambda: TextProjection(config))

    def gemma(self) -> Gemma:
        """Load the text encoder."""
        config = self.gemma_config()
        return self._load("text_encoder", lambda: Gemma(config))

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that came with the text encoder."""
        model = self._need("text_encoder")
        return text_encoder.read_tokenizer(model, self.gemma_config().vocabulary)

    def video_encoder(self) -> VideoEncoder:
        """Load the encoder half of the video VAE."""
        config = self.video_config()
        return self._load("video_encoder", lambda: VideoEncoder(config))

    def video_decoder(self) -> VideoDecoder:
        """Load the decoder half of the video VAE."""
        config = self.video_config()
        return self._load("video_decoder", lambda: VideoDecoder(config))

    def audio_encoder(self) -> AudioEncoder:
        """Load the encoder half of the audio VAE."""
        config = self.audio_config()
        return self._load("audio_encoder", lambda: AudioEncoder(config))

    def audio_decoder(self) -> AudioDecoder:
        """Load the decoder half of the audio VAE."""
        config = self.audio_config()
        return self._load("audio_decoder", lambda: AudioDecoder(config))

    def vocoder(self) -> Generator | ExtendedVocoder:
        """Load the vocoder, always in fp32: bf16 arithmetic is audible in it."""
        config = self.vocoder_config()
        return self._load("vocoder", lambda: build_vocoder(config), torch.float32)

    def upscaler_from(self, model: OpenModel) -> LatentUpscaler:
        """Load one of the latent upscalers among the files."""
        config = upscaler_config(model)
        with torch.device("meta"):
            network = LatentUpscaler(config)
        self._assemble(network, "upscaler", model, model.named("upscaler"), self.dtype)
        return network

    def _load(
        self, component: str, build: Callable[[], Module], dtype: torch.dtype | None = None
    ) -> Module:
        model = self._need(component)
        with torch.device("meta"):
            network = build()
        self._assemble(network, component, model, model.named(component), dtype or self.dtype)
        return network

    def _assemble(
        self,
        network: nn.Module,
        component: str,
        model: OpenModel,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
    ) -> None:
        where = f"{model.path} ({component})"
        quantize = None if self.at_load is None else self.at_load.of(component)
        report = assemble(network, stored, self.naming(component), dtype, where, quantize)
        network.to(self.device)
        kind = None if self.at_load is None else self.at_load.format.name
        source = self._config_source(component)
        self.loaded.append(Loaded(component, model.path, report, source, kind))
        if self.on_load is not None:
            self.on_load(self.loaded[-1])

    def _config_source(self, component: str) -> str:
        """Tell where a network's hyper-parameters came from."""
        if component == "text_encoder":
            return text_encoder.config_source(self._need(component))
        if component == "text_projection":
            return "tensor shapes"
        section = SECTIONS.get(component)
        settings = None if section is None else self._settings(component, section)
        if settings is not None:
            return settings.where
        if component == "transformer":
            family = self.transformer_config().family
            return f"no config in file, detected LTX-{family} from tensors"
        return "tensor names and shapes"

    def _need(self, component: str) -> OpenModel:
        model = self.files.find(component)
        if model is None:
            raise CheckpointError(f"missing: {SOURCES[component].advice()}")
        return model

    def _shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        stored = self._need(component).named(component)
        return {name: item.shape for name, item in stored.items()}

    def _settings(self, component: str, section: str) -> Settings | None:
        self._need(component)
        config, where = self.files.config_of(component)
        if config is None or not isinstance(config.get(section), Mapping):
            return None
        return Settings(config[section], f"{Path(where).name}: config.{section}")


def upscaler_config(model: OpenModel) -> UpscalerConfig:
    """Return an upscaler's hyper-parameters; its tensors must agree with its JSON."""
    shapes = {name: item.shape for name, item in model.named("upscaler").items()}
    inferred = UpscalerConfig.from_shapes(shapes)
    config: dict[str, Any] | None = model.config()
    if config is None:
        return inferred
    given = UpscalerConfig.from_settings(Settings(config, f"{model.path}: config"))
    if given != inferred:
        raise CheckpointError(
            f"{model.path}: its configuration says {given}, its tensors say {inferred}; "
            "the file is damaged or repackaged wrongly"
        )
    return given


def missing_parts(files: ModelFiles, needed: Sequence[str] = NEEDED) -> list[str]:
    """Return one line of advice for every part that no file brings, each source once."""
    lines = [SOURCES[name].advice() for name in needed if files.find(name) is None]
    return list(dict.fromkeys(lines))


def _plain(loaded: Tensor | QuantTensor) -> Tensor:
    return loaded.dequantize() if isinstance(loaded, QuantTensor) else loaded
