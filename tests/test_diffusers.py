"""The tiny checkpoint as diffusers would save it: the same networks must come out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from failure_files import DIT, GOLDEN, MODEL, networks
from release_parts import diffusers_name
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxlite.checkpoint.diffusers import official_config, official_name
from ltxlite.checkpoint.files import open_models
from ltxlite.convert.vocabulary import pieces_beside, pieces_of
from ltxlite.errors import CheckpointError
from ltxlite.networks import Networks

PROJECTION = "text_embedding_projection."
# What diffusers 0.42.1 writes into config.json for networks of the tiny checkpoint's sizes.
TRANSFORMER: dict[str, Any] = {
    "_class_name": "LTX2VideoTransformer3DModel",
    "_diffusers_version": "0.42.1",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_out_bias": True,
    "audio_cross_attn_mod": True,
    "audio_ff_bias": True,
    "audio_gated_attn": True,
    "audio_hop_length": 160,
    "audio_patch_size": 1,
    "audio_patch_size_t": 1,
    "audio_pos_embed_max_pos": 20,
    "audio_sampling_rate": 16000,
    "audio_scale_factor": 4,
    "base_height": 2048,
    "base_width": 2048,
    "caption_channels": 3840,
    "causal_offset": 1,
    "cross_attn_mod": True,
    "cross_attn_timestep_scale_multiplier": 1000,
    "ff_bias": True,
    "gated_attn": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "patch_size": 1,
    "patch_size_t": 1,
    "perturbed_attn": False,
    "pos_embed_max_pos": 20,
    "qk_norm": "rms_norm_across_heads",
    "rope_double_precision": True,
    "rope_theta": 10000.0,
    "rope_type": "split",
    "timestep_scale_multiplier": 1000,
    "use_keyframes_abs_pos_embedding": False,
    "use_prompt_adaln_single": True,
    "use_prompt_embeddings": False,
    "vae_scale_factors": [8, 32, 32],
}
CONNECTORS: dict[str, Any] = {
    "_class_name": "LTX2TextConnectors",
    "audio_connector_num_learnable_registers": 128,
    "audio_gated_attn": True,
    "causal_temporal_positioning": False,
    "connector_rope_base_seq_len": 4096,
    "per_modality_projections": True,
    "proj_bias": True,
    "rope_double_precision": True,
    "rope_theta": 10000.0,
    "rope_type": "split",
    "text_proj_in_factor": 9,
    "video_connector_num_learnable_registers": 128,
    "video_gated_attn": True,
}
SIZES = (
    *("num_attention_heads", "attention_head_dim", "cross_attention_dim", "num_layers"),
    *("in_channels", "out_channels", "audio_in_channels", "audio_out_channels"),
    *("audio_num_attention_heads", "audio_attention_head_dim", "audio_cross_attention_dim"),
)
CONNECTOR_SIZES = ("num_attention_heads", "attention_head_dim", "num_layers")


@pytest.fixture(scope="module")
def official() -> Networks:
    return networks(MODEL, GOLDEN / "gemma3_tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, official: Networks) -> Path:
    """A repository of diffusers: a folder for the transformer, in shards, one for connectors."""
    root = tmp_path_factory.mktemp("diffusers")
    section = json.loads(str(official.files.models[0].metadata["config"]))["transformer"]
    tensors = {
        diffusers_name(name.removeprefix(DIT)): value
        for name, value in load_file(MODEL).items()
        if name.startswith((DIT, PROJECTION))
    }
    connectors = {n: v for n, v in tensors.items() if "_connector." in n or "text_proj_in" in n}
    transformer = {n: v for n, v in tensors.items() if n not in connectors}
    sizes = {name: section[name] for name in SIZES if name in section}
    write_sharded(root / "transformer", transformer, TRANSFORMER | sizes)
    ours = {f"video_connector_{key}": section[f"connector_{key}"] for key in CONNECTOR_SIZES}
    names = [f"audio_connector_{key}" for key in CONNECTOR_SIZES]
    ours |= {name: section[name] for name in names if name in section}
    (root / "connectors").mkdir()
    save_file(connectors, root / "connectors" / "diffusion_pytorch_model.safetensors")
    write_json(root / "connectors" / "config.json", CONNECTORS | ours)
    return root


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_sharded(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    names = sorted(tensors)
    half = len(names) // 2
    table = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": table})
    write_json(folder / "config.json", config)


def test_every_name_goes_to_diffusers_and_back() -> None:
    names = [n.removeprefix(DIT) for n in load_file(MODEL) if n.startswith((DIT, PROJECTION))]
    spelled = [diffusers_name(name) for name in names]
    assert len(set(spelled)) == len(names)
    assert sum(one != two for one, two in zip(names, spelled, strict=True)) > 100
    assert [official_name(name) for name in spelled] == names


def test_a_folder_of_diffusers_holds_the_same_networks(folder: Path, official: Networks) -> None:
    found = networks(folder, GOLDEN / "gemma3_tiny")
    assert found.transformer_config() == official.transformer_config()
    parts = ("transformer", "video_connector", "audio_connector", "text_projection")
    for part in parts:
        ours, wanted = (getattr(each, part)() for each in (found, official))
        wanted = wanted.state_dict()
        assert ours.state_dict().keys() == wanted.keys()
        for name, value in ours.state_dict().items():
            assert torch.equal(value, wanted[name]), name
    for sound in (False, True):
        assert found.connector_config(sound) == official.connector_config(sound)
    assert "config.transformer" in found.loaded[0].line()


def test_without_its_json_a_transformer_is_told_by_its_shapes(
    tmp_path: Path, folder: Path, official: Networks
) -> None:
    for shard in (folder / "transformer").glob("*.safetensors*"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    found = networks(tmp_path)
    assert found.transformer_config() == official.transformer_config()


def test_the_json_of_a_transformer_says_nothing_of_connectors_in_another_file(
    folder: Path, official: Networks, tmp_path: Path
) -> None:
    alone = tmp_path / "connectors.safetensors"
    tensors = load_file(MODEL)
    save_file({n: v for n, v in tensors.items() if "_embeddings_connector." in n}, alone)
    found = networks(alone, folder / "transformer")
    assert found.connector_config(sound=True) == official.connector_config(sound=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 2),
        ("vae_scale_factors", [8, 16, 16]),
        ("audio_gated_attn", False),
        ("qk_norm", "layer_norm"),
        ("norm_elementwise_affine", True),
        ("rope_theta", "NaN"),
        ("num_layers", float("nan")),
    ],
)
def test_what_diffusers_could_ask_for_and_we_do_not_have_is_refused(
    tmp_path: Path, folder: Path, key: str, value: object
) -> None:
    for part in (folder / "transformer").iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    write_json(tmp_path / "config.json", config | {key: value})
    read = "positional_embedding_theta" if key == "rope_theta" else key  # renamed before it is read
    with pytest.raises(CheckpointError, match=rf"config.*{read} is .*ltxlite implements"):
        networks(tmp_path).transformer_config()


def test_a_tokenizer_in_the_folder_beside_the_text_encoders_is_found(tmp_path: Path) -> None:
    golden = GOLDEN / "gemma3_tiny"
    for folder in ("text_encoder", "tokenizer"):
        (tmp_path / folder).mkdir()
        for path in golden.iterdir():
            if path.name.startswith("tokenizer") == (folder == "tokenizer"):
                (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    found = networks(tmp_path)
    assert found.tokenizer().encode("a dog") == networks(golden).tokenizer().encode("a dog")
    pieces = pieces_beside(found.files.models[0])
    assert pieces == list(pieces_of((golden / "tokenizer.model").read_bytes(), "x"))


def test_json_of_something_else_is_no_configuration() -> None:
    assert official_config({"_class_name": "AutoencoderKLLTX2Video"}, "x") is None
    assert official_config({}, "x") is None


def test_a_video_transformer_of_diffusers_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"time_embed.emb.timestep_embedder.linear_1.weight": torch.ones(4, 4)}, path)
    with pytest.raises(CheckpointError, match="LTX-Video without sound, as diffusers names it"):
        open_models(path)
