"""The embeddings connectors: prompt features of a few tokens to a context of fixed length.

What the prompt does not fill is filled with learned registers, so that the transformer attends to
all 1024 rows without a mask. Picture and sound have one connector each.
Source: LTX-2 400fd31, ltx_core/text_encoders/gemma/embeddings_connector.py; model.md 3.4.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models.activation import Activation, Normed, Tail, rms_norm
from ltxlite.models.attention import Attention, AttentionShape
from ltxlite.models.layers import TOKEN_CHUNK, FeedForward, add_rows
from ltxlite.models.rope import Layout, Rope, RopeSpec, rope_table
from ltxlite.models.settings import Settings

CONTEXT_LENGTH = 1024  # rows of text the released transformers were trained on
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class ConnectorConfig:
    """Hyper-parameters of one connector; the defaults are the constants of every release."""

    heads: int
    head_dim: int
    layers: int
    gated: bool = True
    feed_forward_bias: bool = True
    registers: int = 128
    max_position: int = 4096
    theta: float = 10000.0
    rope_layout: Layout = "split"
    rope_float64: bool = True

    @property
    def width(self) -> int:
        """Width of the features and of the context."""
        return self.heads * self.head_dim

    @property
    def rope(self) -> RopeSpec:
        """What fixes the rotary table besides the length."""
        limits = (self.max_position,)
        return RopeSpec(
            self.width, self.heads, limits, self.theta, self.rope_layout, self.rope_float64
        )

    @classmethod
    def from_settings(cls, settings: Settings, sound: bool = False) -> Self:
        """Read one connector from the `transformer` section of a checkpoint's configuration.

        An absent `audio_connector_*` key means the `connector_*` one (2.0); an absent
        `connector_positional_embedding_max_pos` means [1], as in the official code, which leaves
        theta at 10000 here whatever `positional_embedding_theta` gives the transformer.
        Raises CheckpointError on values that are not implemented.
        """
        heads = settings.integer("connector_num_attention_heads", 30)
        head_dim = settings.integer("connector_attention_head_dim", 128)
        layers = settings.integer("connector_num_layers", 2)
        if sound:
            heads = settings.integer("audio_connector_num_attention_heads", heads)
            head_dim = settings.integer("audio_connector_attention_head_dim", head_dim)
            layers = settings.integer("audio_connector_num_layers", layers)
        limits = settings.integers("connector_positional_embedding_max_pos", (1,))
        if len(limits) != 1:
            raise CheckpointError(
                f"{settings.where}.connector_positional_embedding_max_pos is {list(limits)}, "
                "ltxlite implements one axis"
            )
        # The official code builds 128 registers whatever the first of these keys says.
        settings.inert("connector_num_learnable_registers", "connector_learnable_registers_std")
        settings.inert("connector_norm_output")
        settings.expect("rope_type", "split", "interleaved")
        return cls(
            heads=heads,
            head_dim=head_dim,
            layers=layers,
            gated=settings.flag("connector_apply_gated_attention", False),
            feed_forward_bias=settings.flag("connector_ff_bias", True),
            max_position=limits[0],
            rope_layout=settings.take("rope_type", "split"),
            rope_float64=settings.take("frequencies_precision", "float32") == "float64",
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Infer the structure from tensor shapes (names without prefix) and the constants.

        Source: formats.md 5.2. An ungated connector (2.0) has heads of width 128.
        Raises CheckpointError if registers or blocks are missing.
        """
        if len(shapes.get("learnable_registers", ())) != 2:
            raise CheckpointError(
                "learnable_registers is missing; this file holds no embeddings connector, "
                "it comes with the checkpoint of the transformer"
            )
        registers, width = shapes["learnable_registers"]
        block = "transformer_1d_blocks.0."
        gate = shapes.get(f"{block}attn1.to_gate_logits.bias")
        heads = gate[0] if gate else max(1, width // 128)
        return cls(
            heads=heads,
            head_dim=width // heads,
            layers=_block_count(shapes),
            gated=gate is not None,
            feed_forward_bias=f"{block}ff.net.2.bias" in shapes,
            registers=registers,
        )


def _block_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    found = (re.match(r"transformer_1d_blocks\.(\d{1,4})\.", name) for name in shapes)
    numbers = {int(match[1]) for match in found if match}
    if missing := sorted(set(range(max(numbers, default=0) + 1)) - numbers):
        raise CheckpointError(f"connector blocks {missing[:5]} are missing; the file is damaged")
    return len(numbers)


class ConnectorBlock(nn.Module):
    """Self-attention and feed-forward with plain residuals and norms without weights."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width = config.width
        shape = AttentionShape(width, width, width, config.heads, config.gated, _EPS)
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(width, bias=config.feed_forward_bias)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        normed, tokens = rms_norm(x, _EPS), x.shape[1]
        kv = self.attention.keys_values(
            lambda rows: Activation(normed[:, rows]), tokens, rope, TOKEN_CHUNK
        )
        x = x + self.attention(Activation(normed), kv, rope)

        def update(rows: slice, residual: Tensor) -> Tensor:
            out: Tensor = self.feed_forward(Normed(x[:, rows], _EPS), Tail(residual=residual))
            return out

        return add_rows(x, update, TOKEN_CHUNK)


class Connector(nn.Module):
    """The connector of one stream."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.registers = nn.Parameter(torch.empty(config.registers, config.width))
        self.blocks = nn.ModuleList(ConnectorBlock(config) for _ in range(config.layers))

    def forward(self, features: Tensor, length: int = CONTEXT_LENGTH) -> Tensor:
        """Turn the features of the real tokens (B, n, C) into a context (B, length, C).

        Raises ShapeError if `length` is less than n or no multiple of the registers.
        """
        return self.together([features], length)[0]

    def together(self, features: Sequence[Tensor], length: int = CONTEXT_LENGTH) -> list[Tensor]:
        """Do the same for several prompts, block by block: each block is needed only once."""
        contexts = [self._fill(rows, length) for rows in features]
        positions = torch.arange(length, device=contexts[0].device)[None, None]
        rope = rope_table(positions, self.config.rope)
        for block in self.blocks:
            contexts = [block(x, rope) for x in contexts]
        return [rms_norm(x, _EPS) for x in contexts]

    def _fill(self, features: Tensor, length: int) -> Tensor:
        """Put register p mod R into every slot p behind the features."""
        batch, count, width = features.shape
        registers = self.config.registers
        if length % registers or length < max(count, 1):
            raise ShapeError(
                f"a context of {length} rows for {count} tokens; the length must be a multiple "
                f"of the connector's {registers} registers and hold all tokens"
            )
        if width != self.config.width:
            raise ShapeError(
                f"features {width} wide, the connector takes {self.config.width}; text projection "
                "and connectors must come from the same checkpoint"
            )
        tiled = self.registers.repeat(length // registers, 1)[count:].to(features.dtype)
        return torch.cat([features, tiled.expand(batch, -1, -1)], dim=1)


RENAMES = (
    (r"^transformer_1d_blocks\.", "blocks."),
    (r"^learnable_registers$", "registers"),
    (r"\.attn1\.", ".attention."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.ff\.net\.0\.proj\.", ".feed_forward.up."),
    (r"\.ff\.net\.2\.", ".feed_forward.down."),
)
IGNORED: tuple[str, ...] = ()
