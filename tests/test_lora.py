"""LoRA files: every spelling of them, what their headers tell, and what they do to a model."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_support import (
    DIFFUSERS,
    NAMING,
    ONES,
    QUERY,
    Tensors,
    downs,
    factors,
    kohya,
    official,
    pair,
    written,
)
from safetensors.torch import save_file
from torch import nn

from ltxlite.checkpoint.lora import (
    Attached,
    attach,
    open_lora,
    read_lora,
)
from ltxlite.checkpoint.lora_names import ModuleNames, read_name, released_name
from ltxlite.demo import CONFIG
from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.low_rank import LowRankLinear
from ltxlite.models.settings import Settings
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    """A transformer of twelve blocks on meta: blocks 1 and 11 share a beginning."""
    settings = Settings(CONFIG["transformer"] | {"num_layers": 12}, "deep")
    with torch.device("meta"):
        return Transformer(TransformerConfig.from_settings(settings))


@pytest.fixture(scope="module")
def linears(deep: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in deep.named_modules() if isinstance(m, nn.Linear)}


SPELLINGS: dict[str, Callable[[str, nn.Linear], Tensors]] = {
    "ComfyUI": lambda n, m: factors(f"diffusion_model.{official(n)}", m),
    "checkpoint": lambda n, m: factors(f"model.diffusion_model.{official(n)}", m),
    "bare": lambda n, m: factors(official(n), m),
    "PEFT": lambda n, m: factors(f"base_model.model.{official(n)}", m),
    "PEFT default": lambda n, m: factors(official(n), m, form="{}.lora_{}.default.weight"),
    "trainer": lambda n, m: factors(f"transformer.{official(n)}", m),
    "diffusers": lambda n, m: factors(f"transformer.{DIFFUSERS.get(official(n), official(n))}", m),
    "down and up": lambda n, m: downs(f"diffusion_model.{official(n)}", m),
    "kohya": lambda n, m: downs(f"lora_unet_{kohya(n)}", m),
    "musubi": lambda n, m: downs(f"lora_unet_model_{kohya(n)}", m),
    "OneTrainer": lambda n, m: downs(f"lora_transformer_{kohya(n)}", m),
    "to_out without .0": lambda n, m: factors(official(n).removesuffix(".0"), m),
    "kohya to_out": lambda n, m: downs(f"lora_unet_{kohya(n).removesuffix('_0')}", m),
}


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_every_linear_is_found_under_every_spelling(
    tmp_path: Path, deep: nn.Module, linears: dict[str, nn.Linear], spelling: str
) -> None:
    tensors: Tensors = {}
    some = [name for name in linears if not re.match(r"blocks\.(?!1\.|11\.)", name)]
    for name in some:
        tensors |= SPELLINGS[spelling](name, linears[name])
    lora = written(tmp_path / "x.safetensors", tensors)
    (report,) = attach(deep, [lora], NAMING)
    assert report == Attached(str(tmp_path / "x.safetensors"), len(some), ())
    wrapped = {name: m for name, m in deep.named_modules() if isinstance(m, LowRankLinear)}
    assert wrapped.keys() == set(some)
    for name, layer in wrapped.items():
        sides = SPELLINGS[spelling](name, layer.base).values()  # type: ignore[arg-type]
        assert all(torch.equal(x, y) for x, y in zip((layer.a0, layer.b0), sides, strict=True))
    attach(deep, [], NAMING)
    assert not any(isinstance(m, LowRankLinear) for m in deep.modules())


def test_names_outside_the_blocks_are_those_of_the_diffusers_converter() -> None:
    assert {released_name(theirs): ours for ours, theirs in DIFFUSERS.items()} == {
        ours: ours for ours in DIFFUSERS
    }
    connector = "connectors.video_connector.transformer_blocks.3.attn1.to_q"
    read = read_name(f"{connector}.lora_A.weight", "x")
    assert read.module == "video_embeddings_connector.transformer_1d_blocks.3.attn1.to_q"
    assert released_name("audio_text_proj_in") == "text_embedding_projection.audio_aggregate_embed"


def test_no_two_layers_share_a_name_with_underscores(linears: dict[str, nn.Linear]) -> None:
    flat = {kohya(name) for name in linears}
    assert len(flat) == len(linears)
    names = ModuleNames({official(name): name for name in linears})
    assert names.find("transformer_blocks_1_attn1_to_q") == "blocks.1.video.self_attention.to_q"
    assert names.find("transformer_blocks_11_audio_attn1_to_q") == (
        "blocks.11.audio.self_attention.to_q"
    )
    for unknown in ("transformer_blocks_12_attn1_to_q", "attn1_to_q", "to_q", "te_layers_0"):
        assert names.find(unknown) is None


def test_a_name_that_two_layers_could_have_is_nobodys() -> None:
    names = ModuleNames({"a.b_c": "one", "a_b.c": "two", "d.e": "three"})
    assert (names.find("a_b_c"), names.find("d_e"), names.find("a.b_c")) == (None, "three", "one")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"diffusion_model.{QUERY}.dora_scale", "DoRA"),
        (f"transformer.{QUERY}.lora_magnitude_vector.weight", "DoRA"),
        (f"transformer.{QUERY}.lora_magnitude_vector", "DoRA"),
        (f"lycoris_{QUERY}.lokr_w1".replace("s.0.", "s_0_"), "LoKr"),
        (f"diffusion_model.{QUERY}.lokr_w2_a", "LoKr"),
        (f"diffusion_model.{QUERY}.hada_w1_a", "LoHa"),
        (f"diffusion_model.{QUERY}.oft_R.weight", "OFT"),
        (f"diffusion_model.{QUERY}.oft_blocks", "OFT"),
        (f"diffusion_model.{QUERY}.diff", "full differences"),
        (f"diffusion_model.{QUERY}.diff_b", "full differences"),
        (f"{QUERY}.lora_B.bias", "biases"),
        (f"{QUERY}.lora_mid.weight", "LoCon"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    values = {name: torch.ones(3, 64), f"{QUERY}.lora_A.weight": torch.ones(3, 64)}
    for tensors in (values, {name: values[name]}):  # beside factors, and alone
        if set(tensors) == {name} and kind in ("biases", "LoCon", "DoRA"):
            continue  # never alone
        save_file(tensors, path)
        with pytest.raises(CheckpointError) as caught:
            read_lora(open_lora(path))
        assert kind in str(caught.value)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


ALPHA = f"diffusion_model.{QUERY}.alpha"
DAMAGED: dict[str, tuple[Tensors, str]] = {
    "half": ({f"{QUERY}.lora_A.weight": torch.ones(2, 64)}, "only one of its two factors"),
    "rank 0": (pair(torch.ones(0, 64), torch.ones(64, 0)), "to_q has factors of rank 0"),
    "ranks": (pair(torch.ones(2, 64), torch.ones(64, 3)), "to_q: .* must share r"),
    "vector": (pair(torch.ones(64), torch.ones(64, 1)), "to_q: low-rank factors"),
    "integers": (
        pair(torch.ones(2, 64).int(), torch.ones(64, 2)),
        "a LoRA factor is torch.int32",
    ),
    "alphas": (ONES | {ALPHA: torch.ones(2)}, "to_q: its alpha is no finite number"),
    "nan alpha": (ONES | {ALPHA: torch.tensor(float("nan"))}, "to_q: its alpha is no finite"),
    "twice": (
        ONES | {f"transformer.{QUERY}.lora_down.weight": torch.ones(2, 64)},
        "mean the same layer",
    ),
    "adapters": (
        {f"{QUERY}.lora_A.{n}.weight": torch.ones(2, 64) for n in ("default", "other")},
        "mean the same layer",
    ),
    "unknown": (ONES | {"epoch": torch.ones(1)}, "epoch is no LoRA factor"),
}


@pytest.mark.parametrize("case", sorted(DAMAGED))
def test_damaged_files_are_refused_naming_the_layer(tmp_path: Path, case: str) -> None:
    tensors, words = DAMAGED[case]
    with pytest.raises((CheckpointError, ShapeError), match=words):
        written(tmp_path / "x.safetensors", tensors)


def test_a_layer_under_two_names_of_one_file_is_refused(tmp_path: Path, deep: nn.Module) -> None:
    linear = deep.get_submodule("blocks.0.video.self_attention.to_q")
    assert isinstance(linear, nn.Linear)
    flat = f"lora_unet_{QUERY.replace('.', '_')}"
    tensors = factors(f"diffusion_model.{QUERY}", linear) | downs(flat, linear)
    lora = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match="mean the same layer"):
        attach(deep, [lora], NAMING)
    good = written(tmp_path / "y.safetensors", factors(f"diffusion_model.{QUERY}", linear))
    with pytest.raises(CheckpointError, match="given twice"):
        attach(deep, [good, good], NAMING)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_training_that_diverged_is_refused_and_changes_nothing(
    tmp_path: Path, deep: nn.Module, side: str
) -> None:
    linear = deep.get_submodule("blocks.0.video.self_attention.to_q")
    assert isinstance(linear, nn.Linear)
    tensors = factors(f"diffusion_model.{QUERY}", linear)
    tensors[f"diffusion_model.{QUERY}.lora_{side}.weight"].fill_(float("nan"))
    lora = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"{QUERY} holds NaN or infinity: its training"):
        attach(deep, [lora], NAMING)
    assert deep.get_submodule("blocks.0.video.self_attention.to_q") is linear


def test_factors_of_another_shape_name_file_and_layer(tmp_path: Path, deep: nn.Module) -> None:
    lora = written(tmp_path / "x.safetensors", pair(torch.ones(2, 64), torch.ones(63, 2)))
    with pytest.raises(ShapeError, match=rf"x\.safetensors: {QUERY}: .*\(63, 64\) does not fit"):
        attach(deep, [lora], NAMING)


def test_layers_of_other_networks_are_counted_and_named(tmp_path: Path, deep: nn.Module) -> None:
    linear = deep.get_submodule("blocks.0.video.self_attention.to_q")
    assert isinstance(linear, nn.Linear)
    strangers = (
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "connectors.video_connector.transformer_blocks.0.attn1.to_q",
        "diffusion_model.text_embedding_projection.video_aggregate_embed",
        "diffusion_model.transformer_blocks.12.attn1.to_q",
    )
    tensors = factors(f"diffusion_model.{QUERY}", linear, rank=5)
    for name in strangers:
        tensors |= downs(name, linear)
    lora = written(tmp_path / "x.safetensors", tensors)
    (report,) = attach(deep, [lora], NAMING)
    assert report.matched == 1
    assert set(report.unmatched) == {
        strangers[0],
        "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
        "text_embedding_projection.video_aggregate_embed",
        "transformer_blocks.12.attn1.to_q",
    }
    assert report.line().startswith("warning: LoRA ")
    assert "1 of 5 modules fit, not " in report.line()
    assert report.line().endswith("and 1 more")
    attach(deep, [], NAMING)


def scale_of(tmp_path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> float:
    (term,) = written(tmp_path / "x.safetensors", tensors, metadata).terms.values()
    return term.scale


def test_alpha_is_divided_by_the_rank_wherever_it_is_kept(tmp_path: Path) -> None:
    assert scale_of(tmp_path, ONES) == 1.0
    assert scale_of(tmp_path, ONES | {ALPHA: torch.tensor(1.0)}) == 0.5
    assert scale_of(tmp_path, ONES | {ALPHA: torch.tensor([8])}) == 4.0  # int64, one element
    peft = {"transformer.r": 2, "transformer.lora_alpha": 1}

    def told(**more: object) -> dict[str, str]:
        full = peft | {f"transformer.{name}": value for name, value in more.items()}
        return {"lora_adapter_metadata": json.dumps(full)}

    assert scale_of(tmp_path, ONES, told()) == 0.5
    assert scale_of(tmp_path, ONES, told(use_rslora=True)) == pytest.approx(2**-0.5)
    assert scale_of(tmp_path, ONES | {ALPHA: torch.tensor(4.0)}, told()) == 2.0  # tensors win
    with pytest.raises(CheckpointError, match="alpha_pattern"):
        scale_of(tmp_path, ONES, told(alpha_pattern={"to_q": 3}))
    with pytest.raises(CheckpointError, match="lora_alpha 'x'"):
        scale_of(tmp_path, ONES, told(lora_alpha="x"))
    # ComfyUI's converter of musubi leaves alpha in B and ss_network_alpha in the header.
    assert scale_of(tmp_path, ONES, {"ss_network_alpha": "1"}) == 1.0


def test_alphas_of_layers_that_were_taken_out_do_no_harm(tmp_path: Path) -> None:
    stray = {"diffusion_model.transformer_blocks.0.audio_attn1.to_q.alpha": torch.tensor(4.0)}
    lora = written(tmp_path / "x.safetensors", ONES | stray)
    assert list(lora.terms) == [QUERY]


def test_fp8_factors_are_decoded_with_their_scales(tmp_path: Path) -> None:
    exact = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    scale = exact.abs().max() / 448
    tensors = ONES | {
        f"diffusion_model.{QUERY}.lora_A.weight": (exact / scale).to(torch.float8_e4m3fn),
        f"diffusion_model.{QUERY}.lora_A.weight_scale": scale,
    }
    (term,) = written(tmp_path / "x.safetensors", tensors).terms.values()
    assert term.a.dtype == torch.bfloat16
    # Four bits of mantissa: 2^-4 relative, and smallest steps of 2^-9 scales.
    assert torch.allclose(term.a.float(), exact, rtol=2**-4, atol=float(scale) * 2**-9)
