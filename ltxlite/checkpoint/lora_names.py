"""The spellings of LoRA files: which layer and which factor a tensor's name means.

Known are official, trainer's and ComfyUI's names; diffusers' and PEFT's; kohya's and musubi's, with
underscores for dots. Only names of the model's own layers are ever matched, nothing is guessed.
Source: model.md 1.6 and 6, formats.md 1.9; musubi-tuner (AkaneTendo25), convert_lora_to_comfy.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ltxlite.errors import CheckpointError

Role = Literal["a", "b", "alpha"]
Spelling = Literal["official", "diffusers", "kohya", "bare"]

_PREFIX = re.compile(
    r"^(?:base_model\.model\.)?"
    r"(?:(?P<official>(?:model\.)?diffusion_model\.)|(?P<diffusers>transformer\.|connectors\.)"
    r"|(?P<kohya>(?:lora_unet_|lora_transformer_|lycoris_)(?:(?:model_)?diffusion_model_|model_)?)"
    r"|model\.(?=transformer_blocks\.))?"
)
_FACTOR = re.compile(
    r"^(?P<module>.+?)\.(?:lora_(?:(?P<a>A|down)|B|up)|lora\.(?:(?P<a2>down)|up))(?:\.\w+)?\.weight$"
)
_ALPHA = re.compile(r"^(?P<module>.+?)\.alpha$")
_REFUSED = (
    (re.compile(r"dora_scale|lora_magnitude|\.magnitude"), "DoRA (magnitudes beside the factors)"),
    (re.compile(r"\.lokr_"), "LoKr (Kronecker products)"),
    (re.compile(r"\.hada_|\.loha_"), "LoHa (Hadamard products)"),
    (re.compile(r"\.(?:b?oft_|oft_blocks)"), "OFT (rotations)"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA"),
    (re.compile(r"\.lora_mid\."), "LoCon (three factors)"),
    (re.compile(r"\.(?:diff|diff_b|set_weight)$"), "full differences (.diff)"),
    (re.compile(r"\.lora_[AB](?:\.\w+)?\.bias$|\.bias$"), "biases"),
)
# First parts of names, diffusers' and those of the release; inside blocks both agree.
_DIFFUSERS = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "video_connector": "video_embeddings_connector",
    "audio_connector": "audio_embeddings_connector",
    "text_proj_in": "text_embedding_projection.aggregate_embed",
    "video_text_proj_in": "text_embedding_projection.video_aggregate_embed",
    "audio_text_proj_in": "text_embedding_projection.audio_aggregate_embed",
    "embeddings_connector": "video_embeddings_connector",  # the release before there was sound
}
_RELEASED = {theirs: name for name, theirs in _DIFFUSERS.items()}


@dataclass(frozen=True, slots=True)
class LoraName:
    """What a tensor's name says: layer, as the release spells it where that is known, and role.

    Layers of kohya's files keep their underscores; `ModuleNames` finds what they stand for.
    """

    module: str
    role: Role
    spelling: Spelling


def read_name(name: str, where: str) -> LoraName:
    """Read the name of a tensor of a LoRA file.

    Raises CheckpointError naming the kind where a file is no plain LoRA (DoRA, LoKr, ...).
    """
    for pattern, kind in _REFUSED:
        if pattern.search(name):
            raise CheckpointError(
                f"{where}: this file holds {kind}, see {name}; ltxlite applies plain LoRA factors "
                "only, ask its author for such a file"
            )
    if match := _FACTOR.match(name):
        role: Role = "a" if match["a"] or match["a2"] else "b"
    elif match := _ALPHA.match(name):
        role = "alpha"
    else:
        raise CheckpointError(f"{where}: {name} is no LoRA factor that ltxlite knows")
    module, spelling = _module(match["module"])
    return LoraName(module, role, spelling)


def released_name(module: str) -> str:
    """Turn a layer's diffusers name into that of the release; others stay as they are."""
    first, dot, rest = module.partition(".")
    known = _DIFFUSERS.get(first)
    if known is None:
        return module
    if known.endswith("_connector"):
        rest = re.sub(r"^transformer_blocks\.", "transformer_1d_blocks.", rest)
    return known + dot + rest


class ModuleNames:
    """The layers of a model by every name under which LoRA files know them.

    known: a value for each layer, by its name in the release without prefix.
    """

    def __init__(self, known: Mapping[str, str]) -> None:
        self._known = dict(known)
        flat: dict[str, set[str]] = {}
        for name, target in known.items():
            for spelled in (name, _diffusers_name(name)):
                flat.setdefault(_flat(spelled), set()).add(target)
        self._flat = {name: found.pop() for name, found in flat.items() if len(found) == 1}

    def find(self, module: str) -> str | None:
        """Return the value of the layer that a LoRA file means, or None."""
        for name in (module, f"{module}.0"):  # some trainers write to_out for to_out.0
            if name in self._known:
                return self._known[name]
        if "." in module:
            return None
        for name in (module, f"{module}_0", f"video_{module}"):
            if name in self._flat:
                return self._flat[name]
        return None


def _module(spelled: str) -> tuple[str, Spelling]:
    match = _PREFIX.match(spelled)
    assert match is not None  # every part of it is optional
    rest = spelled[match.end() :]
    if match["kohya"] is not None:
        return rest, "kohya"
    released = released_name(rest)
    if match["diffusers"] is not None or released != rest:
        return released, "diffusers"
    return rest, "official" if match["official"] is not None else "bare"


def _diffusers_name(name: str) -> str:
    first, dot, rest = name.partition(".")
    return _RELEASED.get(first, first) + dot + rest


def _flat(name: str) -> str:
    return name.replace(".", "_")
