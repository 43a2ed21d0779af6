"""A small random LTX-2.3 whose matrices have rows of 256 or 1024, so that every format fits them.

The demo checkpoint (`ltxlite.demo`) brings text encoder, VAEs, vocoder and upscaler; transformer,
connectors and text projection are drawn anew, at random but for their sizes: gains of about one, so
that what comes out depends on every matrix and on none too much.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltxlite.demo import CONFIG, write_demo_model
from ltxlite.models.connector import Connector, ConnectorConfig
from ltxlite.models.settings import Settings
from ltxlite.models.text_projection import TextProjection, TextProjectionConfig
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.release import release_name
from ltxlite.request import Files

LAYERS, WIDTH, HEADS = 4, 256, 2
_DRAWN = ("model.diffusion_model.", "text_embedding_projection.")
_SIZES = {"attention_head_dim": WIDTH // HEADS, "cross_attention_dim": WIDTH}
SETTINGS = (
    CONFIG["transformer"]
    | {"num_layers": LAYERS, "connector_attention_head_dim": WIDTH // HEADS}
    | {"audio_connector_attention_head_dim": WIDTH // HEADS}
    | _SIZES
    | {f"audio_{name}": size for name, size in _SIZES.items()}
)


def wide_networks(folder: Path, seed: int) -> Networks:
    """Write a model into a folder and open it, fp32 on a CPU; one seed gives one model."""
    model, upscaler, encoder = (str(path) for path in write_demo_model(folder, lambda _: None))
    path = folder / f"wide-{seed}-distilled.safetensors"
    demo = open_networks(Files(model, encoder), "cpu", "float32")
    tensors = {n: t for n, t in load_file(model).items() if not n.startswith(_DRAWN)}
    config = json.dumps(CONFIG | {"transformer": SETTINGS})
    save_file(tensors | _tensors(demo, seed), path, {"config": config})
    return open_networks(Files(str(path), encoder, upscalers=(upscaler,)), "cpu", "float32")


def _tensors(demo: Networks, seed: int) -> dict[str, Tensor]:
    settings = Settings(SETTINGS, "wide model")
    connectors = [ConnectorConfig.from_settings(settings, sound) for sound in (False, True)]
    projection = TextProjectionConfig.from_settings(settings, demo.gemma_config())
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            "transformer": Transformer(TransformerConfig.from_settings(settings)),
            "video_connector": Connector(connectors[0]),
            "audio_connector": Connector(connectors[1]),
            "text_projection": TextProjection(projection),
        }
    random = torch.Generator().manual_seed(seed)
    return {
        release_name(part, name): _value(name, tuple(tensor.shape), random)
        for part, network in networks.items()
        for name, tensor in network.state_dict().items()
    }


def _value(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=random)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if name == "registers":
        return noise
    # Tables and biases small beside what the matrices give.
    return noise / math.sqrt(shape[-1]) if name.endswith(".weight") else 0.1 * noise
