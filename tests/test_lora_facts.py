"""What headers of LoRA files tell: rank, targets, alpha, generation."""

import re
from pathlib import Path

import pytest
import torch
from failure_files import LORA, MODEL, networks
from lora_support import NAMING, ONES, QUERY, Tensors, downs, factors, pair, written
from safetensors.torch import load_file, save_file
from torch import nn

from ltxlite.checkpoint.files import open_models
from ltxlite.checkpoint.lora import (
    attach,
    open_lora,
    other_generation,
    read_lora,
    set_strengths,
)
from ltxlite.checkpoint.lora_facts import lora_facts
from ltxlite.errors import CheckpointError
from ltxlite.low_rank import LowRankLinear
from ltxlite.strength import Strength

# What headers tell.

WORDS = {
    "ltx-2-19b-lora-camera-control.safetensors": (2, 0),
    "ltx-2.3-22b-distilled-lora-384.safetensors": (2, 3),
    "ltx-2.5-22b-distilled-lora-450.safetensors": (2, 5),
    "LTX2.3_style.safetensors": (2, 3),
    "ltxv2_5-thing.safetensors": (2, 5),
    "my-22b-style.safetensors": (2, 3),
    "ltx-2-style.safetensors": (),
    "style.safetensors": (),
}


@pytest.mark.parametrize("name", sorted(WORDS))
def test_a_file_name_tells_the_generation(tmp_path: Path, name: str) -> None:
    facts = written(tmp_path / name, ONES).facts
    assert facts.version == WORDS[name]
    assert facts.evidence == ("its file name" if WORDS[name] else "")


@pytest.mark.parametrize(
    ("layer", "width", "metadata", "version"),
    [
        ("transformer_blocks.0.attn1.to_gate_logits", 64, {}, (2, 3)),
        ("transformer_blocks.0.attn1.to_gate_logits", 64, {"base_model": "ltx-2.5-22b"}, (2, 5)),
        # The layer cannot be in a 2.0 model, whatever somebody wrote.
        ("transformer_blocks.0.attn1.to_gate_logits", 64, {"base_model": "ltx-2-19b"}, (2, 3)),
        ("prompt_adaln_single.linear", 64, {}, (2, 3)),
        ("caption_projection.linear_1", 64, {"base_model": "ltx-2.3"}, (2, 0)),
        ("video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q", 3840, {}, (2, 0)),
        (QUERY, 64, {"ss_base_model_version": "ltx2-19b"}, (2, 0)),
        (QUERY, 64, {"modelspec.architecture": "ltx2.3_22b_ti2v"}, (2, 3)),
        (QUERY, 64, {"modelspec.architecture": "ltx2"}, ()),
        (QUERY, 64, {"model_version": "2.0.1", "base_model": "ltx-2.3"}, (2, 0, 1)),
    ],
)
def test_layers_and_headers_tell_the_generation(
    tmp_path: Path, layer: str, width: int, metadata: dict[str, str], version: tuple[int, ...]
) -> None:
    tensors = pair(torch.ones(2, width), torch.ones(8, 2), f"diffusion_model.{layer}")
    lora = written(tmp_path / "x.safetensors", tensors, metadata)
    assert lora.version == version
    warning = other_generation(lora, (2, 3, 0))
    assert (warning is None) == (version in ((2, 3), ()))
    if warning:
        assert re.search(r"was made for LTX-2\.[05], the checkpoint is LTX-2\.3 \(.+\)", warning)


