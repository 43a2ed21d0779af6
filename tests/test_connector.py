"""Text projection and connectors: reference values, the full size, and 2.0 written out by hand."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models import connector, text_projection
from ltxlite.models.connector import Connector, ConnectorConfig
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.settings import Settings
from ltxlite.models.text_projection import TextProjection, TextProjectionConfig

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "models" / "tiny-2.3-distilled.safetensors"
VIDEO = "model.diffusion_model.video_embeddings_connector."
AUDIO = "model.diffusion_model.audio_embeddings_connector."
PROJECTION = "text_embedding_projection."
OLD = ConnectorConfig(heads=3, head_dim=10, layers=2, gated=False, registers=8)
SHARED = TextProjectionConfig(hidden=30, states=4, video=30, audio=30, shared=True)


def tiny_settings(**changes: object) -> Settings:
    with safe_open(CHECKPOINT, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return Settings({**config["transformer"], **changes}, "config.transformer")


def tiny_gemma_config() -> GemmaConfig:
    content = (GOLDEN / "models" / "gemma3_tiny" / "config.json").read_text()
    return GemmaConfig.from_settings(Settings(json.loads(content), "config.json"))


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def assembled(model: nn.Module, tensors: Mapping[str, Tensor], renames) -> nn.Module:
    kept = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        kept[name] = tensor.float()
    model.load_state_dict(kept, assign=True, strict=True)
    return model.requires_grad_(False)


def tiny_models() -> tuple[TextProjection, Connector, Connector]:
    tensors, settings = load_file(CHECKPOINT), tiny_settings()
    with torch.device("meta"):
        config = TextProjectionConfig.from_settings(settings, tiny_gemma_config())
        projection = TextProjection(config)
        video = Connector(ConnectorConfig.from_settings(settings))
        audio = Connector(ConnectorConfig.from_settings(settings, sound=True))
    assembled(projection, part(tensors, PROJECTION), text_projection.RENAMES)
    assembled(video, part(tensors, VIDEO), connector.RENAMES)
    assembled(audio, part(tensors, AUDIO), connector.RENAMES)
    return projection, video, audio


def random_model(model: nn.Module, std: float = 0.3) -> nn.Module:
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.requires_grad_(False)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


class Called(nn.Module):
    """A linear layer that shows nothing but its call, like a quantized one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("quantized", [False, True])
def test_features_and_contexts_equal_the_reference(quantized: bool) -> None:
    projection, video, audio = tiny_models()
    if quantized:
        projection.video, projection.audio = Called(projection.video), Called(projection.audio)
    case = load_file(GOLDEN / "golden" / "connectors.safetensors")
    mask = case["in.attention_mask"]
    with torch.inference_mode():
        features = projection.padded_features(case["in.hidden_states"], mask)
        for name, model, feature in zip(("video", "audio"), (video, audio), features, strict=True):
            # The order of the sum over layers differs from one long product: 5e-7 measured.
            assert relative_error(feature, case[f"{name}_features"]) < 3e-6
            for sample, real in enumerate(mask.bool()):
                context = model(feature[sample, real][None], mask.shape[1])[0]
                assert relative_error(context, case[f"{name}_encoding"][sample]) < 3e-6


def test_the_whole_text_path_equals_the_reference() -> None:
    projection, video, audio = tiny_models()
    gemma = Gemma(tiny_gemma_config())
    tensors = load_file(GOLDEN / "models" / "gemma3_tiny_single.safetensors")
    text = {k: t for k, t in tensors.items() if re.match(r"model\.(layers|embed|norm)", k)}
    assembled(gemma, {name.removeprefix("model."): t for name, t in text.items()}, ())
    case = load_file(GOLDEN / "golden" / "text_full_path.safetensors")
    inputs = zip(case["in.input_ids"], case["in.attention_mask"].bool(), strict=True)
    for sample, (ids, real) in enumerate(inputs):
        with torch.inference_mode():
            states = gemma.states(ids[real][None], first=int((~real).sum()))
            for name, model, feature in zip(
                ("video", "audio"), (video, audio), projection.features(states), strict=True
            ):
                got = model(feature)[0, case["positions"]]
                # 1.2e-6 measured; from position 0 the rotary angles round otherwise: 1.2e-5.
                assert relative_error(got, case[f"{name}_encoding"][sample]) < 5e-6


