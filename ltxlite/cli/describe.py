"""One model file, described from its header: for `inspect` and `doctor`."""

from collections import Counter
from typing import Any

import torch

from ltxlite.checkpoint.config import model_version
from ltxlite.checkpoint.files import ModelFiles, OpenModel
from ltxlite.checkpoint.generation import upscaler_generation
from ltxlite.checkpoint.lora_facts import lora_facts
from ltxlite.checkpoint.recognise import unclaimed
from ltxlite.checkpoint.variant import variant_of
from ltxlite.errors import LtxliteError
from ltxlite.network_configs import upscaler_config
from ltxlite.networks import Networks


def describe(model: OpenModel) -> dict[str, Any]:
    """Return what a file is: parts, family, variant, tensors and bytes by dtype, config source."""
    dtypes: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for stored in model.tensors.values():
        dtypes[stored.format.name] += 1
        sizes[stored.format.name] += stored.nbytes
    unknown = unclaimed(model.tensors, model.components)
    variant = variant_of(model)
    return {
        "path": str(model.path),
        "components": list(model.components),
        "tensors": len(model.tensors),
        "bytes": sum(sizes.values()),
        "dtypes": {name: [count, sizes[name]] for name, count in dtypes.most_common()},
        "model_version": ".".join(map(str, model_version(model.metadata))) or None,
        "variant": variant[0] if variant and "transformer" in model.components else None,
        "variant_from": variant[1] if variant and "transformer" in model.components else None,
        "config": _config_place(model),
        "networks": _networks(model),
        "unclaimed": unknown,
    }


def lines_of(item: dict[str, Any]) -> list[str]:
    """Return a description as lines of text."""
    lines = [
        f"{item['path']}: {', '.join(item['components'])}",
        f"  {item['tensors']} tensors, {item['bytes'] / 1e9:.3f} GB: "
        + ", ".join(
            f"{name} {count} ({size / 1e9:.3f} GB)"
            for name, (count, size) in item["dtypes"].items()
        ),
        f"  config: {item['config']}; model_version: {item['model_version'] or 'not given'}",
    ]
    if item["variant"]:
        lines.append(f"  variant: {item['variant']} (from {item['variant_from']})")
    lines += [f"  {name}: {text}" for name, text in item["networks"].items()]
    if item["unclaimed"]:
        first = ", ".join(item["unclaimed"][:5])
        lines.append(f"  {len(item['unclaimed'])} tensors belong to no known part: {first}")
    return lines


def _config_place(model: OpenModel) -> str:
    if model.config() is not None or "gemma_config" in model.metadata:
        return "in the file"
    if (model.path / "config.json").is_file():
        return "config.json"
    return "none: taken from names and shapes"


def _networks(model: OpenModel) -> dict[str, str]:
    """Describe each network of the file in a line, or say why it cannot be built."""
    networks = Networks(ModelFiles([model]), torch.device("cpu"), torch.float32)
    readers = {
        "transformer": lambda: _transformer(networks),
        "video_connector": lambda: _connector(networks, sound=False),
        "audio_connector": lambda: _connector(networks, sound=True),
        "video_decoder": lambda: _video(networks),
        "audio_decoder": lambda: _audio(networks),
        "vocoder": lambda: f"{networks.vocoder_config().sample_rate} Hz",
        "upscaler": lambda: _upscaler(model),
        "text_encoder": lambda: _gemma(networks),
        "lora": lambda: "; ".join(lora_facts(model).lines()),
    }
    lines = {}
    for component in model.components:
        if component in readers:
            try:
                lines[component] = readers[component]()
            except LtxliteError as error:
                lines[component] = f"cannot be used: {error}"
    return lines


def _transformer(networks: Networks) -> str:
    config = networks.transformer_config()
    unread = f"; keys nobody reads: {', '.join(config.unread)}" if config.unread else ""
    return (
        f"LTX-{config.family}, {config.layers} blocks, video {config.video.width}, "
        f"audio {config.audio.width}, {config.video.heads} heads, "
        f"gate scale {config.gate_scale:g}{unread}"
    )


def _video(networks: Networks) -> str:
    config = networks.video_config()
    return (
        f"1/{config.space_scale} in space, 1/{config.time_scale} in time, "
        f"{config.latent_channels} channels; padding: encoder {config.encoder_padding}, "
        f"decoder {config.decoder_padding}"
    )


def _connector(networks: Networks, sound: bool) -> str:
    config = networks.connector_config(sound)
    gated = "gated" if config.gated else "not gated"
    return f"{config.layers} layers, width {config.width}, {config.registers} registers, {gated}"


def _audio(networks: Networks) -> str:
    grid = networks.audio_grid()
    return (
        f"{networks.audio_config().latent_channels} channels of {networks.audio_bins()} bins, "
        f"{grid.latents_per_second:g} latents a second of {grid.rate} Hz sound"
    )


def _upscaler(model: OpenModel) -> str:
    config, told = upscaler_config(model), upscaler_generation(model)
    version = "" if told is None else f"LTX-{'.'.join(map(str, told[0][:2]))} ({told[1]}), "
    return f"{version}{config.kind}, {config.latent_channels} channels, width {config.width}"


def _gemma(networks: Networks) -> str:
    config = networks.gemma_config()
    return f"Gemma 3, {config.layers} layers, width {config.hidden}, {config.vocabulary} words"
