"""Builds each network from the user's files and puts it where the plan wants it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ltxlite import text_encoder
from ltxlite.checkpoint.assemble import LoadReport, Naming, Rules, assemble
from ltxlite.checkpoint.at_load import AtLoad
from ltxlite.checkpoint.files import ModelFiles, OpenModel
from ltxlite.checkpoint.stored import StoredTensor
from ltxlite.math_mode import capability_of, set_math
from ltxlite.memory.place import Anatomy, FileMap, Memory, place
from ltxlite.models import (
    audio_vae,
    connector,
    text_projection,
    transformer,
    upscaler,
    video_vae,
    vocoder,
)
from ltxlite.models.audio_vae import AudioDecoder, AudioEncoder
from ltxlite.models.connector import Connector
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.generator import Generator
from ltxlite.models.rolling import GROUP_BYTES
from ltxlite.models.text_projection import TextProjection
from ltxlite.models.tokenizer import Tokenizer
from ltxlite.models.transformer import Transformer
from ltxlite.models.upscaler import LatentUpscaler
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.vocoder import ExtendedVocoder, build_vocoder
from ltxlite.models.window import DecodeWindow
from ltxlite.network_configs import NetworkConfigs, upscaler_config
from ltxlite.pieces import cut_linears

Module = TypeVar("Module", bound=nn.Module)
Prepare = Callable[[Transformer], None]

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

_SOUND_ALONE = Naming(transformer.RENAMES, transformer.SOUND_ALONE_IGNORED, transformer.FLOAT32)
_ADALNS = ("adaln", "prompt_adaln", "cross_adaln", "gate_adaln")
# What of a network is walked, and what stays on the host: AdaLNs are read once a stage, when they
# are tabulated; of Gemma's embeddings, 2 GB in bf16, a prompt needs a few hundred rows.
ANATOMY = {
    "transformer": Anatomy(
        ("blocks",), tuple(f"{ends}.{name}" for ends in ("video", "audio") for name in _ADALNS)
    ),
    "video_connector": Anatomy(("blocks",)),
    "audio_connector": Anatomy(("blocks",)),
    "text_encoder": Anatomy(("layers",), ("embed_tokens",)),
}


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


class Networks(NetworkConfigs):
    """Builds networks on one device in one dtype; keeps none of them.

    memory: where blocks live; without it every network is loaded whole.
    """

    def __init__(
        self,
        files: ModelFiles,
        device: torch.device,
        dtype: torch.dtype,
        at_load: AtLoad | None = None,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(files)
        self.device, self.dtype, self.at_load, self.memory = device, dtype, at_load, memory
        # The first transcendental function of a process must not run on several threads: in torch
        # 2.13 half of its values may come out at 3e-4 (docs/log.md, 2026-11-21).
        torch.ones(1).exp()
        self.window = DecodeWindow(GROUP_BYTES)  # how the picture is decoded
        self.math = "auto"  # what the transformer computes in
        self.exact: tuple[str, ...] = ()  # layers that do not
        self.loaded: list[Loaded] = []
        self.lora_models: list[OpenModel] = []  # their factors may be read from their files
        self.on_load: Callable[[Loaded], None] | None = None

    def close(self) -> None:
        """End the queue that blocks moved on; networks that are still there are of no use then."""
        if self.memory is not None:
            self.memory.machine.close()
            self.memory = None

    def naming(self, component: str) -> Naming:
        """Return how a network's checkpoint names become module names."""
        alone = self.sound_alone and component == "transformer"
        return _SOUND_ALONE if alone else NAMINGS[component]

    # Networks: loaded when called; the caller decides how long they live.

    def transformer(self, prepare: Prepare | None = None) -> Transformer:
        """Load the transformer; `prepare` may change it before its blocks find their places."""
        config = self.transformer_config()
        network = self._assembled("transformer", lambda: Transformer(config))
        if self.memory is not None and self.memory.chunk is not None:
            network.chunk = self.memory.chunk
        set_math(network, self.math, capability_of(self.device), self.exact)
        if prepare is not None:
            prepare(network)
        self._place(network, "transformer")
        return network

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
        config = self.projection_config(encoder)
        return self._load("text_projection", lambda: TextProjection(config))

    def gemma(self) -> Gemma:
        """Load the text encoder."""
        config = self.gemma_config()
        return self._load("text_encoder", lambda: Gemma(config))

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that came with the text encoder."""
        model = self.need("text_encoder")
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
        self._place(network, "upscaler")
        return network

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (C,) of video latents, fp32, on the device."""
        mean, std = super().latent_statistics()
        return mean.to(self.device), std.to(self.device)

    def _load(
        self, component: str, build: Callable[[], Module], dtype: torch.dtype | None = None
    ) -> Module:
        network = self._assembled(component, build, dtype)
        self._place(network, component)
        return network

    def _assembled(
        self, component: str, build: Callable[[], Module], dtype: torch.dtype | None = None
    ) -> Module:
        model = self.need(component)
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
        # Streamed weights keep the dtype of their file: they are read from there again and again.
        as_stored = self.memory is not None and component in (*ANATOMY, "text_projection")
        rules = Rules(self.naming(component), dtype, quantize, as_stored)
        report = assemble(network, stored, rules, where)
        kind = None if self.at_load is None else self.at_load.format.name
        source = self.config_source(component)
        self.loaded.append(Loaded(component, model.path, report, source, kind))
        if self.on_load is not None:
            self.on_load(self.loaded[-1])

    def _place(self, network: nn.Module, component: str) -> None:
        anatomy = ANATOMY.get(component)
        if self.memory is not None and isinstance(network, TextProjection):
            names = [name for name, _ in network.named_children()]
            cut_linears(network, names)
            anatomy = Anatomy(tuple(f"{name}.pieces" for name in names))
        if self.memory is None or anatomy is None:
            network.to(self.device)
            return
        present = {name for name, _ in network.named_modules()}
        host = tuple(name for name in anatomy.host if name in present)  # 2.0 has no prompt AdaLN
        anatomy = Anatomy(anatomy.streamed, host)
        placement = self.memory.of(component)
        place(network, anatomy, self.device, self.memory, placement, self._maps())

    def _maps(self) -> list[FileMap]:
        opened = (*self.files.models, *self.lora_models)
        models = (model.tensors.values() for model in opened)
        containers = {id(item.container): item.container for items in models for item in items}
        return [FileMap(*item.span, item.path) for item in containers.values()]
