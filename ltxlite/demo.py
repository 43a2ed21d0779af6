"""The two tiny checkpoints of `demo`: a trained world model, and one with random weights.

Both exercise every part of the real path - tokenizer, Gemma, connectors, transformer, upscaler,
VAEs, vocoder - in seconds on a CPU. The first does what its prompt says, in a small world
(`ltxlite.training`); what the second shows means nothing, it is written anew for structure tests.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltxlite.errors import CheckpointError
from ltxlite.media.atomic import written_beside
from ltxlite.models.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from ltxlite.models.connector import Connector, ConnectorConfig
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.settings import Settings
from ltxlite.models.text_projection import TextProjection, TextProjectionConfig
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.models.upscaler import LatentUpscaler, UpscalerConfig
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.video_vae_config import VideoVAEConfig
from ltxlite.models.vocoder import VocoderConfig, build_vocoder
from ltxlite.release import release_name
from ltxlite.training.fixed import FIXED
from ltxlite.training.recipe import GEMMA
from ltxlite.training.tokens import train_tokenizer

MODEL = "ltxlite-demo-2.3-distilled.safetensors"
UPSCALER = "ltxlite-demo-2.3-spatial-upscaler-x2.safetensors"
TEXT_ENCODER = "ltxlite-demo-gemma-3.safetensors"
WORLD = (
    "ltxlite-world-2.3-distilled-Q8_0.gguf",
    "ltxlite-world-2.3-companions.safetensors",
    "ltxlite-world-2.3-spatial-upscaler-x2.safetensors",
    "ltxlite-world-gemma-3-Q8_0.gguf",
)
_SEED = 23


def _vae_blocks(suffix: str) -> list[list[Any]]:
    blocks: list[list[Any]] = []
    for kind in ("space", "time", "all", "all"):
        blocks += [["res_x", {"num_layers": 1}], [f"compress_{kind}{suffix}", {"multiplier": 1}]]
    return [*blocks, ["res_x", {"num_layers": 1}]]


_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "num_layers": 2,
    "in_channels": 8,
    "out_channels": 8,
    "audio_in_channels": 32,
    "audio_out_channels": 32,
    "cross_attention_dim": 64,
    "audio_cross_attention_dim": 32,
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 32,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 16,
    "connector_num_layers": 1,
    "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096],
    "connector_apply_gated_attention": True,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "text_encoder_norm_type": "per_token_rms",
    "frequencies_precision": "float64",
    "rope_type": "split",
    "av_ca_timestep_scale_multiplier": 1000.0,
}
_GENERATOR = {
    "resblock": "AMP1",
    "activation": "snakebeta",
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "stereo": True,
    "use_bias_at_final": False,
    "use_tanh_at_final": False,
}
_VAE = {
    "_class_name": "CausalVideoAutoencoder",
    "latent_channels": 8,
    "decoder_base_channels": 8,
    "patch_size": 4,
    "timestep_conditioning": False,
    "spatial_padding_mode": "zeros",
    "encoder_blocks": _vae_blocks("_res"),
    "decoder_blocks": _vae_blocks(""),
}
_AUDIO_VAE = {
    "model": {
        "params": {
            "sampling_rate": 16000,
            "ddconfig": {
                "ch": 16,
                "ch_mult": [1, 1, 2],
                "num_res_blocks": 1,
                "z_channels": 2,
                "mid_block_add_attention": False,
            },
        }
    }
}
_VOCODER = {
    "vocoder": {
        **_GENERATOR,
        "upsample_initial_channel": 64,
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
    },
    "bwe": {
        **_GENERATOR,
        "upsample_initial_channel": 32,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "apply_final_activation": False,
        "n_fft": 256,
        "win_size": 256,
        "hop_length": 80,
        "num_mels": 64,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
    },
}
CONFIG: dict[str, Any] = {
    "transformer": _TRANSFORMER,
    "vae": _VAE,
    "audio_vae": _AUDIO_VAE,
    "vocoder": _VOCODER,
}
UPSCALER_CONFIG = {
    "in_channels": 8,
    "mid_channels": 32,
    "num_blocks_per_stage": 1,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
    "spatial_scale": 2.0,
    "rational_resampler": False,
}
# Our own words for the tokenizer to learn its pieces from.
_CORPUS = """a small boat drifts over a quiet lake while rain begins to fall on the water
two children run across a field and laugh as the wind carries their kite higher
the camera moves slowly towards an old lighthouse and the sea breaks against the rocks
a woman plays the piano in an empty hall, every note rings long under the high ceiling
steam rises from a cup on the kitchen table, a clock ticks, morning light comes in
an orange cat jumps from the wall, lands softly and walks out of the picture to the left
fireworks burst above the city at midnight, people cheer, the sky turns red, green, gold
close-up of hands shaping clay on a turning wheel, the motor hums, water drips
a train crosses the bridge at dusk, its whistle echoes between the hills 0 1 2 3 4 5 6 7 8 9
"""
_VOCABULARY = 400


@dataclass(frozen=True, slots=True)
class WorldFiles:
    """The shipped model's files: transformer and connectors, and what goes with them."""

    model: Path
    companions: Path
    upscaler: Path
    text_encoder: Path


def packaged_world() -> Path | None:
    """Return the folder of the world model that came with the package, None if none did."""
    folder = Path(__file__).parent / "data" / "world"
    return folder if folder.is_dir() else None


