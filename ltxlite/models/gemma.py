"""Gemma 3, the text encoder of LTX-2.0 and 2.3: token ids to the states of every layer.

Only real tokens are computed: attention is causal and rotary positions are relative, so padding on
the left would change nothing but the cost.
Source: transformers 5.23.0, models/gemma3/modeling_gemma3.py; restated in model.md 3.1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.errors import ShapeError
from ltxlite.models.gemma_config import GemmaConfig as GemmaConfig
from ltxlite.models.rope import Rope


@dataclass(frozen=True, slots=True)
class Sight:
    """What the layers of one kind see: rotary tables and, where the window cuts, a mask (n, n)."""

    queries: Rope
    keys: Rope
    mask: Tensor | None


class GemmaNorm(nn.Module):
    """RMS norm over the last axis in fp32, scaled by its weight plus an offset."""

    def __init__(self, size: int, config: GemmaConfig) -> None:
        super().__init__()
        self.eps, self.offset = config.eps, config.norm_offset
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        scale = self.weight.float() + self.offset
        return F.rms_norm(x.float(), scale.shape, scale, self.eps).to(x.dtype)


class GemmaAttention(nn.Module):
    """Causal attention; groups of query heads share a key-value head; norms are per head."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim, self.scale = config.head_dim, config.query_scalar**-0.5
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.group = config.heads // config.kv_heads
        self.q_proj = nn.Linear(config.hidden, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden, bias=False)
        self.q_norm = GemmaNorm(config.head_dim, config)
        self.k_norm = GemmaNorm(config.head_dim, config)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """Map (B, n, C) to (B, n, C)."""
        q = sight.queries.rotate(self.q_norm(self._split(self.q_proj(x))).flatten(2))
        k = sight.keys.rotate(self.k_norm(self._split(self.k_proj(x))).flatten(2))
        q, k, v = (self._split(y).transpose(1, 2) for y in (q, k, self.v_proj(x)))
        k, v = (y.repeat_interleave(self.group, dim=1) for y in (k, v))  # (B, H, n, D)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=sight.mask, is_causal=sight.mask is None, scale=self.scale
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)


class GemmaMLP(nn.Module):
    """Gated feed-forward: GELU of one projection times another."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.inner, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n, C) to (B, n, C)."""
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        out: Tensor = self.down_proj(gate * self.up_proj(x))
        return out


