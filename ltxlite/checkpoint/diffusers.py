"""A transformer and connectors as the diffusers library saves them: other names, another JSON.

Nothing but spelling differs, so that names and configuration are turned into official ones when
the file is opened, and no other module knows. Source: model.md 1.6; formats.md 5.1; diffusers
0.42.1, LTX2VideoTransformer3DModel and LTX2TextConnectors.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ltxlite.errors import CheckpointError

# Names that prove the spelling: of a transformer with sound, of connectors, of a projection.
_MARKERS = re.compile(
    r"(?:audio_time_embed\.emb\.timestep_embedder\.linear_1\.weight"
    r"|(?:video|audio)_connector\.learnable_registers|(?:video_)?text_proj_in\.weight)"
)
# Diffusers' names and the official ones, without prefix, in the order of rewriting.
NAMES = (
    (r"^(audio_)?proj_in\.", r"\1patchify_proj."),
    (r"^(audio_)?time_embed\.", r"\1adaln_single."),
    (r"^(audio_)?prompt_adaln\.", r"\1prompt_adaln_single."),
    (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
    (r"^av_cross_attn_(?:video|audio)_(a2v|v2a)_gate\.", r"av_ca_\1_gate_adaln_single."),
    (r"\.(video|audio)_a2v_cross_attn_scale_shift_table$", r".scale_shift_table_a2v_ca_\1"),
    (r"\.norm_([qk])\.", r".\1_norm."),
    (r"^(video|audio)_connector\.transformer_blocks\.", r"\1_connector.transformer_1d_blocks."),
    (r"^(video|audio)_connector\.", r"\1_embeddings_connector."),
    (r"^(video_|audio_)?text_proj_in\.", r"text_embedding_projection.\1aggregate_embed."),
)

_TRANSFORMER = "LTX2VideoTransformer3DModel"
_CONNECTORS = "LTX2TextConnectors"
# The library's keys and ours; what it leaves out of the file means, if that is not our default too.
_KEYS: Mapping[str, Mapping[str, tuple[str, Any]]] = {
    _TRANSFORMER: {
        "cross_attn_mod": ("cross_attention_adaln", False),
        "gated_attn": ("apply_gated_attention", False),
        "rope_theta": ("positional_embedding_theta", 10000.0),
        "rope_type": ("rope_type", "interleaved"),
        "caption_channels": ("caption_channels", 3840),
        "cross_attn_timestep_scale_multiplier": ("av_ca_timestep_scale_multiplier", 1000),
    },
    _CONNECTORS: {
        "video_connector_num_attention_heads": ("connector_num_attention_heads", 30),
        "video_connector_attention_head_dim": ("connector_attention_head_dim", 128),
        "video_connector_num_layers": ("connector_num_layers", 2),
        "audio_connector_num_attention_heads": ("audio_connector_num_attention_heads", 30),
        "audio_connector_attention_head_dim": ("audio_connector_attention_head_dim", 128),
        "audio_connector_num_layers": ("audio_connector_num_layers", 2),
        "video_gated_attn": ("connector_apply_gated_attention", False),
        "rope_type": ("rope_type", "interleaved"),
    },
}
# Keys that our networks have no choice in: the value that is implemented.
_FIXED: Mapping[str, Mapping[str, Any]] = {
    _TRANSFORMER: {
        "patch_size": 1,
        "patch_size_t": 1,
        "vae_scale_factors": [8, 32, 32],
        "causal_offset": 1,
        "audio_patch_size": 1,
        "audio_patch_size_t": 1,
        "audio_scale_factor": 4,
        "audio_sampling_rate": 16000,
        "audio_hop_length": 160,
        "attention_out_bias": True,
        "qk_norm": "rms_norm_across_heads",
    },
    _CONNECTORS: {"rope_theta": 10000.0, "causal_temporal_positioning": False},
}
# Keys that must say of sound what another says of the picture.
_EQUAL: Mapping[str, Mapping[str, str]] = {
    _TRANSFORMER: {"audio_gated_attn": "gated_attn", "audio_cross_attn_mod": "cross_attn_mod"},
    _CONNECTORS: {"audio_gated_attn": "video_gated_attn"},
}
# Keys of the library's own, of training, or of what tensors show.
_UNUSED = re.compile(
    r"^_|^perturbed_attn$|registers$|_hidden_dim$|^(caption_channels|text_proj_in_factor|proj_bias)$"
)


def is_diffusers(names: Iterable[str]) -> bool:
    """Tell whether tensor names are those of diffusers."""
    return any(_MARKERS.fullmatch(name) for name in names)


def official_name(name: str) -> str:
    """Turn a name of diffusers into the official one, without prefix; others stay."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def official_config(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Turn the JSON that diffusers keeps beside a model into the official configuration.

    Returns None if it describes something else.  Raises CheckpointError for values that ltxlite
    does not implement.  Unknown keys are kept, so that they are told like those of other files.
    """
    kind = str(config.get("_class_name"))
    if kind not in _KEYS:
        return None
    _refuse_others(kind, config, where)
    keys = _KEYS[kind]
    handled = {*keys, *_FIXED[kind], *_EQUAL[kind]}
    section = {
        name: value
        for name, value in config.items()
        if value is not None and name not in handled and not _UNUSED.search(name)
    }
    section |= {ours: config.get(theirs, default) for theirs, (ours, default) in keys.items()}
    precise = section.pop("rope_double_precision", True)
    section["frequencies_precision"] = "float64" if precise is True else "float32"
    rest = _of_transformer(section) if kind == _TRANSFORMER else _of_connectors(section)
    return {"transformer": rest}


def _of_transformer(section: dict[str, Any]) -> dict[str, Any]:
    edges = ("pos_embed_max_pos", 20), ("base_height", 2048), ("base_width", 2048)
    section["positional_embedding_max_pos"] = [section.pop(name, size) for name, size in edges]
    longest = section.pop("audio_pos_embed_max_pos", 20)
    section["audio_positional_embedding_max_pos"] = [longest]
    section["caption_proj_before_connector"] = not section.pop("use_prompt_embeddings", True)
    if section["caption_proj_before_connector"]:
        del section["caption_channels"]
    return section


def _of_connectors(section: dict[str, Any]) -> dict[str, Any]:
    longest = section.pop("connector_rope_base_seq_len", 4096)
    section["connector_positional_embedding_max_pos"] = [longest]
    section["caption_proj_before_connector"] = section.pop("per_modality_projections", False)
    return section


def _refuse_others(kind: str, config: Mapping[str, Any], where: str) -> None:
    wanted = dict(_FIXED[kind])
    wanted |= {name: config.get(other, False) for name, other in _EQUAL[kind].items()}
    for name, value in wanted.items():
        found = config.get(name, value)
        if found != value:
            raise CheckpointError(f"{where}: {name} is {found!r:.80}, ltxlite implements {value!r}")
