"""Gemma 3: against the reference values and against formulas written out by hand."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models.gemma import GGUF_RENAMES, IGNORED, RENAMES, Gemma, GemmaNorm
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.settings import Settings

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "models" / "gemma3_tiny"
TINY = GemmaConfig(
    hidden=20,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=6,
    inner=28,
    vocabulary=37,
    global_layers=(1,),
    window=4,
    query_scalar=9.0,
)


def settings(**changes: object) -> Settings:
    text = json.loads((FOLDER / "config.json").read_text())["text_config"]
    return Settings({"text_config": {**text, **changes}}, "config.json")


def folder_tensors() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(FOLDER.glob("*.safetensors")):
        tensors |= load_file(path)
    return {re.sub(r"^language_model\.model\.", "", name): t for name, t in tensors.items()}


def single_tensors() -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / "models" / "gemma3_tiny_single.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def assembled(config: GemmaConfig, tensors: Mapping[str, Tensor]) -> Gemma:
    with torch.device("meta"):
        model = Gemma(config)
    kept = {}
    for name, tensor in tensors.items():
        if not any(re.search(pattern, name) for pattern in IGNORED):
            for pattern, replacement in RENAMES:
                name = re.sub(pattern, replacement, name)
            kept[name] = tensor.float()
    model.load_state_dict(kept, assign=True, strict=True)
    return model.requires_grad_(False)


def random_gemma(config: GemmaConfig, seed: int = 0) -> Gemma:
    torch.manual_seed(seed)
    model = Gemma(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.requires_grad_(False)


def tensors_of(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Gemma(config).state_dict().items()}


@pytest.mark.parametrize("tensors", [folder_tensors, single_tensors])
@pytest.mark.parametrize("padded_positions", [False, True])
def test_states_of_real_tokens_equal_the_padded_reference(tensors, padded_positions) -> None:
    model = assembled(GemmaConfig.from_settings(settings()), tensors())
    case = load_file(GOLDEN / "golden" / "gemma_hidden_states.safetensors")
    wanted, mask = case["hidden_states_tail"], case["in.attention_mask"].bool()
    worst = 0.0
    for ids, real, states in zip(case["in.input_ids"], mask, wanted, strict=True):
        first = int((~real).sum()) if padded_positions else 0
        with torch.inference_mode():
            got = torch.stack(list(model.states(ids[real][None], first)))[:, 0]
        shown = min(int(real.sum()), states.shape[1])
        worst = max(worst, (got[:, -shown:] - states[:, -shown:]).abs().max().item())
    # Same order of operations: 1e-6. From position 0 the angles round otherwise: 3.4e-6 measured.
    limit = 2e-6 if padded_positions else 1e-5
    assert worst / wanted.abs().max().item() < limit


def by_hand(model: Gemma, ids: list[int]) -> list[Tensor]:
    """Compute all states in float64 with loops over tokens and heads."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        scale = weights[f"{name}.weight"] + config.norm_offset
        return x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() * scale

    def turn(x: Tensor, position: int, theta: float, factor: float) -> Tensor:
        half = config.head_dim // 2
        out = x.clone()
        for i in range(half):
            angle = position / factor * theta ** (-2 * i / config.head_dim)
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = x[i] * cos - x[half + i] * sin
            out[half + i] = x[half + i] * cos + x[i] * sin
        return out

    def attend(x: Tensor, number: int) -> Tensor:
        name, size = f"layers.{number}.self_attn", config.head_dim
        wide = number in config.global_layers
        rope = (config.global_theta, config.global_factor) if wide else (config.local_theta, 1.0)
        q, k, v = (x @ weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
        rows = []
        for i in range(len(ids)):
            seen = [j for j in range(i + 1) if wide or i - j < config.window]
            heads = []
            for head in range(config.heads):
                mine = slice(head * size, (head + 1) * size)
                group = head // (config.heads // config.kv_heads)
                theirs = slice(group * size, (group + 1) * size)
                query = turn(norm(q[i, mine], f"{name}.q_norm"), i, *rope)
                keys = [turn(norm(k[j, theirs], f"{name}.k_norm"), j, *rope) for j in seen]
                scores = torch.stack([query @ key for key in keys]) / config.query_scalar**0.5
                heads.append(scores.softmax(0) @ v[seen][:, theirs])
            rows.append(torch.cat(heads) @ weights[f"{name}.o_proj.weight"].T)
        return torch.stack(rows)

    x = weights["embed_tokens.weight"][ids] * config.hidden**0.5
    states = []
    for number in range(config.layers):
        states.append(x)
        name = f"layers.{number}"
        mixed = attend(norm(x, f"{name}.input_layernorm"), number)
        x = x + norm(mixed, f"{name}.post_attention_layernorm")
        y = norm(x, f"{name}.pre_feedforward_layernorm")
        gate = y @ weights[f"{name}.mlp.gate_proj.weight"].T
        gelu = gate / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        up = y @ weights[f"{name}.mlp.up_proj.weight"].T
        down = (gelu * up) @ weights[f"{name}.mlp.down_proj.weight"].T
        x = x + norm(down, f"{name}.post_feedforward_layernorm")
    return [*states, norm(x, "norm")]


def test_states_equal_loops_over_heads_tokens_and_windows() -> None:
    model = random_gemma(TINY)
    ids = [2, 35, 7, 7, 19, 0, 36]  # longer than the window of 4
    got = list(model.states(torch.tensor([ids])))
    wanted = by_hand(model, ids)
    assert len(got) == len(wanted) == TINY.states
    # fp32 against float64: three layers of sums over at most 36 values, 1e-7 each.
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours[0].double(), theirs, rtol=1e-4, atol=2e-5)