def test_full_size_names_and_shapes_equal_the_release() -> None:
    release = json.loads((GOLDEN / "real_22b_keys.json").read_text())
    settings = Settings(release["config"]["transformer"], "config.transformer")
    with torch.device("meta"):
        built = {
            VIDEO: (Connector(ConnectorConfig.from_settings(settings)), connector.RENAMES),
            AUDIO: (Connector(ConnectorConfig.from_settings(settings, True)), connector.RENAMES),
            PROJECTION: (
                TextProjection(TextProjectionConfig.from_settings(settings, GemmaConfig())),
                text_projection.RENAMES,
            ),
        }
    counts = []
    for prefix, (model, renames) in built.items():
        wanted = {}
        for name, shape in release["tensors"].items():
            if name.startswith(prefix):
                name = name[len(prefix) :]
                for pattern, replacement in renames:
                    name = re.sub(pattern, replacement, name)
                wanted[name] = tuple(shape)
        got = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert got == wanted
        counts.append(sum(math.prod(shape) for shape in got.values()))
    # model.md 1.3: both connectors and both projections of 2.3.
    assert counts == [1_612_546_304, 403_620_096, 770_707_456 + 385_353_728]


def test_shapes_alone_give_the_full_size_configuration() -> None:
    release = json.loads((GOLDEN / "real_22b_keys.json").read_text())
    settings = Settings(release["config"]["transformer"], "config.transformer")
    shapes = {name: tuple(shape) for name, shape in release["tensors"].items()}
    for prefix, sound in ((VIDEO, False), (AUDIO, True)):
        own = {k[len(prefix) :]: s for k, s in shapes.items() if k.startswith(prefix)}
        assert ConnectorConfig.from_shapes(own) == ConnectorConfig.from_settings(settings, sound)
    own = {k[len(PROJECTION) :]: s for k, s in shapes.items() if k.startswith(PROJECTION)}
    config = TextProjectionConfig.from_shapes(own, GemmaConfig())
    assert config == TextProjectionConfig.from_settings(settings, GemmaConfig())


def old_settings() -> Settings:
    values = {
        "caption_channels": 3840,
        "connector_positional_embedding_max_pos": [4096],
        "connector_num_learnable_registers": 128,
        "connector_norm_output": True,
        "rope_type": "split",
        "frequencies_precision": "float64",
        "connector_num_attention_heads": 30,
        "connector_attention_head_dim": 128,
        "connector_num_layers": 2,
    }
    return Settings(values, "config.transformer")


def test_theta_of_the_transformer_is_not_the_connectors() -> None:
    """The official builder passes it to the transformer alone (ltx-core 1.0.0 and later)."""
    theta = Settings({"positional_embedding_theta": 5000.0}, "config.transformer")
    for sound in (False, True):
        assert ConnectorConfig.from_settings(theta, sound).theta == 10000.0


def test_the_configuration_of_2_0_gives_its_published_sizes() -> None:
    for sound in (False, True):
        config = ConnectorConfig.from_settings(old_settings(), sound)
        assert config == ConnectorConfig(30, 128, 2, gated=False)
        with torch.device("meta"):
            tensors = Connector(config).state_dict()
        # model.md 1.3, last column.
        assert sum(tensor.numel() for tensor in tensors.values()) == 354_470_400
        stored = {
            "learnable_registers": (128, 3840),
            "transformer_1d_blocks.0.attn1.to_q.weight": (3840, 3840),
            "transformer_1d_blocks.0.ff.net.2.bias": (3840,),
            "transformer_1d_blocks.1.attn1.to_q.weight": (3840, 3840),
        }
        assert ConnectorConfig.from_shapes(stored) == config
    config = TextProjectionConfig.from_settings(old_settings(), GemmaConfig())
    assert config == TextProjectionConfig(3840, 49, 3840, 3840, shared=True)
    assert config == TextProjectionConfig.from_shapes(
        {"aggregate_embed.weight": (3840, 188160)}, GemmaConfig()
    )
    with torch.device("meta"):
        names = TextProjection(config).state_dict()
    assert {name: tuple(t.shape) for name, t in names.items()} == {"both.weight": (3840, 188160)}


