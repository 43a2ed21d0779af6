"""Networks from files: a text encoder in each of its packagings, and whose configuration counts."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxlite.checkpoint.files import ModelFiles
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.networks import Networks
from ltxlite_quant.gguf import write_gguf

FOLDER = Path(__file__).parent / "golden" / "models" / "gemma3_tiny"
IDS = torch.tensor([[2, 17, 300, 41, 5]])
GGUF_NAMES = (
    (r"^embed_tokens\.", "token_embd."),
    (r"^norm\.", "output_norm."),
    (r"^layers\.", "blk."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".post_attention_norm."),
    (r"\.pre_feedforward_layernorm\.", ".ffn_norm."),
    (r"\.post_feedforward_layernorm\.", ".post_ffw_norm."),
    (r"\.self_attn\.o_proj\.", ".attn_output."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn_\1."),
    (r"\.self_attn\.([qk])_norm\.", r".attn_\1_norm."),
    (r"\.mlp\.(gate|up|down)_proj\.", r".ffn_\1."),
)


def text_tensors() -> dict[str, Tensor]:
    """The text model of the tiny Gemma, named as its modules are."""
    prefix = "language_model.model."
    stored = {}
    for path in sorted(FOLDER.glob("*.safetensors")):
        stored |= load_file(path)
    return {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}


def networks(path: Path) -> Networks:
    return Networks(ModelFiles.open([path]), torch.device("cpu"), torch.float32)


def states(path: Path) -> Tensor:
    return torch.stack(list(networks(path).gemma().states(IDS)))


def one_file(folder: Path) -> Path:
    """Write the tiny Gemma as a small model is published: one file, no index."""
    tensors = {f"language_model.model.{name}": tensor for name, tensor in text_tensors().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("named", [lambda file: file, lambda file: file.parent])
def test_a_folder_with_a_single_file_is_described_by_its_config_json(
    named: Callable[[Path], Path], tmp_path: Path
) -> None:
    file = one_file(tmp_path)
    shutil.copy(FOLDER / "config.json", tmp_path)
    found = networks(named(file)).gemma_config()
    assert found.window == 64  # which no tensor's shape tells
    assert found == networks(FOLDER).gemma_config()
    assert torch.equal(states(named(file)), states(FOLDER))


def test_the_configuration_of_another_model_beside_a_file_is_not_its_own(tmp_path: Path) -> None:
    file = one_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "hidden_size": 3}))
    assert networks(file).gemma_config().window == GemmaConfig().window


def test_a_gguf_text_encoder_gives_the_states_of_the_original(tmp_path: Path) -> None:
    tensors = {}
    for name, tensor in text_tensors().items():
        for pattern, replacement in GGUF_NAMES:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor.float() + ("norm" in name)  # llama.cpp stores w + 1
    write_gguf(tmp_path / "gemma.gguf", tensors, {}, "gemma3")
    # Five tokens are within any window, and the constants of 12B are those of the tiny model too.
    wanted = states(FOLDER)
    error = (states(tmp_path / "gemma.gguf") - wanted).abs().max()
    assert error < 1e-5 * wanted.abs().max()  # w + 1 is rounded once more: 6e-8 a norm
