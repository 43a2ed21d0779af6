"""Hyper-parameters of the audio-video transformer: from a checkpoint's JSON or from its shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from ltxlite.errors import CheckpointError
from ltxlite.models.rope import Layout
from ltxlite.models.settings import Settings

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """One stream of the transformer: picture or sound."""

    channels: int
    out_channels: int
    heads: int
    head_dim: int
    context: int
    max_positions: tuple[int, ...]
    feed_forward_bias: bool = True

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """The whole network; the defaults are the constants of every released 2.x checkpoint.

    text_modulation: 2.3 modulates the text attention (9-row tables); 2.0 does not (6 rows).
    caption_channels: width of the contexts that 2.0 projects inside the transformer, else None.
    cross_modulation: "own": the audio-video attentions are scaled and shifted by their stream's
    own timesteps (official since 2026-05-28); "other": by the other stream's sigma (ltx-core
    1.0.0, diffusers 0.42). They agree where no token is masked. Sources: oracles 2.1.
    sound_alone: the network has no more than the sound stream's own layers; of a file's tensors
    these are a sixth.
    """

    video: StreamConfig
    audio: StreamConfig
    layers: int
    cross_width: int
    caption_channels: int | None = None
    gated: bool = True
    text_modulation: bool = True
    prompt_adaln: bool = True
    norm_eps: float = 1e-6
    theta: float = 10000.0
    rope_layout: Layout = "split"
    rope_float64: bool = True
    timestep_scale: float = 1000.0
    gate_scale: float = 1000.0
    cross_modulation: Literal["own", "other"] = "own"
    sound_alone: bool = False
    unread: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.video.heads != self.audio.heads:
            raise CheckpointError(
                f"transformer config: {self.video.heads} video heads and {self.audio.heads} audio "
                "heads; the audio-video attention needs equal numbers"
            )
        if self.cross_width != self.audio.width:
            raise CheckpointError(
                f"transformer config: audio_cross_attention_dim is {self.cross_width}, "
                f"the audio stream is {self.audio.width} wide; they must agree"
            )

    @property
    def table_rows(self) -> int:
        """Rows of a block's modulation table."""
        return 9 if self.text_modulation else 6

    @property
    def family(self) -> str:
        """The generation whose structure this is."""
        return "2.3" if self.text_modulation else "2.0"

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the `transformer` section of a checkpoint's configuration.

        Absent keys mean what the official code makes of them (model.md 1.2, last column), but for
        `av_ca_timestep_scale_multiplier`, `rope_type` and the grid's precision see there.
        Raises CheckpointError on values that are not implemented.
        """
        _refuse_unimplemented(settings)
        heads = settings.integer("num_attention_heads", 32)
        before = settings.flag("caption_proj_before_connector", False)
        modulated = settings.flag("cross_attention_adaln", False)
        captions = None if before else settings.integer("caption_channels")
        if before:
            settings.inert("caption_channels")
        video = StreamConfig(
            channels=settings.integer("in_channels", 128),
            out_channels=settings.integer("out_channels", 128),
            heads=heads,
            head_dim=settings.integer("attention_head_dim", 128),
            context=settings.integer("cross_attention_dim", 4096),
            max_positions=settings.integers("positional_embedding_max_pos", (20, 2048, 2048)),
            feed_forward_bias=settings.flag("ff_bias", True),
        )
        audio = StreamConfig(
            channels=settings.integer("audio_in_channels", 128),
            out_channels=settings.integer("audio_out_channels", 128),
            heads=settings.integer("audio_num_attention_heads", 32),
            head_dim=settings.integer("audio_attention_head_dim", 64),
            context=settings.integer("audio_cross_attention_dim", 2048),
            max_positions=settings.integers("audio_positional_embedding_max_pos", (20,)),
            feed_forward_bias=settings.flag("audio_ff_bias", True),
        )
        settings.expect("rope_type", "split", "interleaved")
        return cls(
            video=video,
            audio=audio,
            layers=settings.integer("num_layers", 48),
            cross_width=audio.context,
            caption_channels=captions,
            gated=settings.flag("apply_gated_attention", False),
            text_modulation=modulated,
            prompt_adaln=modulated and settings.flag("use_prompt_adaln_single", True),
            norm_eps=settings.number("norm_eps", 1e-6),
            theta=settings.number("positional_embedding_theta", 10000.0),
            rope_layout=settings.take("rope_type", "split"),
            rope_float64=settings.take("frequencies_precision", "float32") == "float64",
            timestep_scale=settings.number("timestep_scale_multiplier", 1000),
            gate_scale=settings.number("av_ca_timestep_scale_multiplier", 1),
            unread=tuple(settings.unread()),
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> Self:
        """Infer everything from tensor shapes (names without prefix) and the family constants.

        Source: formats.md 5.2 and 5.3. Widths are read from 1-D tensors, never quantized.
        """
        video = _stream_from_shapes(shapes, "")
        audio = _stream_from_shapes(shapes, "audio_")
        modulation = _size(shapes, "adaln_single.linear.bias") // video.width
        if modulation not in (6, 9):
            raise CheckpointError(
                f"adaln_single.linear has {modulation} rows a width; LTX-2.0 has 6, LTX-2.3 has 9"
            )
        captions = shapes.get("caption_projection.linear_1.weight")
        return cls(
            video=video,
            audio=audio,
            layers=_layer_count(shapes),
            cross_width=_size(shapes, "transformer_blocks.0.audio_to_video_attn.to_q.bias"),
            caption_channels=captions[1] if captions else None,
            gated="transformer_blocks.0.attn1.to_gate_logits.bias" in shapes,
            text_modulation=modulation == 9,
            prompt_adaln="prompt_adaln_single.linear.bias" in shapes,
        )


def _refuse_unimplemented(settings: Settings) -> None:
    settings.expect("activation_fn", "gelu-approximate")
    settings.expect("attention_bias", True)
    settings.expect("qk_norm", "rms_norm")
    settings.expect("standardization_norm", "rms_norm")
    settings.expect("positional_embedding_type", "rope")
    for key in ("use_middle_indices_grid", "causal_temporal_positioning", "av_cross_ada_norm"):
        settings.expect(key, True)
    settings.expect("use_audio_video_cross_attention", True)
    settings.expect("cross_attention_norm", True)
    settings.expect("norm_elementwise_affine", False)
    for key in (
        "share_ff",
        "double_self_attention",
        "only_cross_attention",
        "upcast_attention",
        "use_linear_projection",
        "caption_projection_first_linear",
        "caption_projection_second_linear",
        "caption_proj_input_norm",
        "use_keyframes_abs_pos_embedding",
    ):
        settings.expect(key, False)
    settings.inert("_class_name", "_diffusers_version", "attention_type", "dropout")
    settings.inert("num_embeds_ada_norm", "num_vector_embeds", "norm_num_groups")
    settings.inert("text_encoder_norm_type", "use_embeddings_connector")
    settings.inert(*(key for key in settings.unread() if "connector" in key))


def _size(shapes: Shapes, name: str) -> int:
    if name not in shapes:
        raise CheckpointError(f"{name} is missing; this is no LTX-2 audio-video transformer")
    return shapes[name][0]


def _stream_from_shapes(shapes: Shapes, prefix: str) -> StreamConfig:
    block = f"transformer_blocks.0.{prefix}"
    width = _size(shapes, f"{prefix}patchify_proj.bias")
    gate = shapes.get(f"{block}attn1.to_gate_logits.bias")
    heads = gate[0] if gate else 32  # ungated files name their heads nowhere; all have 32
    key = shapes.get(f"{block}attn2.to_k.weight", (width, width))
    return StreamConfig(
        channels=shapes[f"{prefix}patchify_proj.weight"][1],
        out_channels=_size(shapes, f"{prefix}proj_out.bias"),
        heads=heads,
        head_dim=width // heads,
        context=key[1],
        max_positions=(20,) if prefix else (20, 2048, 2048),
        feed_forward_bias=f"{block}ff.net.2.bias" in shapes,
    )


def _layer_count(shapes: Shapes) -> int:
    numbers = {
        int(match[1])
        for name in shapes
        if (match := re.match(r"transformer_blocks\.(\d{1,4})\.", name))
    }
    if numbers != set(range(len(numbers))):
        missing = sorted(set(range(max(numbers) + 1)) - numbers)
        raise CheckpointError(f"transformer blocks {missing[:5]} are missing; the file is damaged")
    return len(numbers)
