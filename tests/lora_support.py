"""LoRA files made for tests, and the modules they are for."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ltxlite.checkpoint.assemble import Naming
from ltxlite.checkpoint.lora import (
    Lora,
    open_lora,
    read_lora,
)
from ltxlite.models.transformer import RENAMES
from ltxlite.release import release_name

NAMING = Naming(RENAMES)
QUERY = "transformer_blocks.0.attn1.to_q"
Tensors = dict[str, Tensor]
# Diffusers' names of layers outside the blocks, from its converter (model.md 1.6).
DIFFUSERS = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single.linear": "time_embed.linear",
    "audio_adaln_single.emb.timestep_embedder.linear_1": (
        "audio_time_embed.emb.timestep_embedder.linear_1"
    ),
    "prompt_adaln_single.linear": "prompt_adaln.linear",
    "audio_prompt_adaln_single.linear": "audio_prompt_adaln.linear",
    "av_ca_video_scale_shift_adaln_single.linear": "av_cross_attn_video_scale_shift.linear",
    "av_ca_audio_scale_shift_adaln_single.linear": "av_cross_attn_audio_scale_shift.linear",
    "av_ca_a2v_gate_adaln_single.linear": "av_cross_attn_video_a2v_gate.linear",
    "av_ca_v2a_gate_adaln_single.linear": "av_cross_attn_audio_v2a_gate.linear",
    "proj_out": "proj_out",
    "audio_proj_out": "audio_proj_out",
}


def official(name: str) -> str:
    """Return a module's name in release files, without prefix."""
    full = release_name("transformer", f"{name}.weight")
    return full.removeprefix("model.diffusion_model.").removesuffix(".weight")


def written(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Lora:
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, metadata)
    return read_lora(open_lora(path))


def factors(
    name: str, linear: nn.Linear, rank: int = 3, form: str = "{}.lora_{}.weight"
) -> Tensors:
    made = torch.Generator().manual_seed(len(name))
    sides = (torch.randn(rank, linear.in_features, generator=made), "A")
    other = (torch.randn(linear.out_features, rank, generator=made), "B")
    return {form.format(name, side): value for value, side in (sides, other)}


def downs(name: str, linear: nn.Linear, rank: int = 3) -> Tensors:
    pair = factors(name, linear, rank)
    a, b = pair[f"{name}.lora_A.weight"], pair[f"{name}.lora_B.weight"]
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}


def kohya(name: str) -> str:
    return official(name).replace(".", "_")


def pair(a: Tensor, b: Tensor, name: str = f"diffusion_model.{QUERY}") -> Tensors:
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


ONES = pair(torch.ones(2, 64), torch.ones(64, 2))