def world_files(folder: Path | None = None) -> WorldFiles:
    """Return the files of a world model: in a folder that `train world` wrote, or the package's.

    Raises CheckpointError if one is missing.
    """
    folder = folder or packaged_world()
    if folder is None:
        raise CheckpointError(
            "this ltxlite comes without a trained world model; `ltxlite train world` makes one, "
            "`ltxlite demo --random` needs none"
        )
    files = WorldFiles(*(folder / name for name in WORLD))
    for path in (files.model, files.companions, files.upscaler, files.text_encoder):
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing; `ltxlite train world` writes it, and `ltxlite demo --random` "
                "needs no such file"
            )
    return files


def write_demo_model(folder: Path, note: Callable[[str], None]) -> list[Path]:
    """Write the three files of the demo model into a folder, unless they are there already.

    Returns model, upscaler and text encoder. The same seed gives the same files.
    """
    paths = [folder / name for name in (MODEL, UPSCALER, TEXT_ENCODER)]
    if all(path.is_file() for path in paths):
        return paths
    note(f"writing a tiny random checkpoint in release layout to {folder}")
    generator = torch.Generator().manual_seed(_SEED)
    gemma, pieces = _gemma_config()
    _save(paths[0], _model_tensors(gemma, generator), {"config": CONFIG, "model_version": "2.3.0"})
    _save(paths[1], _upscaler_tensors(generator), {"config": UPSCALER_CONFIG})
    text = _tensors("text_encoder", Gemma(gemma), generator)
    text["spiece_model"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    _save(paths[2], text, {"gemma_config": {"text_config": _gemma_settings(gemma)}})
    return paths


def _model_tensors(gemma: GemmaConfig, generator: torch.Generator) -> dict[str, Tensor]:
    settings = Settings(_TRANSFORMER, "demo")
    video, audio = (ConnectorConfig.from_settings(settings, sound) for sound in (False, True))
    projection = TextProjectionConfig.from_settings(settings, gemma)
    vae = VideoVAEConfig.from_settings(Settings(_VAE, "demo"))
    sound = AudioVAEConfig.from_settings(Settings(_AUDIO_VAE, "demo"))
    vocoder = VocoderConfig.from_settings(Settings(_VOCODER, "demo"))
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            "transformer": Transformer(TransformerConfig.from_settings(settings)),
            "video_connector": Connector(video),
            "audio_connector": Connector(audio),
            "text_projection": TextProjection(projection),
            "video_encoder": VideoEncoder(vae),
            "video_decoder": VideoDecoder(vae),
            "audio_encoder": AudioEncoder(sound),
            "audio_decoder": AudioDecoder(sound),
            "vocoder": build_vocoder(vocoder),
        }
    tensors: dict[str, Tensor] = {}
    for component, network in networks.items():
        tensors |= _tensors(component, network, generator)
    return tensors


def _upscaler_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    config = UpscalerConfig.from_settings(Settings(UPSCALER_CONFIG, "demo"))
    with torch.device("meta"):
        network = LatentUpscaler(config)
    tensors = _tensors("upscaler", network, generator)
    return {
        name.replace("upsampler.conv.", "upsampler.0."): value for name, value in tensors.items()
    }


def _tensors(component: str, network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random values for a network's tensors under their release names, in release dtypes."""
    tensors = {}
    for name, shape in ((n, tuple(v.shape)) for n, v in network.state_dict().items()):
        value = _value(component, name, shape, generator)
        full = name.endswith("table")
        tensors[release_name(component, name)] = value if full else value.bfloat16()
    return tensors


def _value(component: str, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    leaf = name.rpartition(".")[2]
    if leaf in FIXED:
        return FIXED[leaf](shape)
    noise = torch.randn(shape, generator=generator)
    if name == "registers" or leaf.startswith("embed_tokens"):
        return noise
    if leaf == "weight" and len(shape) > 1:
        weight = noise / math.sqrt(math.prod(shape[1:]))
        return _flat_patches(weight) if component == "video_decoder" else weight
    if leaf == "weight":  # norms; Gemma's store w - 1
        return 0.1 * noise + (0.0 if component == "text_encoder" else 1.0)
    return 0.1 * noise  # biases, tables, alpha and beta


def _flat_patches(weight: Tensor) -> Tensor:
    """Give all pixels of a patch the same weights, so that noise shows as coloured areas.

    The channels of a patch are neighbours, colour being the slowest index.
    """
    places = 16 if weight.shape[0] == 48 else max(1, weight.shape[0] // weight.shape[1])
    return weight[::places].repeat_interleave(places, dim=0)


def _gemma_config() -> tuple[GemmaConfig, bytes]:
    """Train the tokenizer; return the text encoder's configuration and the tokenizer's bytes."""
    pieces = train_tokenizer(_CORPUS.splitlines(), _VOCABULARY)
    rows = -(-(_VOCABULARY + 16) // 64) * 64
    settings = Settings({**GEMMA, "vocab_size": rows}, "demo")
    return GemmaConfig.from_settings(settings), pieces


def _gemma_settings(config: GemmaConfig) -> dict[str, Any]:
    return {**GEMMA, "vocab_size": config.vocabulary}


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }
    with written_beside(path) as unfinished:
        save_file(tensors, unfinished, {"format": "pt", **texts})