def test_an_absent_maximum_position_means_one() -> None:
    settings = tiny_settings()
    assert ConnectorConfig.from_settings(settings).max_position == 4096
    bare = Settings({"connector_num_attention_heads": 2}, "config.transformer")
    config = ConnectorConfig.from_settings(bare)
    assert (config.max_position, config.layers, config.rope_float64) == (1, 2, False)


def connector_by_hand(model: Connector, features: Tensor, length: int) -> Tensor:
    """Compute an ungated connector in float64, a token and a head at a time."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def turn(x: Tensor, position: int, head: int) -> Tensor:
        half, count = config.head_dim // 2, config.width // 2
        out = x.clone()
        for i in range(half):
            frequency = config.theta ** ((head * half + i) / (count - 1)) * math.pi / 2
            angle = frequency * (2 * position / config.max_position - 1)
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = x[i] * cos - x[half + i] * sin
            out[half + i] = x[half + i] * cos + x[i] * sin
        return out

    slots = [features[p] if p < len(features) else None for p in range(length)]
    fill = weights["registers"]
    x = torch.stack([fill[p % len(fill)] if s is None else s for p, s in enumerate(slots)])
    for number in range(config.layers):
        name = f"blocks.{number}"
        y = norm(x)
        q, k, v = (linear(y, f"{name}.attention.to_{part}") for part in "qkv")
        q = norm(q) * weights[f"{name}.attention.q_norm.weight"]
        k = norm(k) * weights[f"{name}.attention.k_norm.weight"]
        heads = []
        for head in range(config.heads):
            mine = slice(head * config.head_dim, (head + 1) * config.head_dim)
            queries = torch.stack([turn(q[p, mine], p, head) for p in range(length)])
            keys = torch.stack([turn(k[p, mine], p, head) for p in range(length)])
            heads.append((queries @ keys.T / config.head_dim**0.5).softmax(-1) @ v[:, mine])
        x = x + linear(torch.cat(heads, dim=-1), f"{name}.attention.to_out")
        up = linear(norm(x), f"{name}.feed_forward.up")
        gelu = up / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (up + 0.044715 * up**3)))
        x = x + linear(gelu, f"{name}.feed_forward.down")
    return norm(x)


@pytest.mark.parametrize("count", [1, 11, 24])
def test_an_ungated_connector_equals_its_formulas(count: int) -> None:
    model = random_model(Connector(replace(OLD, theta=100.0)))
    features = torch.randn(2, count, 30)
    with torch.inference_mode():
        got = model(features, 24)
    for sample in range(2):
        wanted = connector_by_hand(model, features[sample].double(), 24)
        # theta 100 keeps angles below 160 rad, so fp32 angles are good to 1e-5.
        torch.testing.assert_close(got[sample].double(), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_connector_and_leave_its_value_alone() -> None:
    model = random_model(Connector(OLD))
    features = torch.randn(1, 5, 30, requires_grad=True)
    plain = model(features, 16)
    with torch.enable_grad():
        recorded = model(features, 16)
        recorded[0, 15, :3].sum().backward()
    torch.testing.assert_close(recorded, plain, rtol=1e-5, atol=1e-5)  # other kernels, same sums
    assert features.grad is not None
    assert bool((features.grad.abs().amax(-1) > 0).all())


@pytest.mark.parametrize(("count", "length"), [(5, 12), (9, 8), (3, 0)])
def test_a_length_that_cannot_hold_the_prompt_in_registers_is_refused(
    count: int, length: int
) -> None:
    with pytest.raises(ShapeError, match=f"a context of {length} rows for {count} tokens"):
        random_model(Connector(OLD))(torch.zeros(1, count, 30), length)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match="features 31 wide, the connector takes 30"):
        random_model(Connector(OLD))(torch.zeros(1, 3, 31), 8)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_shared_projection_equals_its_formulas(quantized: bool) -> None:
    projection = random_model(TextProjection(SHARED))
    weight = projection.both.weight.double()
    if quantized:
        projection.both = Called(projection.both)
    states = 5 + 3 * torch.randn(2, 4, 7, 30)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    video, audio = projection.padded_features(states, mask)
    assert torch.equal(video, audio)
    for sample in range(2):
        for token in range(7):
            row = torch.zeros(30 * 4, dtype=torch.float64)
            if mask[sample, token]:
                for layer in range(4):
                    real = states[sample, layer, mask[sample].bool()].double()
                    span = real.max() - real.min() + 1e-6
                    values = 8 * (states[sample, layer, token].double() - real.mean()) / span
                    row[layer::4] = values
            # fp32 sums of 120 products of order 1.
            torch.testing.assert_close(
                video[sample, token].double(), weight @ row, rtol=1e-4, atol=3e-5
            )


def test_the_two_projections_of_2_3_equal_their_formulas() -> None:
    config = TextProjectionConfig(hidden=15, states=3, video=22, audio=9)
    projection = random_model(TextProjection(config))
    states = 40 * torch.randn(3, 1, 5, 15)
    found = projection.features(iter(states))
    for linear, got in zip((projection.video, projection.audio), found, strict=True):
        for token in range(5):
            row = torch.zeros(45, dtype=torch.float64)
            for layer in range(3):
                x = states[layer, 0, token].double()
                row[layer::3] = x / (x.square().mean() + 1e-6).sqrt()
            row = row * (linear.out_features / 15) ** 0.5
            wanted = linear.weight.double() @ row + linear.bias.double()
            # fp32 sums of 45 products of order 1.
            torch.testing.assert_close(got[0, token].double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_sum_in_bf16_is_no_worse_than_one_long_product() -> None:
    config = TextProjectionConfig(hidden=64, states=49, video=33, audio=17)
    projection = random_model(TextProjection(config), std=0.05)
    states = torch.randn(49, 1, 7, 64)
    exact = projection.features(states)
    low = projection.to(torch.bfloat16)
    summed = low.features(states.to(torch.bfloat16))
    low.video, low.audio = Called(low.video), Called(low.audio)
    whole = low.features(states.to(torch.bfloat16))
    for reference, ours, theirs in zip(exact, summed, whole, strict=True):
        assert ours.dtype == torch.bfloat16
        # 49 partial sums are rounded to bf16 once more each, which adds to the same noise of
        # rounded inputs and weights: at most 1.5 times its size.
        assert (ours - reference).norm() < 1.5 * (theirs - reference).norm()


@pytest.mark.parametrize("shape", [(3, 1, 5, 30), (5, 1, 5, 30), (4, 1, 5, 29)])
def test_states_of_another_text_encoder_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="the text projection takes 4 of 30"):
        random_model(TextProjection(SHARED)).features(torch.randn(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder_norm_type": "layer"}, "text_encoder_norm_type is 'layer'"),
        ({"caption_proj_input_norm": True}, "caption_proj_input_norm is True"),
        ({"caption_projection_first_linear": True}, "first_linear is True"),
        ({"connector_positional_embedding_max_pos": [4096, 2]}, r"is \[4096, 2\], .* one axis"),
        ({"rope_type": "spiral"}, "rope_type is 'spiral'"),
        ({"caption_proj_before_connector": False}, "connectors 64 and 32 wide"),
    ],
)
def test_settings_we_do_not_implement_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        TextProjectionConfig.from_settings(tiny_settings(**changes), tiny_gemma_config())


def test_files_without_connector_or_projection_are_told_apart() -> None:
    with pytest.raises(CheckpointError, match="learnable_registers is missing"):
        ConnectorConfig.from_shapes({})
    with pytest.raises(CheckpointError, match=r"connector blocks \[0\] are missing"):
        ConnectorConfig.from_shapes({"learnable_registers": (128, 256)})
    with pytest.raises(CheckpointError, match=r"aggregate_embed\.weight is missing"):
        TextProjectionConfig.from_shapes({}, GemmaConfig())
    with pytest.raises(CheckpointError, match="reads 188160 values a token, this Gemma gives 9 x"):
        TextProjectionConfig.from_shapes(
            {"aggregate_embed.weight": (3840, 188160)}, tiny_gemma_config()
        )
