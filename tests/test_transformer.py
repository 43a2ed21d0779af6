"""The transformer beyond its reference cases: full size, chunking, gradients, variants."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_networks import stream_input
from golden_support import Case, open_networks, read_manifest
from torch import nn

from ltxlite.checkpoint.recognise import COMPONENTS
from ltxlite.errors import CheckpointError
from ltxlite.models.attention import KeyValue
from ltxlite.models.block import weighted_attention
from ltxlite.models.layers import TokenRows
from ltxlite.models.passes import Pass, RowWeights, Timesteps
from ltxlite.models.settings import Settings
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.networks import NAMINGS
from ltxlite.release import release_name

GOLDEN = Path(__file__).parent / "golden"
FULL = json.loads((GOLDEN / "real_22b_keys.json").read_text(encoding="utf-8"))


def golden_case(name: str) -> Case:
    entry = next(item for item in read_manifest(GOLDEN) if item["name"] == name)
    return Case.load(GOLDEN, entry)


def full_shapes(component: str) -> dict[str, tuple[int, ...]]:
    """Names (without prefix) and shapes of a component in a full-size 2.3 checkpoint."""
    strip = next(item for item in COMPONENTS if item.name == component).strip
    named = {strip(name): tuple(shape) for name, shape in full_tensors().items()}
    return {name: shape for name, shape in named.items() if name is not None}


def full_tensors() -> dict[str, list[int]]:
    tensors = FULL["tensors"]
    if isinstance(tensors, dict):
        return tensors
    return {item["name"]: item["shape"] for item in tensors}


def test_full_size_transformer_has_exactly_the_tensors_of_the_release() -> None:
    shapes = full_shapes("transformer")
    with torch.device("meta"):
        config = TransformerConfig.from_settings(Settings(FULL["config"]["transformer"], "full"))
        network = Transformer(config)
    naming = NAMINGS["transformer"]
    renamed = {naming.rename(name): shape for name, shape in shapes.items()}
    built = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(shapes) == 4186
    assert built == renamed
    assert TransformerConfig.from_shapes(shapes) == config


def test_every_name_of_the_full_size_file_is_claimed_ignored_or_renamed_there_and_back() -> None:
    names = full_tensors()
    ignored, seen = set(), set()
    for name in names:
        for component in COMPONENTS:
            short = component.strip(name)
            if component.name in ("lora", "upscaler", "text_encoder") or short is None:
                continue
            seen.add(name)
            naming = NAMINGS[component.name]
            if naming.is_ignored(short):
                ignored.add(name)
            else:
                assert release_name(component.name, naming.rename(short)) == name
    assert len(names) == 5947
    assert seen == set(names)
    # Release files also carry three unused statistics of the VAE, which this list does not.
    assert ignored == {"vocoder.mel_stft.stft_fn.inverse_basis"}


@pytest.mark.parametrize("chunk", [1, 5, 18, 1000])
def test_token_chunks_change_nothing_but_rounding(chunk: int) -> None:
    case = golden_case("dit_batch2_pertoken")
    given = Pass(stream_input(case, "video"), stream_input(case, "audio"))
    transformer = case.networks().transformer()
    whole = transformer(given).video
    transformer.chunk = chunk
    # Matrix products of other heights round differently: 1e-6 is 8 fp32 ULPs of the largest value.
    torch.testing.assert_close(
        transformer(given).video, whole, rtol=0, atol=1e-6 * float(whole.abs().max()) * 4
    )


def test_gradients_flow_through_the_same_functions_and_values() -> None:
    case = golden_case("dit_basic")
    given = Pass(stream_input(case, "video"), stream_input(case, "audio"))
    transformer = case.networks().transformer()
    plain = transformer(given)
    transformer.requires_grad_(True)
    with torch.enable_grad():
        velocity = transformer(given)
        (velocity.video.square().sum() + velocity.audio.square().sum()).backward()
    torch.testing.assert_close(velocity.video, plain.video, rtol=0, atol=1e-5)
    without = [name for name, p in transformer.named_parameters() if p.grad is None]
    assert not without, f"parameters nothing depends on: {without[:5]}"


def test_the_older_cross_modal_variant_equals_ltx_core_1_0_0() -> None:
    case = golden_case("dit_batch2_pertoken")
    transformer = case.networks().transformer()
    transformer.config = replace(transformer.config, cross_modulation="other")
    velocity = transformer(Pass(stream_input(case, "video"), stream_input(case, "audio")))
    for stream in ("video", "audio"):
        older = case.tensors[f"alt_pypi100.{stream}_velocity"]
        error = (getattr(velocity, stream) - older).abs().max() / older.abs().max()
        assert error < 1e-5  # the same operations in the same order: a few ULPs


def test_passes_run_together_equal_passes_run_alone() -> None:
    case = golden_case("dit_basic")
    transformer = case.networks().transformer()
    first = Pass(stream_input(case, "video"), stream_input(case, "audio"))
    second = Pass(stream_input(case, "video"), None)
    together = transformer.run([first, second])
    assert torch.equal(together[0].video, transformer(first).video)
    assert torch.equal(together[1].video, transformer(second).video)


def test_bf16_stays_within_the_reference_tolerance() -> None:
    case = golden_case("dit_basic")
    path = str(GOLDEN / "models" / "tiny-2.3-distilled.safetensors")
    networks = open_networks((path,))
    networks.dtype = torch.bfloat16
    try:
        transformer = networks.transformer()
    finally:
        networks.dtype = torch.float32
    assert transformer.blocks[0].video.table.dtype == torch.float32
    velocity = transformer(Pass(stream_input(case, "video"), stream_input(case, "audio")))
    for stream in ("video", "audio"):
        wanted = case.tensors[f"{stream}_velocity"]
        error = (getattr(velocity, stream) - wanted).abs().max() / wanted.abs().max()
        assert error < 0.03  # the manifest's bf16 tolerance


def test_row_weights_equal_a_dense_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 11, 12, generator=generator) for _ in range(3))
    dense = torch.ones(1, 11, 11)
    dense[:, :7, 7:] = 0.3
    dense[:, 7:, :7] = torch.tensor([0.0, 0.3, 0.6, 1.0])[None, :, None]
    rows = (RowWeights(0, 7, dense[:, :1]), RowWeights(7, 11, dense[:, 7:]))
    heads = [x.unflatten(-1, (3, 4)).transpose(1, 2) for x in (q, k, v)]
    bias = dense.log().clamp(min=torch.finfo(torch.float32).min)
    wanted = nn.functional.scaled_dot_product_attention(*heads, attn_mask=bias[:, None])
    wanted = wanted.transpose(1, 2).flatten(2)
    for size in (11, 4, 1):
        pieces = [
            weighted_attention(
                q[:, i : i + size], KeyValue(k, v), 3, rows, slice(i, min(i + size, 11))
            )
            for i in range(0, 11, size)
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, rtol=0, atol=1e-6)


def test_timesteps_are_held_once_per_distinct_value() -> None:
    sigmas = torch.tensor([[0.5, 0.0, 0.5], [0.25, 0.5, 0.0]])[..., None]
    levels = Timesteps.of(sigmas)
    assert levels.values.tolist() == [0.0, 0.25, 0.5]
    assert torch.equal(levels.per_token(), sigmas)
    uniform = Timesteps.of(torch.full((2, 300, 1), 0.7))
    assert uniform.values.shape == (1,)
    assert uniform.index.shape == (2, 1)


def test_modulation_rows_are_looked_up_per_token() -> None:
    rows = torch.arange(24.0).reshape(2, 3, 4)
    held = TokenRows(rows, torch.tensor([[0, 1, 1, 0]]))
    assert torch.equal(held.vectors(2, slice(1, 3)).spread()[0], rows[[1, 1], 2])
    shared = TokenRows(rows, torch.tensor([[1]]))
    assert torch.equal(shared.vectors(0, slice(5, 9)).spread(), rows[None, 1:, 0])


def test_configs_that_are_not_implemented_are_refused_by_name() -> None:
    section = FULL["config"]["transformer"]
    for key, value, named in (
        ("activation_fn", "swiglu", "activation_fn is 'swiglu'"),
        ("use_keyframes_abs_pos_embedding", True, "use_keyframes_abs_pos_embedding is True"),
        ("rope_type", "spiral", "rope_type is 'spiral'"),
        ("num_layers", 0, "num_layers is 0"),
        ("audio_num_attention_heads", 16, "32 video heads and 16 audio heads"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(named)):
            TransformerConfig.from_settings(Settings({**section, key: value}, "config"))