class GemmaLayer(nn.Module):
    """One layer: each part is normalised before it and again before it joins the residual."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.self_attn = GemmaAttention(config)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = GemmaNorm(config.hidden, config)
        self.post_attention_layernorm = GemmaNorm(config.hidden, config)
        self.pre_feedforward_layernorm = GemmaNorm(config.hidden, config)
        self.post_feedforward_layernorm = GemmaNorm(config.hidden, config)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """Map (B, n, C) to a new (B, n, C); x itself is kept, the caller may hold it."""
        mixed = self.self_attn(self.input_layernorm(x), sight)
        x = x + self.post_attention_layernorm(mixed)
        mixed = self.mlp(self.pre_feedforward_layernorm(x))
        out: Tensor = x + self.post_feedforward_layernorm(mixed)
        return out


class Gemma(nn.Module):
    """The text model without its output head; module names are Hugging Face's."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.vocabulary, config.hidden
        # Given a weight it is not initialised, which on meta would import 800 modules in 2 s.
        self.embed_tokens = nn.Embedding(rows, columns, _weight=torch.empty(rows, columns))
        self.layers = nn.ModuleList(GemmaLayer(config) for _ in range(config.layers))
        self.norm = GemmaNorm(config.hidden, config)

    def states(self, ids: Tensor, first: int = 0) -> Iterator[Tensor]:
        """Yield layers + 1 hidden states (B, n, C), each a tensor of its own.

        ids: (B, n) int64, the real tokens only. The first state is the scaled embeddings, then
        the residual stream after each layer but the last, then the normalised output of the last.
        first: position of the first token. Any value is the same function; the official code pads
        to 1024 on the left, and its rounding (1e-5 on contexts) is met at 1024 - n.
        Raises ShapeError if an id has no embedding or there are no tokens.
        """
        return self.layer_states(self.embed(ids), first)

    def embed(self, ids: Tensor) -> Tensor:
        """Look up the scaled embeddings (B, n, C) of ids (B, n), where the table lies."""
        self._check(ids)
        table = next(iter(self.embed_tokens.state_dict().values()))
        x: Tensor = self.embed_tokens(ids.to(table.device))
        # Rounded to the embeddings' dtype as in training: in bf16 sqrt(3840) is 62, not 61.97.
        return x * float(torch.tensor(math.sqrt(self.config.hidden)).to(x.dtype))

    def layer_states(self, x: Tensor, first: int = 0) -> Iterator[Tensor]:
        """Yield the states that follow from scaled embeddings (B, n, C), these first."""
        return (states[0] for states in self.together([x], [first]))

    def together(self, prompts: Sequence[Tensor], firsts: Sequence[int]) -> Iterator[list[Tensor]]:
        """Yield the states of several prompts, layer by layer: each layer is needed only once.

        prompts: scaled embeddings (B, n, C), of different n.  firsts: see `states`.
        """
        device = self.norm.weight.device  # the table, 2 GB in bf16, may have stayed on the host
        states = [x.to(device) for x in prompts]
        sights = [self._sights(x, first) for x, first in zip(states, firsts, strict=True)]
        for number, layer in enumerate(self.layers):
            yield states
            kind = 1 if number in self.config.global_layers else 0
            states = [layer(x, sight[kind]) for x, sight in zip(states, sights, strict=True)]
        yield [self.norm(x) for x in states]

    def _check(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ShapeError(f"Gemma takes token ids (B, n) with n > 0, got {list(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocabulary:
            raise ShapeError(
                f"token ids {low} to {high}, but Gemma's embedding table has "
                f"{self.config.vocabulary} rows; the tokenizer belongs to another model"
            )

    def _sights(self, x: Tensor, first: int) -> tuple[Sight, Sight]:
        config, count = self.config, x.shape[1]
        positions = torch.arange(first, first + count, device=x.device)
        distance = positions[:, None] - positions
        band = (distance >= 0) & (distance < config.window)
        near = self._sight(positions, config.local_theta, 1.0)
        far = self._sight(positions, config.global_theta, config.global_factor)
        return Sight(near.queries, near.keys, band if count > config.window else None), far

    def _sight(self, positions: Tensor, theta: float, factor: float) -> Sight:
        config = self.config
        exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float()
        frequencies = 1.0 / theta ** (exponents / config.head_dim) / factor
        angles = (positions.float()[:, None] * frequencies)[None, :, None]  # (1, n, 1, D/2)
        cos, sin = angles.cos(), angles.sin()
        queries, keys = (
            Rope(cos.expand(-1, -1, heads, -1), sin.expand(-1, -1, heads, -1), "split")
            for heads in (config.heads, config.kv_heads)
        )
        return Sight(queries, keys, None)


RENAMES: tuple[tuple[str, str], ...] = ()
# llama.cpp names; norm weights there include the +1, so build with norm_offset=0.
GGUF_RENAMES = (
    (r"^token_embd\.", "embed_tokens."),
    (r"^output_norm\.", "norm."),
    (r"^blk\.", "layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.post_attention_norm\.", ".post_attention_layernorm."),
    (r"\.ffn_norm\.", ".pre_feedforward_layernorm."),
    (r"\.post_ffw_norm\.", ".post_feedforward_layernorm."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn_([qk])_norm\.", r".self_attn.\1_norm."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
)
IGNORED = (
    r"^(.*\.)?vision_(tower|model)\.",
    r"^(.*\.)?multi_modal_projector\.",
    r"^(.*\.)?lm_head\.",
    r"^(.*\.)?rotary_emb(_local)?\.inv_freq$",
    r"^spiece_model$",
    r"^(tokenizer_json|hf_asset__.*)$",
    r"^(output\.weight|rope_freqs\.weight)$",
)
# The norms are computed in fp32; 1 + w in bf16 would round the weights of a GGUF file.
FLOAT32 = (r"norm\.weight$",)