def test_a_batch_gives_what_its_samples_give_alone() -> None:
    model = random_gemma(TINY)
    ids = torch.tensor([[2, 5, 9, 11, 3], [2, 30, 1, 4, 8]])
    together = torch.stack(list(model.states(ids)))
    alone = torch.cat([torch.stack(list(model.states(row[None]))) for row in ids], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)  # BLAS may block otherwise


def test_kept_states_are_not_overwritten_and_differ_pairwise() -> None:
    model = random_gemma(TINY)
    with torch.inference_mode():
        kept, copies = [], []
        for state in model.states(torch.tensor([[2, 4, 6]])):
            kept.append(state)
            copies.append(state.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert all(not torch.equal(kept[i], kept[j]) for i in range(4) for j in range(i))


def test_the_embedding_scale_is_rounded_to_the_dtype_of_the_embeddings() -> None:
    config = replace(TINY, hidden=3840, layers=1, inner=3)
    model = random_gemma(config).to(torch.bfloat16)
    state = next(iter(model.states(torch.tensor([[5]]))))
    row = model.embed_tokens.weight[5]
    assert torch.equal(state[0, 0], row * 62)  # sqrt(3840) is 61.97; bf16 steps are 0.25 there


def test_gguf_names_and_norms_give_the_same_states() -> None:
    model = random_gemma(TINY)
    back = {
        "embed_tokens": "token_embd",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    renamed = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if match := re.match(r"layers\.(\d+)\.(.*)", stem):
            stored = f"blk.{match[1]}.{back[match[2]]}.weight"
        else:
            stored = f"{back.get(stem, 'output_norm')}.weight"
        for pattern, replacement in GGUF_RENAMES:
            stored = re.sub(pattern, replacement, stored)
        renamed[stored] = tensor + 1 if "norm" in name else tensor
    other = assembled(replace(TINY, norm_offset=0.0), renamed)
    ids = torch.tensor([[2, 3, 5, 8, 13]])
    for ours, theirs in zip(other.states(ids), model.states(ids), strict=True):
        # w + 1 is rounded once where it is stored: 6e-8 relative a norm.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_norm_in_bf16_rounds_only_its_result() -> None:
    norm = GemmaNorm(33, TINY).to(torch.bfloat16)
    torch.manual_seed(1)
    nn.init.normal_(norm.weight)
    x = (100 * torch.randn(5, 33)).to(torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    wanted = (exact * (1 + norm.weight.double())).float()
    # Half a bf16 step is 2^-8 of the value; fp32 rounding before it may tip a tie.
    torch.testing.assert_close(norm(x).float(), wanted, rtol=1.001 * 2**-8, atol=1e-6)


@pytest.mark.parametrize("ids", [[[2, 37]], [[2, -1]]])
def test_ids_without_an_embedding_are_refused(ids: list[list[int]]) -> None:
    with pytest.raises(ShapeError, match="37 rows; the tokenizer belongs to another model"):
        next(random_gemma(TINY).states(torch.tensor(ids)))


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"got \[1, 0\]"):
        next(random_gemma(TINY).states(torch.zeros(1, 0, dtype=torch.int64)))


def test_old_and_new_spellings_of_the_configuration_agree() -> None:
    old = GemmaConfig.from_settings(settings())
    kinds = ["full_attention" if i == 5 else "sliding_attention" for i in range(8)]
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = json.loads((FOLDER / "config.json").read_text())["text_config"]
    gone = ("rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern")
    flat = {key: value for key, value in text.items() if key not in gone}
    new = flat | {"layer_types": kinds, "rope_parameters": rope, "_sliding_window_pattern": 6}
    assert GemmaConfig.from_settings(Settings(new, "config.json")) == old
    assert old.global_factor == 8.0
    assert old.unread == ()


def test_the_sparse_configuration_of_the_12b_release_means_the_defaults() -> None:
    text = {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = GemmaConfig.from_settings(Settings({"text_config": text}, "config.json"))
    assert config == GemmaConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "gemma4_text"}, "model_type is 'gemma4_text'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "must be positive"),
        ({"layer_types": ["full_attention"] * 7}, "a list of 8 names"),
        ({"layer_types": ["chunked_attention"] * 8}, "full_attention or sliding_attention"),
        ({"num_key_value_heads": 3}, "4 heads, 3 key-value heads"),
        ({"hidden_size": 2560}, "Gemma 3 4B"),
        ({"hidden_size": 5376}, "Gemma 3 27B"),
    ],
)
def test_configurations_we_do_not_implement_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        GemmaConfig.from_settings(settings(**changes))


