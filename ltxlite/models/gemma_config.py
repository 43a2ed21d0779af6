"""Hyper-parameters of Gemma 3: from a Hugging Face config.json or from tensor shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from ltxlite.errors import CheckpointError
from ltxlite.models.settings import Settings

Shapes = Mapping[str, tuple[int, ...]]

_OTHER_SIZES = {1152: "1B", 2560: "4B", 5376: "27B"}


@dataclass(frozen=True, slots=True)
class GemmaConfig:
    """Hyper-parameters; the defaults are those of gemma-3-12b-it, the only released encoder.

    global_layers: numbers of the layers that see the whole prompt; the others see `window` tokens.
    global_factor: divides the rotary frequencies of global layers.
    query_scalar: attention scores are divided by its square root.
    norm_offset: added to every norm weight; 1 as trained, 0 in GGUF files, which store w + 1.
    """

    hidden: int = 3840
    layers: int = 48
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 256
    inner: int = 15360
    vocabulary: int = 262208
    global_layers: tuple[int, ...] = tuple(range(5, 48, 6))
    window: int = 1024
    global_theta: float = 1e6
    global_factor: float = 8.0
    local_theta: float = 1e4
    query_scalar: float = 256.0
    eps: float = 1e-6
    norm_offset: float = 1.0
    unread: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if size := _OTHER_SIZES.get(self.hidden):
            raise CheckpointError(
                f"this is Gemma 3 {size} (hidden size {self.hidden}); LTX-2 needs the 12B, "
                "hidden size 3840: google/gemma-3-12b-it-qat-q4_0-unquantized"
            )
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise CheckpointError(
                f"Gemma config: {self.heads} heads, {self.kv_heads} key-value heads of width "
                f"{self.head_dim}; the first must be a multiple of the second, the width even"
            )
        if min(self.global_factor, self.global_theta, self.local_theta, self.query_scalar) <= 0:
            raise CheckpointError("Gemma config: rotary and attention scales must be positive")

    @property
    def states(self) -> int:
        """Hidden states that the text projection reads: the embeddings' and one per layer."""
        return self.layers + 1

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read a Hugging Face config.json: its `text_config` section, or the same keys flat.

        Old (rope_theta, rope_local_base_freq, rope_scaling) and new (rope_parameters) spellings
        are read; absent keys mean what transformers makes of them.
        Raises CheckpointError on values that are not implemented and on other sizes of Gemma 3.
        """
        text = settings.section("text_config") if settings.has("text_config") else settings
        _refuse_unimplemented(text)
        layers = text.integer("num_hidden_layers")
        theta, factor, local_theta = _rotations(text)
        return cls(
            hidden=text.integer("hidden_size"),
            layers=layers,
            heads=text.integer("num_attention_heads"),
            kv_heads=text.integer("num_key_value_heads"),
            head_dim=text.integer("head_dim", 256),
            inner=text.integer("intermediate_size"),
            vocabulary=text.integer("vocab_size", 262208),
            global_layers=_global_layers(text, layers),
            window=text.integer("sliding_window", 4096),
            global_theta=theta,
            global_factor=factor,
            local_theta=local_theta,
            query_scalar=text.number("query_pre_attn_scalar", 256),
            eps=text.number("rms_norm_eps", 1e-6),
            unread=tuple(text.unread()),
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes, norm_offset: float = 1.0) -> Self:
        """Infer sizes from tensor shapes (names without prefix) and take the 12B's constants.

        Source: formats.md 1.11. Raises CheckpointError if this is no Gemma 3 or another size.
        """
        layers = _layer_count(shapes)
        head_dim = _rows(shapes, "layers.0.self_attn.q_norm.weight")
        return cls(
            hidden=_rows(shapes, "norm.weight"),
            layers=layers,
            heads=_rows(shapes, "layers.0.self_attn.q_proj.weight") // head_dim,
            kv_heads=_rows(shapes, "layers.0.self_attn.k_proj.weight") // head_dim,
            head_dim=head_dim,
            inner=_rows(shapes, "layers.0.mlp.gate_proj.weight"),
            vocabulary=_rows(shapes, "embed_tokens.weight"),
            global_layers=tuple(range(5, layers, 6)),
            query_scalar=head_dim,
            norm_offset=norm_offset,
        )


def _refuse_unimplemented(text: Settings) -> None:
    text.expect("model_type", "gemma3_text", "gemma3")
    text.expect("attention_bias", False)
    text.expect("attn_logit_softcapping", None)
    text.expect("final_logit_softcapping", None)
    text.expect("hidden_activation", "gelu_pytorch_tanh")
    text.expect("use_bidirectional_attention", False, None)
    text.inert("architectures", "attention_dropout", "cache_implementation", "initializer_range")
    text.inert("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache")
    text.inert("dtype", "torch_dtype", "max_position_embeddings", "transformers_version")


def _rotations(text: Settings) -> tuple[float, float, float]:
    """Return theta and factor of global layers and theta of local ones."""
    if text.take("rope_parameters", None) is not None:
        text.inert("rope_scaling", "rope_theta", "rope_local_base_freq")
        both = text.section("rope_parameters")
        whole, local = both.section("full_attention"), both.section("sliding_attention")
        local.expect("rope_type", "default")
        return whole.number("rope_theta", 1e6), _factor(whole), local.number("rope_theta", 1e4)
    theta, local_theta = text.number("rope_theta", 1e6), text.number("rope_local_base_freq", 1e4)
    if text.take("rope_scaling", None) is None:
        return theta, 1.0, local_theta
    return theta, _factor(text.section("rope_scaling")), local_theta


def _factor(rope: Settings) -> float:
    rope.expect("rope_type", "linear", "default")
    rope.expect("type", "linear", "default")
    return rope.number("factor", 1.0)


def _global_layers(text: Settings, layers: int) -> tuple[int, ...]:
    old = text.take("_sliding_window_pattern", None) or 6
    pattern = text.integer("sliding_window_pattern", old)
    kinds = text.take("layer_types", None)
    if kinds is None:
        return tuple(range(pattern - 1, layers, pattern))
    known = isinstance(kinds, list) and all(
        kind in ("full_attention", "sliding_attention") for kind in kinds
    )
    if not known or len(kinds) != layers:
        raise CheckpointError(
            f"{text.where}.layer_types is {kinds!r:.200}; ltxlite implements a list of "
            f"{layers} names, each full_attention or sliding_attention"
        )
    return tuple(number for number, kind in enumerate(kinds) if kind == "full_attention")


def _rows(shapes: Shapes, name: str) -> int:
    if not shapes.get(name):
        raise CheckpointError(f"{name} is missing; this is no Gemma 3 text encoder")
    return shapes[name][0]


def _layer_count(shapes: Shapes) -> int:
    if any(name.endswith("layer_scalar") for name in shapes):
        raise CheckpointError("this is Gemma 4, made for LTX-2.5; LTX-2.0 and 2.3 need Gemma 3 12B")
    found = (re.match(r"layers\.(\d{1,4})\.", name) for name in shapes)
    numbers = {int(match[1]) for match in found if match}
    if not numbers:
        raise CheckpointError("no tensor is called layers.0...; this is no Gemma 3 text encoder")
    if missing := sorted(set(range(max(numbers))) - numbers):
        raise CheckpointError(f"Gemma layers {missing[:5]} are missing; the file is damaged")
    return len(numbers)
