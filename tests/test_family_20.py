"""The transformer of LTX-2.0, which no reference case reaches, written out over release names."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ltxlite.models.passes import Pass, StreamInput, Timesteps
from ltxlite.models.settings import Settings
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.release import release_name

HEADS, EPS = 2, 1e-6
SETTINGS = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 10,  # width 20: 3 axes of 3 frequencies and one of padding
    "audio_num_attention_heads": HEADS,
    "audio_attention_head_dim": 6,
    "cross_attention_dim": 20,
    "audio_cross_attention_dim": 12,
    "caption_channels": 7,
    "in_channels": 5,
    "out_channels": 5,
    "audio_in_channels": 3,
    "audio_out_channels": 3,
    "num_layers": 2,
    # Small numbers keep fp32 angles exact to 1e-5; their size is tested by the reference cases.
    "positional_embedding_theta": 20.0,
    "timestep_scale_multiplier": 11,
    "av_ca_timestep_scale_multiplier": 5.0,
    "frequencies_precision": "float64",
}
LIMITS = {"": (20, 2048, 2048), "audio_": (20,)}
Weights = Mapping[str, Tensor]


def random_transformer() -> Transformer:
    torch.manual_seed(3)
    network = Transformer(TransformerConfig.from_settings(Settings(SETTINGS, "config")))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return network.requires_grad_(False)


def release_weights(network: Transformer) -> dict[str, Tensor]:
    prefix = "model.diffusion_model."
    return {
        release_name("transformer", name).removeprefix(prefix): value.double()
        for name, value in network.state_dict().items()
    }


def inputs() -> dict[str, StreamInput]:
    """Two streams whose tokens all have noise levels of their own, some none."""
    torch.manual_seed(4)
    made = {}
    for prefix, tokens, channels, axes in (("", 4, 5, 3), ("audio_", 3, 3, 1)):
        starts = torch.rand(1, axes, tokens, 1) * 4
        levels = torch.rand(1, tokens, 1)
        levels[:, 0] = 0
        made[prefix] = StreamInput(
            latent=torch.randn(1, tokens, channels),
            sigma=torch.rand(1),
            timesteps=Timesteps.of(levels),
            positions=torch.cat([starts, starts + 1], dim=-1),
            context=torch.randn(1, 6, 7),
            context_mask=torch.tensor([[1, 1, 0, 1, 0, 1]]),
        )
    return made


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


class ByHand:
    """LTX-2.0 in float64, token by token where that is shorter, over release names.

    Source: model.md 2, the lines marked 2.0.
    """

    def __init__(self, weights: Weights, streams: Mapping[str, StreamInput]) -> None:
        self.weights, self.streams = weights, streams

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def adaln(self, name: str, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (T, n, C) and embeddings (T, C) of scaled levels (T,)."""
        angles = levels[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedder = f"{name}.emb.timestep_embedder.linear_"
        inner = torch.nn.functional.silu(self.linear(waves, f"{embedder}1"))
        embedded = self.linear(inner, f"{embedder}2")
        rows = self.linear(torch.nn.functional.silu(embedded), f"{name}.linear")
        return rows.unflatten(-1, (-1, embedded.shape[-1])), embedded

    def angles(self, prefix: str, width: int, limits: tuple[int, ...]) -> Tensor:
        """Angles (T, H, D/2) of a stream's tokens along its first `len(limits)` axes."""
        middle = self.streams[prefix].positions[0].double().mean(-1)  # (A, T)
        count = width // 2 // len(limits)
        rows = []
        for token in range(middle.shape[1]):
            row = [0.0] * (width // 2 - count * len(limits))
            for i in range(count):
                frequency = math.pi / 2 * 20.0 ** (i / (count - 1))
                row += [
                    frequency * (2 * float(middle[axis, token]) / limit - 1)
                    for axis, limit in enumerate(limits)
                ]
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float64).unflatten(-1, (HEADS, -1))

    def attend(
        self, name: str, x: Tensor, y: Tensor, turns: tuple[Tensor, Tensor] | None, mask: Tensor
    ) -> Tensor:
        q = norm(self.linear(x, f"{name}.to_q")) * self.weights[f"{name}.q_norm.weight"]
        k = norm(self.linear(y, f"{name}.to_k")) * self.weights[f"{name}.k_norm.weight"]
        q, k, v = (z.unflatten(-1, (HEADS, -1)) for z in (q, k, self.linear(y, f"{name}.to_v")))
        if turns is not None:
            q, k = (rotated(z, angle) for z, angle in zip((q, k), turns, strict=True))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        shares = scores.masked_fill(mask == 0, -torch.inf).softmax(-1)
        return self.linear(torch.einsum("hqk,khd->qhd", shares, v).flatten(1), f"{name}.to_out.0")

    def velocities(self, blocks: int) -> dict[str, Tensor]:
        x, rows, embedded, context = {}, {}, {}, {}
        for prefix, given in self.streams.items():
            levels = given.timesteps.per_token()[0, :, 0].double()
            x[prefix] = self.linear(given.latent[0].double(), f"{prefix}patchify_proj")
            rows[prefix], embedded[prefix] = self.adaln(f"{prefix}adaln_single", levels * 11)
            inner = self.linear(given.context[0].double(), f"{prefix}caption_projection.linear_1")
            inner = torch.nn.functional.gelu(inner, approximate="tanh")
            context[prefix] = self.linear(inner, f"{prefix}caption_projection.linear_2")
        for number in range(blocks):
            for prefix in x:
                x[prefix] = self.alone(number, prefix, x[prefix], rows[prefix], context[prefix])
            x = self.exchanged(number, x)
            for prefix in x:
                table = self.weights[f"transformer_blocks.{number}.{prefix}scale_shift_table"]
                m = table + rows[prefix]
                name = f"transformer_blocks.{number}.{prefix}ff.net"
                y = norm(x[prefix]) * (1 + m[:, 4]) + m[:, 3]
                y = torch.nn.functional.gelu(self.linear(y, f"{name}.0.proj"), approximate="tanh")
                x[prefix] = x[prefix] + m[:, 5] * self.linear(y, f"{name}.2")
        return {prefix: self.output(prefix, x[prefix], embedded[prefix]) for prefix in x}

    def alone(self, number: int, prefix: str, x: Tensor, rows: Tensor, text: Tensor) -> Tensor:
        """Self-attention with three of six rows, then text attention without any."""
        block = f"transformer_blocks.{number}.{prefix}"
        m = self.weights[f"{block}scale_shift_table"] + rows
        turn = self.angles(prefix, x.shape[1], LIMITS[prefix])
        y = norm(x) * (1 + m[:, 1]) + m[:, 0]
        every = torch.ones(len(x))
        x = x + m[:, 2] * self.attend(f"{block}attn1", y, y, (turn, turn), every)
        mask = self.streams[prefix].context_mask
        assert mask is not None
        return x + self.attend(f"{block}attn2", norm(x), text, None, mask[0])

    def exchanged(self, number: int, x: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for prefix, other, name, first in (
            ("", "audio_", "audio_to_video_attn", 0),
            ("audio_", "", "video_to_audio_attn", 2),
        ):
            sides = []
            for stream in (prefix, other):
                m = self.cross_rows(number, stream)
                sides.append(norm(x[stream]) * (1 + m[:, first]) + m[:, first + 1])
            turns = tuple(self.angles(stream, 12, (20,)) for stream in (prefix, other))
            block = f"transformer_blocks.{number}."
            heard = self.attend(f"{block}{name}", *sides, turns, torch.ones(len(sides[1])))
            direction = "a2v" if prefix == "" else "v2a"
            sigma = self.streams[other].sigma.double()
            gate, _ = self.adaln(f"av_ca_{direction}_gate_adaln_single", sigma * 5)
            out[prefix] = x[prefix] + heard * (self.cross_table(number, prefix)[4] + gate[0, 0])
        return out

    def cross_table(self, number: int, prefix: str) -> Tensor:
        stream = "audio" if prefix else "video"
        return self.weights[f"transformer_blocks.{number}.scale_shift_table_a2v_ca_{stream}"]

    def cross_rows(self, number: int, prefix: str) -> Tensor:
        stream = "audio" if prefix else "video"
        levels = self.streams[prefix].timesteps.per_token()[0, :, 0].double()
        rows, _ = self.adaln(f"av_ca_{stream}_scale_shift_adaln_single", levels * 11)
        return self.cross_table(number, prefix)[:4] + rows

    def output(self, prefix: str, x: Tensor, embedded: Tensor) -> Tensor:
        shift, scale = (self.weights[f"{prefix}scale_shift_table"][i] + embedded for i in (0, 1))
        centred = x - x.mean(-1, keepdim=True)
        return self.linear(norm(centred) * (1 + scale) + shift, f"{prefix}proj_out")


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def test_the_2_0_transformer_equals_its_formulas() -> None:
    network, streams = random_transformer(), inputs()
    got = network(Pass(streams[""], streams["audio_"]))
    wanted = ByHand(release_weights(network), streams).velocities(2)
    assert got.video is not None and got.audio is not None
    for ours, theirs in ((got.video[0], wanted[""]), (got.audio[0], wanted["audio_"])):
        # fp32 against float64 through two blocks: 5e-7 of the largest value was measured.
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_2_0_transformer_has_the_tensors_of_its_release() -> None:
    settings = Settings({"caption_channels": 3840}, "config")  # all else is the default
    with torch.device("meta"):
        network = Transformer(TransformerConfig.from_settings(settings))
    tensors = {
        release_name("transformer", name): tuple(value.shape)
        for name, value in network.state_dict().items()
    }
    block = [name for name in tensors if ".transformer_blocks.7." in name]
    # Counts and sizes: model.md 1.3, the totals of 2.0.
    assert len(block) == 72
    assert sum(math.prod(tensors[name]) for name in block) == 386_074_624
    assert sum(map(math.prod, tensors.values())) == 18_876_174_592
    assert tensors["model.diffusion_model.audio_caption_projection.linear_1.weight"] == (2048, 3840)