def test_shapes_alone_give_the_12b_configuration() -> None:
    shapes = tensors_of(GemmaConfig())
    assert GemmaConfig.from_shapes(shapes) == GemmaConfig()
    # formats.md 1.11: 13 tensors a layer, the table and the last norm.
    assert len(shapes) == 48 * 13 + 2
    values = sum(math.prod(shape) for shape in shapes.values())
    linears, norms = 224_133_120, 4 * 3840 + 2 * 256  # a layer; model.md 3.1
    assert values == 48 * (linears + norms) + 262_208 * 3840 + 3840


def test_shapes_of_other_models_are_refused_by_name() -> None:
    shapes = tensors_of(TINY)
    with pytest.raises(CheckpointError, match="Gemma 3 1B"):
        GemmaConfig.from_shapes({**shapes, "norm.weight": (1152,)})
    with pytest.raises(CheckpointError, match="this is Gemma 4"):
        GemmaConfig.from_shapes({**shapes, "layers.0.layer_scalar": (1,)})
    with pytest.raises(CheckpointError, match=r"layers \[1\] are missing"):
        GemmaConfig.from_shapes({k: v for k, v in shapes.items() if "layers.1." not in k})
    with pytest.raises(CheckpointError, match="this is no Gemma 3 text encoder"):
        GemmaConfig.from_shapes({"shared.weight": (32128, 4096)})


@pytest.mark.parametrize("prefix", ["", "model."])
def test_everything_but_the_text_model_is_ignored_and_nothing_of_it(prefix: str) -> None:
    extra = (
        f"{prefix}vision_tower.vision_model.post_layernorm.bias",
        f"{prefix}vision_model.embeddings.position_embedding.weight",
        f"{prefix}multi_modal_projector.mm_soft_emb_norm.weight",
        "lm_head.weight",
        "language_model.lm_head.weight",
        "spiece_model",
        "tokenizer_json",
    )
    for name in extra:
        assert any(re.search(pattern, name) for pattern in IGNORED), name
    for name in tensors_of(TINY):
        assert not any(re.search(pattern, name) for pattern in IGNORED), name