def test_facts_are_read_from_the_header_alone(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for block, rank in ((0, 4), (7, 16)):
        for layer in ("attn1.to_q", "audio_attn1.to_q", "audio_to_video_attn.to_k", "ff.net.2"):
            name = f"diffusion_model.transformer_blocks.{block}.{layer}"
            tensors |= pair(torch.ones(rank, 8), torch.ones(8, rank), name)
    path = tmp_path / "ic-ltx-2.3.safetensors"
    save_file(tensors, path, {"reference_downscale_factor": "2"})
    size = path.stat().st_size
    with path.open("r+b") as file:  # no value is there any more, only holes
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    facts = lora_facts(open_models(path)[0])
    assert facts.ranks == (4, 16)
    assert facts.blocks == (0, 7)
    assert facts.modules == 8
    assert dict(facts.streams) == {"video": 4, "audio": 2, "cross": 2}
    assert dict(facts.targets) == dict.fromkeys(
        ("attn1.to_q", "audio_attn1.to_q", "audio_to_video_attn.to_k", "ff.net.2"), 2
    )
    assert (facts.reference_downscale, facts.reference_temporal) == (2, 1)
    first, second, third = facts.lines()
    assert first == (
        "LoRA for LTX-2.3 (its file name), rank 4-16, 8 modules in 2 blocks, official names"
    )
    assert second.startswith("changes video 4, audio 2, cross 2: attn1.to_q 2, ")
    assert third == "reference at 1/2 size, 1/1 of the frames"


def test_facts_of_names_with_underscores_are_those_with_dots(tmp_path: Path) -> None:
    linear = nn.Linear(8, 8)
    layers = [
        f"transformer_blocks.{n}.{x}" for n in (0, 3) for x in ("attn2.to_v", "audio_ff.net.2")
    ]
    dotted, flat = {}, {}
    for layer in layers:
        dotted |= factors(f"diffusion_model.{layer}", linear)
        flat |= downs(f"lora_unet_{layer.replace('.', '_')}", linear)
    one = written(tmp_path / "x.safetensors", dotted).facts
    two = written(tmp_path / "y.safetensors", flat).facts
    assert (one.streams, one.blocks, one.modules) == (two.streams, two.blocks, two.modules)
    assert two.targets == (("attn2_to_v", 2), ("audio_ff_net_2", 2))
    assert (one.spellings, two.spellings) == (("official",), ("kohya",))


@pytest.mark.parametrize("value", ["0", "65", "two"])
def test_impossible_reference_factors_are_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(CheckpointError, match="reference_downscale_factor is"):
        written(tmp_path / "x.safetensors", ONES, {"reference_downscale_factor": value})


@pytest.mark.parametrize(
    ("name", "metadata", "factors"),
    [
        ("x", {"ltx.reference_spatial_scale_factor": "4.0"}, (4, 1)),
        ("x-ref0.5", {"reference_temporal_scale_factor": "3"}, (2, 3)),
        ("x-ref0.55", {}, (1, 1)),
    ],
)
def test_reference_factors_are_found_where_pipelines_find_them(
    tmp_path: Path, name: str, metadata: dict[str, str], factors: tuple[int, int]
) -> None:
    lora = written(tmp_path / f"{name}.safetensors", ONES, metadata)
    assert (lora.reference_downscale, lora.reference_temporal) == factors


def test_a_file_that_is_no_lora_is_told_by_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="given as a LoRA, but it holds transformer"):
        open_lora(MODEL)
    with pytest.raises(CheckpointError, match="no such LoRA file"):
        open_lora(tmp_path / "nowhere.safetensors")


# What they do to a model.


def test_strengths_go_to_layers_by_stream_and_block() -> None:
    transformer = networks(MODEL).transformer()
    lora = read_lora(open_lora(LORA))
    attach(transformer, [lora], NAMING)
    set_strengths(transformer, {lora.source: Strength.parse("0.5,audio=0,cross=2,blocks=1-2")})
    found = {
        name: module.strengths[0]
        for name, module in transformer.named_modules()
        if isinstance(module, LowRankLinear)
    }
    assert found["blocks.1.video.feed_forward.up"] == 0.5
    assert found["blocks.2.audio_to_video.to_q"] == 2.0
    assert found["blocks.1.audio.self_attention.to_q"] == 0.0
    assert found["blocks.0.video.self_attention.to_q"] == 0.0
    assert len(found) == lora.facts.modules
    set_strengths(transformer, {lora.source: 0.25})
    assert {m.strengths[0] for m in transformer.modules() if isinstance(m, LowRankLinear)} == {0.25}


def test_factors_stay_in_the_map_of_their_file() -> None:
    transformer = networks(MODEL).transformer()
    lora = read_lora(open_lora(LORA))
    attach(transformer, [lora], NAMING)
    layer = transformer.get_submodule("blocks.0.video.self_attention.to_q")
    assert isinstance(layer, LowRankLinear)
    assert layer.a0.data_ptr() == lora.terms[QUERY].a.data_ptr()
    stored = load_file(LORA)[f"diffusion_model.{QUERY}.lora_A.weight"]
    assert layer.a0.dtype == stored.dtype
    assert torch.equal(layer.a0, stored)
