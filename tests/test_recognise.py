"""Every published form of formats.md 1, as a header without data: told from names and shapes."""

from collections import Counter
from functools import lru_cache
from math import prod
from pathlib import Path

import pytest
import release_files as made
import release_forms
import release_gemma
import release_parts
import torch
from release_files import PREFIX, Typed, prefixed, typed, write_gguf, write_safetensors
from release_forms import REAL

from ltxlite.checkpoint.files import ModelFiles, OpenModel, open_models
from ltxlite.errors import CheckpointError
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.network_configs import missing_parts
from ltxlite.networks import Networks
from ltxlite.release import release_name

FORMS = release_forms.FORMS | release_gemma.FORMS | release_parts.FORMS


@pytest.mark.parametrize(
    ("family", "alone", "joined", "parameters"),
    [
        ("2.0", 3510, 3568, 18_876_174_592),
        ("2.3", 4186, 4444, 18_988_838_144),
        ("2.5", 4091, 4349, None),
    ],
)
def test_the_rules_of_the_fixtures_give_the_published_counts(
    family: str, alone: int, joined: int, parameters: int | None
) -> None:
    dit = made.dit(family)
    assert len(dit) == alone
    assert len(dit | made.connectors(family)) == joined
    assert parameters in (None, sum(map(prod, dit.values())))
    assert max(map(len, dit)) <= 78


def test_the_rules_give_the_names_and_shapes_of_the_release_and_of_our_network() -> None:
    shapes = prefixed(made.dit("2.3") | made.connectors("2.3")) | made.projection("2.3")
    assert shapes.items() <= REAL.items()
    older = made.dit("2.0")
    with torch.device("meta"):
        network = Transformer(TransformerConfig.from_shapes(older))
    ours = {release_name("transformer", n): tuple(v.shape) for n, v in network.state_dict().items()}
    assert ours == prefixed(older)


@pytest.mark.parametrize("name", list(FORMS))
def test_a_published_form_is_recognised_from_its_header(tmp_path: Path, name: str) -> None:
    wanted = FORMS[name]
    path = wanted.write(tmp_path)
    (model,) = open_models(path)
    assert model.components == wanted.components
    found = Counter(stored.format.name for stored in model.tensors.values())
    assert {kind: found[kind] for kind in wanted.formats} == wanted.formats
    if wanted.gigabytes is not None:
        assert path.stat().st_size / 1e9 == pytest.approx(wanted.gigabytes, rel=0.02)
    networks = Networks(ModelFiles([model]), torch.device("cpu"), torch.float32)
    if wanted.family is not None:
        assert networks.transformer_config().family == wanted.family
        assert_complete(networks, model)
    if "text_encoder" in wanted.components:
        assert (networks.gemma_config().layers, networks.gemma_config().states) == (48, 49)
    lacks_connectors = any("connectors" in line for line in missing_parts(networks.files))
    assert lacks_connectors == ("video_connector" not in wanted.components)


@pytest.mark.parametrize("name", list(release_parts.UPSCALERS))
def test_an_upscaler_is_recognised_with_what_it_does(tmp_path: Path, name: str) -> None:
    wanted, gigabytes, kind = release_parts.UPSCALERS[name]
    path = wanted.write(tmp_path)
    assert path.stat().st_size / 1e9 == pytest.approx(gigabytes, rel=0.005)
    (model,) = open_models(path)
    assert model.components == ("upscaler",)
    networks = Networks(ModelFiles([model]), torch.device("cpu"), torch.float32)
    assert networks.upscaler_kind(model) == kind


def assert_complete(networks: Networks, model: OpenModel) -> None:
    """The names and shapes are those of the network that the configuration describes."""
    naming = networks.naming("transformer")
    given = {naming.rename(name): s.shape for name, s in model.named("transformer").items()}
    assert given == shapes_of(networks.transformer_config())


@lru_cache
def shapes_of(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = Transformer(config)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


REFUSED: dict[str, tuple[Typed, str]] = {
    "2.5 diffusion VAE": ({"decoder.conv_in_x_t.weight": ("BF16", (4, 4))}, "LTX-2.5 diffusion"),
    "duration head": ({"duration_head.proj.weight": ("BF16", (4, 4))}, "duration head"),
    "tae": ({"decoder.1.weight": ("F16", (64, 128, 3, 3))}, "preview autoencoder"),
    "mmproj": ({"v.blk.0.attn_q.weight": ("F16", (1152, 1152))}, "vision projector"),
    "LTX-Video of diffusers": (
        {"time_embed.emb.timestep_embedder.linear_1.weight": ("BF16", (4096, 256))},
        "LTX-Video without sound, as diffusers names it",
    ),
    "LTX-Video 0.9": (
        {f"{PREFIX}adaln_single.emb.timestep_embedder.linear_1.weight": ("BF16", (2048, 256))},
        "LTX-Video without sound",
    ),
    "something else": ({"te.block.0.weight": ("F16", (4, 4))}, "no part of LTX-2"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_used_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    tensors, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        open_models(write_safetensors(tmp_path / "model.safetensors", tensors))


@pytest.mark.parametrize("flat", [True, False])
def test_2_5_is_not_taken_for_2_3(tmp_path: Path, flat: bool) -> None:
    shapes = made.dit("2.5")
    if flat:  # as llama-quantize leaves it
        shapes["keyframes_abs_pos_embedding"] = (4096,)
    tensors = made.gguf_typed(shapes, "Q8_0", "BF16", None)
    networks = networks_of(write_gguf(tmp_path / "model.gguf", tensors))
    with pytest.raises(CheckpointError, match=r"this is LTX-2\.5, which ltxlite does not run"):
        networks.transformer_config()
    del tensors["keyframes_abs_pos_embedding"]
    networks = networks_of(write_gguf(tmp_path / "model.gguf", tensors))
    with pytest.raises(CheckpointError, match=r"this is LTX-2\.5"):
        networks.transformer_config()


def test_gemma_4_is_recognised_as_a_text_encoder_and_refused(tmp_path: Path) -> None:
    tensors = typed(made.gemma() | {"model.layers.0.layer_scalar": (1,)})
    networks = networks_of(write_safetensors(tmp_path / "gemma4.safetensors", tensors))
    with pytest.raises(CheckpointError, match="Gemma 4"):
        networks.gemma_config()


def networks_of(path: Path) -> Networks:
    return Networks(ModelFiles.open([path]), torch.device("cpu"), torch.float32)
