"""What the networks of a set of files are like, from headers alone; nothing is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ltxlite import text_encoder
from ltxlite.catalog import SOURCES
from ltxlite.checkpoint.config import model_version
from ltxlite.checkpoint.files import ModelFiles, OpenModel
from ltxlite.checkpoint.recognise import is_2_5
from ltxlite.errors import CheckpointError
from ltxlite.geometry import AudioGrid, LatentGrid
from ltxlite.models import mel
from ltxlite.models.audio_vae import AudioVAEConfig
from ltxlite.models.connector import ConnectorConfig
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.settings import Settings
from ltxlite.models.text_projection import TextProjectionConfig
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.models.upscaler import UpscalerConfig
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.models.vocoder import VocoderConfig
from ltxlite_quant.tensor import QuantTensor

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


class NetworkConfigs:
    """Reads configurations of a set of files; shapes speak where no JSON does."""

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        # Whether a job makes no picture: what only that needs is neither missed nor read.
        self.sound_alone = False

    def transformer_config(self) -> TransformerConfig:
        """Return the transformer's hyper-parameters, from JSON or, without any, from shapes."""
        shapes = self.shapes("transformer")
        if is_2_5(shapes):
            raise CheckpointError(
                f"{self.need('transformer').path}: this is LTX-2.5, which ltxlite does not run; "
                "take LTX-2.3: Lightricks/LTX-2.3"
            )
        settings = self.settings("transformer", SECTIONS["transformer"])
        if settings is None:
            config = TransformerConfig.from_shapes(shapes)
        else:
            config = TransformerConfig.from_settings(settings)
        return replace(config, sound_alone=self.sound_alone)

    def version(self) -> tuple[int, ...]:
        """Return the release that the transformer's file claims to be; () if it says nothing."""
        return model_version(self.need("transformer").metadata)

    def family_version(self) -> tuple[int, ...]:
        """Return the generation that the transformer's tensors tell, as a version."""
        return tuple(int(number) for number in self.transformer_config().family.split("."))

    def connector_config(self, sound: bool) -> ConnectorConfig:
        """Return the hyper-parameters of the video or the audio connector."""
        component = "audio_connector" if sound else "video_connector"
        settings = self.settings(component, "transformer")
        if settings is None:
            return ConnectorConfig.from_shapes(self.shapes(component))
        return ConnectorConfig.from_settings(settings, sound)

    def projection_config(self, encoder: GemmaConfig | None = None) -> TextProjectionConfig:
        """Return the sizes of the text projection; `encoder` as the one among the files."""
        shapes = self.shapes("text_projection")
        return TextProjectionConfig.from_shapes(shapes, encoder or self.gemma_config())

    def video_config(self) -> VideoVAEConfig:
        """Return the video VAE's hyper-parameters; without JSON, those of its family."""
        component = "video_decoder" if self.files.find("video_decoder") else "video_encoder"
        if self.sound_alone and self.files.find(component) is None:
            return VideoVAEConfig.released(self.transformer_config().family)
        settings = self.settings(component, "vae")
        if settings is None:
            return VideoVAEConfig.released(self.transformer_config().family)
        return VideoVAEConfig.from_settings(settings)

    def audio_config(self) -> AudioVAEConfig:
        """Return the audio VAE's hyper-parameters; the same for every release without JSON."""
        component = "audio_decoder" if self.files.find("audio_decoder") else "audio_encoder"
        settings = self.settings(component, "audio_vae")
        return AudioVAEConfig() if settings is None else AudioVAEConfig.from_settings(settings)

    def vocoder_config(self) -> VocoderConfig:
        """Return the vocoder's hyper-parameters; without JSON, those its tensor names stand for."""
        settings = self.settings("vocoder", "vocoder")
        if settings is not None:
            return VocoderConfig.from_settings(settings)
        nested = any(name.startswith("vocoder.") for name in self.shapes("vocoder"))
        return VocoderConfig.released("2.3" if nested else "2.0")

    def gemma_config(self) -> GemmaConfig:
        """Return the text encoder's hyper-parameters."""
        return text_encoder.read_config(self.need("text_encoder"))

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
        model = self.files.find("video_decoder") or self.need("video_encoder")
        stored = model.named("video_decoder")
        names = ("mean-of-means", "std-of-means")
        pair = [stored[f"per_channel_statistics.{name}"].load() for name in names]
        mean, std = (_plain(value).float() for value in pair)
        return mean, std

    def upscaler_kind(self, model: OpenModel) -> str:
        """Return what an upscaler among the files does: "x2", "x1.5", "temporal x2"."""
        return upscaler_config(model).kind

    def check_families(self) -> None:
        """Raise CheckpointError where parts are of different generations or do not fit together.

        2.0 and 2.3 share most shapes; mixed, they run and give noise.
        """
        config = self.transformer_config()
        TextProjectionConfig.from_shapes(self.shapes("text_projection"), self.gemma_config())
        for component, family in self._families().items():
            if family != config.family:
                raise CheckpointError(
                    f"{self.need(component).path}: its {component} is LTX-{family}'s, the "
                    f"transformer is LTX-{config.family}'s; take it from the same release"
                )
        channels = self.video_config().latent_channels
        if channels != config.video.channels and not self.sound_alone:
            raise CheckpointError(
                f"{self.need('video_decoder').path}: latents of {channels} channels, the "
                f"transformer makes {config.video.channels}; wrong video VAE"
            )
        audio = self.audio_config().latent_channels * self.audio_bins()
        if audio != config.audio.channels:
            raise CheckpointError(
                f"{self.need('audio_decoder').path}: {audio} values a latent frame, the "
                f"transformer makes {config.audio.channels}; wrong audio VAE"
            )

    def _families(self) -> dict[str, str]:
        """Return the generation of each part whose tensors tell it."""
        projection = self.shapes("text_projection")
        shared = "aggregate_embed.weight" in projection
        nested = any(name.startswith("vocoder.") for name in self.shapes("vocoder"))
        registers = self.shapes("video_connector")
        gated = any(name.endswith("to_gate_logits.weight") for name in registers)
        return {
            "text_projection": "2.0" if shared else "2.3",
            "video_connector": "2.3" if gated else "2.0",
            "vocoder": "2.3" if nested else "2.0",
        }

    def identity(self, components: Sequence[str]) -> str:
        """Name the files that serve some components: their paths, sizes and times of change."""
        containers = {
            item.container.path: None
            for component in components
            for item in self.need(component).named(component).values()
        }
        stats = [(path.resolve(), path.stat()) for path in containers]
        return "; ".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)

    def config_source(self, component: str) -> str:
        """Tell where a network's hyper-parameters came from."""
        if component == "text_encoder":
            return text_encoder.config_source(self.need(component))
        if component == "text_projection":
            return "tensor shapes"
        section = SECTIONS.get(component)
        settings = None if section is None else self.settings(component, section)
        if settings is not None:
            return settings.where
        if component == "transformer":
            family = self.transformer_config().family
            return f"no config in file, detected LTX-{family} from tensors"
        return "tensor names and shapes"

    def need(self, component: str) -> OpenModel:
        """Return the model that serves a component; CheckpointError says where to get one."""
        model = self.files.find(component)
        if model is None:
            raise CheckpointError(f"missing: {SOURCES[component].advice()}")
        return model

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a component's tensors by name without prefix."""
        stored = self.need(component).named(component)
        return {name: item.shape for name, item in stored.items()}

    def settings(self, component: str, section: str) -> Settings | None:
        """Return a section of the JSON configuration that describes a component, if any does."""
        self.need(component)
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


def needed_parts(sound_alone: bool) -> tuple[str, ...]:
    """Return what a run needs; sound alone is made without the video VAE."""
    return tuple(name for name in NEEDED if not (sound_alone and name == "video_decoder"))


def missing_parts(files: ModelFiles, needed: Sequence[str] = NEEDED) -> list[str]:
    """Return one line of advice for every part that no file brings, each source once."""
    lines = [SOURCES[name].advice() for name in needed if files.find(name) is None]
    return list(dict.fromkeys(lines))


def _plain(loaded: Tensor | QuantTensor) -> Tensor:
    return loaded.dequantize() if isinstance(loaded, QuantTensor) else loaded
