"""The configuration that a file without any would have had: shapes, and its family's constants.

ltxlite needs none, but ComfyUI takes a file of LTX-2.3 without `config` for LTX-2.0 and fails.
Source: formats.md 4.1, 5.2 and 5.3; model.md 1.2.
"""

from typing import Any

from ltxlite.models.connector import ConnectorConfig
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.networks import Networks

# What the released files of all families say and no network of ours has a choice in.
_SAME: dict[str, Any] = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "av_cross_ada_norm": True,
    "causal_temporal_positioning": True,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_embeddings_connector": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
    "connector_norm_output": True,
}
# What 2.3 adds: the text projection stands before the connectors.
_OF_2_3: dict[str, Any] = {
    "caption_proj_before_connector": True,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "connector_learnable_registers_std": 1,
    "text_encoder_norm_type": "per_token_rms",
}
_CAPTIONS = 3840  # the width of Gemma 3 12B, which 2.3 names and does not use
_REGISTERS = 128


def configuration(networks: Networks, component: str) -> tuple[dict[str, Any] | None, bool]:
    """Return the JSON configuration for a converted part, and whether it had to be inferred.

    What diffusers keeps beside a transformer says nothing of connectors, so that it does not do.
    Only a transformer's can be inferred; of other parts None is returned.
    """
    files = networks.files
    for model in (files.find(component), *files.models):
        if model is not None and (config := model.config()) is not None:
            return config, False
    if component != "transformer":
        return None, False
    video, audio = (
        networks.connector_config(sound) if files.find(name) is not None else None
        for name, sound in (("video_connector", False), ("audio_connector", True))
    )
    return inferred_config(networks.transformer_config(), video, audio), True


def inferred_config(
    transformer: TransformerConfig,
    video: ConnectorConfig | None = None,
    audio: ConnectorConfig | None = None,
) -> dict[str, Any]:
    """Return the official JSON configuration of a transformer, its connectors included.

    It holds the section `transformer` only; read back, it gives the same hyper-parameters.
    """
    section = _SAME | _structure(transformer)
    if transformer.caption_channels is None:
        section |= _OF_2_3 | {"caption_channels": _CAPTIONS}
    if video is not None:
        section |= _connectors(video, audio or video)
    return {"transformer": dict(sorted(section.items()))}


def _structure(config: TransformerConfig) -> dict[str, Any]:
    video, audio = config.video, config.audio
    found: dict[str, Any] = {
        "num_layers": config.layers,
        "in_channels": video.channels,
        "out_channels": video.out_channels,
        "num_attention_heads": video.heads,
        "attention_head_dim": video.head_dim,
        "cross_attention_dim": video.context,
        "positional_embedding_max_pos": list(video.max_positions),
        "audio_in_channels": audio.channels,
        "audio_out_channels": audio.out_channels,
        "audio_num_attention_heads": audio.heads,
        "audio_attention_head_dim": audio.head_dim,
        "audio_cross_attention_dim": audio.context,
        "audio_positional_embedding_max_pos": list(audio.max_positions),
        "norm_eps": config.norm_eps,
        "positional_embedding_theta": config.theta,
        "rope_type": config.rope_layout,
        "frequencies_precision": "float64" if config.rope_float64 else "float32",
        "timestep_scale_multiplier": config.timestep_scale,
        "av_ca_timestep_scale_multiplier": config.gate_scale,
        "caption_channels": config.caption_channels,
    }
    return found | _departures(config)


def _departures(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys that the releases write only where they differ from the code's defaults."""
    found: dict[str, Any] = {}
    if config.gated:
        found["apply_gated_attention"] = True
    if config.text_modulation:
        found["cross_attention_adaln"] = True
    if config.text_modulation and not config.prompt_adaln:
        found["use_prompt_adaln_single"] = False
    for prefix, stream in (("", config.video), ("audio_", config.audio)):
        if not stream.feed_forward_bias:
            found[f"{prefix}ff_bias"] = False
    return found


def _connectors(video: ConnectorConfig, audio: ConnectorConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "connector_num_attention_heads": video.heads,
        "connector_attention_head_dim": video.head_dim,
        "connector_num_layers": video.layers,
        "connector_num_learnable_registers": _REGISTERS,
        "connector_positional_embedding_max_pos": [video.max_position],
    }
    if video.gated:
        found["connector_apply_gated_attention"] = True
    if not video.feed_forward_bias:
        found["connector_ff_bias"] = False
    same = (audio.heads, audio.head_dim) == (video.heads, video.head_dim)
    if not same:
        found["audio_connector_num_attention_heads"] = audio.heads
        found["audio_connector_attention_head_dim"] = audio.head_dim
    if audio.layers != video.layers:
        found["audio_connector_num_layers"] = audio.layers
    return found
