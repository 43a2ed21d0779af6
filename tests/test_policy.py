"""Recipes: the published ones by the sizes of real files, own ones, and what none may change."""

import json
import re
from pathlib import Path

import gguf
import pytest

from ltxlite_quant.formats import FormatError
from ltxlite_quant.policy import (
    RECIPES,
    Decision,
    Recipe,
    Rule,
    decide,
    decision_lines,
    read_recipe,
    recipe_named,
    total_bytes,
)

PREFIX = "model.diffusion_model."
FULL = json.loads((Path(__file__).parent / "golden" / "real_22b_keys.json").read_text("utf-8"))


def released() -> dict[str, tuple[int, ...]]:
    """The transformer and connectors of LTX-2.3, block 2 before block 10."""
    names = [name for name in FULL["tensors"] if name.startswith(PREFIX)]
    names.sort(key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    return {name.removeprefix(PREFIX): tuple(FULL["tensors"][name]) for name in names}


def decided(recipe: str) -> dict[str, Decision]:
    return {item.name: item for item in decide(recipe_named(recipe), released())}


# Sizes that formats.md 4.5 computed apart from this code.
@pytest.mark.parametrize(
    ("recipe", "gigabytes"),
    [
        ("Q2_K", 9.4),
        ("Q3_K_S", 11.1),
        ("Q3_K_M", 11.9),
        ("Q4_K_S", 14.0),
        ("Q4_K_M", 15.2),
        ("Q5_K_M", 16.7),
        ("Q6_K", 18.3),
        ("Q8_0", 22.8),
    ],
)
def test_recipes_give_the_published_sizes_of_the_22b_model(recipe: str, gigabytes: float) -> None:
    size = total_bytes(decided(recipe).values())
    # Sizes there have one digit behind the point, Q2_K is 9.447 and Q3_K_M 11.945.
    assert abs(size / 1e9 - gigabytes) < 0.06


def test_the_mixture_of_q4_k_m_is_the_documented_one() -> None:
    found = {name: item.format.name for name, item in decided("Q4_K_M").items()}
    block = "transformer_blocks.17."
    assert found[f"{block}attn1.to_q.weight"] == "Q4_K"
    assert found[f"{block}audio_to_video_attn.to_v.weight"] == "Q6_K"
    assert found[f"{block}ff.net.2.weight"] == found[f"{block}audio_ff.net.2.weight"] == "Q6_K"
    assert found[f"{block}ff.net.0.proj.weight"] == "Q4_K"
    assert found[f"{block}attn1.to_gate_logits.weight"] == "BF16"
    assert found["adaln_single.linear.weight"] == "BF16"
    assert found["audio_proj_out.weight"] == found["patchify_proj.weight"] == "BF16"
    connector = "video_embeddings_connector."
    assert found[f"{connector}transformer_1d_blocks.3.attn1.to_v.weight"] == "Q8_0"
    assert found[f"{connector}transformer_1d_blocks.3.attn1.to_gate_logits.weight"] == "BF16"
    assert found[f"{connector}learnable_registers"] == "F32"


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_vectors_and_tables_are_f32_in_every_recipe(recipe: str) -> None:
    for name, item in decided(recipe).items():
        if len(item.shape) == 1 or "scale_shift_table" in name or "registers" in name:
            assert item.format.name == "F32", name
        else:
            assert item.format.name != "F32", name


def test_rules_for_the_first_few_count_in_the_order_of_the_file() -> None:
    found = decided("Q4_K_S")
    values = [n for n in found if n.endswith("to_v.weight") and "connector" not in n]
    kinds = [found[name].format.name for name in values]
    assert kinds == ["Q5_K"] * 4 + ["Q4_K"] * (len(values) - 4)
    found = decided("Q3_K_M")
    assert [found[name].format.name for name in values[:4]] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_file_types_are_the_numbers_of_llama_cpp(recipe: str) -> None:
    names = {f"MOSTLY_{recipe}", f"MOSTLY_{recipe}_MOE"}  # MXFP4 has its number with experts only
    (kind,) = [kind for kind in gguf.LlamaFileType if kind.name in names]
    assert RECIPES[recipe].file_type == kind.value


def test_rows_that_are_no_whole_blocks_fall_back_to_q8_0_then_bf16() -> None:
    shapes = {"a.weight": (3, 512), "b.weight": (3, 480), "c.weight": (3, 130), "d.weight": (7,)}
    found = decide(recipe_named("Q6_K"), shapes)
    assert [item.format.name for item in found] == ["Q6_K", "Q8_0", "BF16", "F32"]
    assert found[1].reason == "rows of 480 are no whole Q6_K blocks (base of Q6_K)"


def test_more_than_two_dimensions_stay_bf16() -> None:
    found = decide(recipe_named("Q8_0"), {"conv.weight": (64, 32, 3, 3, 32)})
    assert found[0].format.name == "BF16"


def test_text_encoders_follow_the_same_mixture_under_their_own_names() -> None:
    names = ["token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"]
    shapes = dict.fromkeys([*names, "blk.0.attn_q.weight"], (512, 256))
    found = decide(recipe_named("q4_k"), shapes)  # llama-quantize's short name, in any case
    assert [item.format.name for item in found] == ["Q6_K", "Q6_K", "Q6_K", "Q4_K"]


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_rules_of_an_own_recipe_go_before_those_of_its_base(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    rule = {"match": r"blocks\.0\.", "format": "Q8_0", "first": 1}
    if suffix == ".json":
        path.write_text(json.dumps({"base": "Q4_K_M", "rules": [rule]}), encoding="utf-8")
    else:
        lines = ['base = "Q4_K_M"', "[[rules]]", r"match = 'blocks\.0\.'", 'format = "Q8_0"']
        path.write_text("\n".join([*lines, "first = 1"]), encoding="utf-8")
    recipe = read_recipe(path)
    shapes = {f"transformer_blocks.0.{n}.weight": (4, 256) for n in ("to_v", "to_q", "a.to_v")}
    shapes["transformer_blocks.0.scale_shift_table"] = (9, 256)
    kinds = [item.format.name for item in decide(recipe, shapes)]
    assert kinds == ["Q8_0", "Q4_K", "Q6_K", "F32"]
    assert recipe.name == "mine"
    assert json.loads(recipe.text())["rules"][0] == [r"blocks\.0\.", "Q8_0", 1]


def test_a_bare_format_as_base_keeps_only_what_is_sensitive(tmp_path: Path) -> None:
    path = tmp_path / "flat.toml"
    path.write_text('base = "Q4_K"\nname = "flat"', encoding="utf-8")
    names = ("a.to_v.weight", "video_embeddings_connector.a.to_k.weight", "adaln_single.x.weight")
    found = decide(read_recipe(path), dict.fromkeys(names, (4, 256)))
    assert [item.format.name for item in found] == ["Q4_K", "Q4_K", "BF16"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base = [", "cannot be read"),
        ("base = 3", "wanted base"),
        ('base = "Q9_K"', "base is 'Q9_K'; choose Q2_K"),
        ('base = "I8"', "base is 'I8'"),
        ('base = "Q8_0"\nrule = 1', "unknown key 'rule'"),
        ('base = "Q8_0"\nrules = 1', "rules must be a list"),
        ('base = "Q8_0"\n[[rules]]\nmatch = "a"', "rule 1 must have match, format"),
        ('base = "Q8_0"\n[[rules]]\nmatch = "("\nformat = "F16"', "rule 1: .* no regular express"),
        ('base = "Q8_0"\n[[rules]]\nmatch = 4\nformat = "F16"', "rule 1: .* no regular express"),
        ('base = "Q8_0"\n[[rules]]\nmatch = "a"\nformat = "IQ1_S"', "rule 1: format is 'IQ1_S'"),
        ('base = "Q8_0"\n[[rules]]\nmatch = "a"\nformat = "F16"\nfirst = -1', "first is -1"),
    ],
)
def test_a_wrong_recipe_file_is_told_in_one_line(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=f"wrong.toml: .*{message}|wrong.toml: {message}") as stop:
        read_recipe(path)
    assert "\n" not in str(stop.value)


def test_files_that_are_no_text_or_too_long_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"binary\.toml: the recipe cannot be read"):
        read_recipe(path)
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(FormatError, match="2097152 bytes are too many"):
        read_recipe(path)
    path = tmp_path / "list.json"
    path.write_text("[1]")
    with pytest.raises(FormatError, match="wanted an object"):
        read_recipe(path)


def test_unknown_recipes_are_answered_with_the_known_ones() -> None:
    with pytest.raises(FormatError, match=r"no recipe is called 'Q7_K'; choose Q2_K, .*BF16"):
        recipe_named("Q7_K")


def test_the_summary_counts_tensors_and_bytes() -> None:
    recipe = Recipe("r", "Q8_0", 7, (Rule("b", "F16", "half"),))
    found = decide(recipe, {"a": (2, 32), "b": (4, 32), "c": (32,), "d": (1, 32)})
    assert total_bytes(found) == 2 * 34 + 4 * 64 + 128 + 34
    assert decision_lines(found) == [
        "F16        1 tensors    0.000 GB  half",
        "F32        1 tensors    0.000 GB  vector",
        "Q8_0       2 tensors    0.000 GB  base of r",
    ]
