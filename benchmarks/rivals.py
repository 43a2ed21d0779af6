"""The same transformer in other people's code, driven as their own pipelines drive it.

Every adapter takes the release format's `transformer` settings, weights under checkpoint names and
one pass, and returns a function that runs it. Nothing is taken from a rival: they are imported if
they are installed (`pip install -e .[rivals]`) and named as missing if they are not.
"""

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltxlite.models.passes import Pass, StreamInput

Weights = Mapping[str, Tensor]
Settings = Mapping[str, Any]
Run = Callable[[], dict[str, Tensor]]

INSTALL = "pip install -e .[rivals]"


@dataclass(frozen=True, slots=True)
class Rival:
    """Someone else's implementation: its name, what it needs and how to build it."""

    name: str
    modules: tuple[str, ...]
    build: Callable[[Settings, Weights, Pass], Run]

    def missing(self) -> str | None:
        """Say in one line why this rival cannot run here; None if it can."""
        hide_broken_torchaudio()
        for module in self.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                if error.name == module.partition(".")[0]:
                    return f"not installed: {INSTALL}"
                return f"installed but cannot be imported: {error}"
        return None


def hide_broken_torchaudio() -> None:
    """Let `import torchaudio` fail as if it were absent, if the installed one cannot be loaded.

    ltx-core brings it from PyPI, built for CUDA: beside a CPU torch its library does not load, and
    diffusers, which finds it installed, dies of that. No transformer needs it.
    """
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        sys.modules["torchaudio"] = None  # type: ignore[assignment]  # what the import system reads


def _given(pass_: Pass) -> tuple[StreamInput, StreamInput]:
    if pass_.video is None or pass_.audio is None:
        raise ValueError("rivals run passes of both streams")
    return pass_.video, pass_.audio


def _levels(stream: StreamInput) -> Tensor:
    """Noise levels as (B, 1), or (B, T) where tokens differ: the leanest form rivals accept."""
    return stream.timesteps.per_token()[..., 0]


def _ltx_core(settings: Settings, weights: Weights, pass_: Pass) -> Run:
    """Build ltx-core's LTXModel; its streams take unscaled levels and recompute RoPE each call."""
    from ltx_core.guidance.perturbations import BatchedPerturbationConfig, PerturbationConfig
    from ltx_core.model.transformer import LTXModelConfigurator, Modality

    with torch.device("meta"):
        model = LTXModelConfigurator.from_config({"transformer": dict(settings)})
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()
    video, audio = (
        Modality(
            latent=stream.latent,
            sigma=stream.sigma,
            timesteps=_levels(stream),
            positions=stream.positions,
            context=stream.context,
        )
        for stream in _given(pass_)
    )
    batch = video.latent.shape[0]
    nothing = BatchedPerturbationConfig([PerturbationConfig.empty()] * batch)

    def run() -> dict[str, Tensor]:
        velocities = model(video, audio, nothing)
        return dict(zip(("video", "audio"), velocities, strict=True))

    return run


# Checkpoint name -> diffusers name, in this order. Source: model.md 1.6.
_DIFFUSERS_NAMES = (
    (r"^(audio_)?patchify_proj\.", r"\1proj_in."),
    (r"^(audio_)?adaln_single\.", r"\1time_embed."),
    (r"^(audio_)?prompt_adaln_single\.", r"\1prompt_adaln."),
    (r"^av_ca_(video|audio)_scale_shift_adaln_single\.", r"av_cross_attn_\1_scale_shift."),
    (r"^av_ca_a2v_gate_adaln_single\.", "av_cross_attn_video_a2v_gate."),
    (r"^av_ca_v2a_gate_adaln_single\.", "av_cross_attn_audio_v2a_gate."),
    (r"\.scale_shift_table_a2v_ca_(video|audio)$", r".\1_a2v_cross_attn_scale_shift_table"),
    (r"\.q_norm\.", ".norm_q."),
    (r"\.k_norm\.", ".norm_k."),
)


def diffusers_name(name: str) -> str:
    """Translate a checkpoint's tensor name to that of diffusers' LTX2VideoTransformer3DModel."""
    for pattern, replacement in _DIFFUSERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _diffusers_settings(settings: Settings) -> dict[str, Any]:
    frames, height, width = settings["positional_embedding_max_pos"]
    gated, modulated = settings["apply_gated_attention"], settings["cross_attention_adaln"]
    same = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim")
    shared = (*same, "cross_attention_dim")
    names = [*shared, *(f"audio_{name}" for name in shared), "num_layers", "norm_eps", "rope_type"]
    return {
        **{name: settings[name] for name in names},
        "pos_embed_max_pos": frames,
        "base_height": height,
        "base_width": width,
        "audio_pos_embed_max_pos": settings["audio_positional_embedding_max_pos"][0],
        "gated_attn": gated,
        "audio_gated_attn": gated,
        "cross_attn_mod": modulated,
        "audio_cross_attn_mod": modulated,
        "use_prompt_embeddings": not settings["caption_proj_before_connector"],
        "rope_double_precision": settings["frequencies_precision"] == "float64",
        "rope_theta": settings["positional_embedding_theta"],
        "timestep_scale_multiplier": settings["timestep_scale_multiplier"],
        "cross_attn_timestep_scale_multiplier": settings["av_ca_timestep_scale_multiplier"],
    }


def _diffusers(settings: Settings, weights: Weights, pass_: Pass) -> Run:
    """Build diffusers' transformer; it takes scaled levels and is told the 2.3 cross rule.

    Its default attention backend is torch's scaled_dot_product_attention, like ours.
    """
    from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel

    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**_diffusers_settings(settings))
    renamed = {diffusers_name(name): value for name, value in weights.items()}
    model.load_state_dict(renamed, strict=True, assign=True)
    model.eval()
    video, audio = _given(pass_)
    scale = settings["timestep_scale_multiplier"]
    given = {
        "hidden_states": video.latent,
        "audio_hidden_states": audio.latent,
        "encoder_hidden_states": video.context,
        "audio_encoder_hidden_states": audio.context,
        "timestep": _levels(video) * scale,
        "audio_timestep": _levels(audio) * scale,
        "sigma": video.sigma * scale,
        "audio_sigma": audio.sigma * scale,
        "video_coords": video.positions,
        "audio_coords": audio.positions,
        "use_cross_timestep": True,
        "return_dict": False,
    }

    def run() -> dict[str, Tensor]:
        return dict(zip(("video", "audio"), model(**given), strict=True))

    return run


RIVALS = (
    Rival("diffusers", ("diffusers", "diffusers.models.transformers.transformer_ltx2"), _diffusers),
    Rival("ltx-core", ("ltx_core", "ltx_core.model.transformer"), _ltx_core),
)
