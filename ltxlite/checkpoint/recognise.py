"""Tells from a header alone which components a file holds; file names decide nothing.

Source: formats.md 1.1 and 1.13 (names as found in the files of Lightricks, Kijai, unsloth,
QuantStack, Wan2GP and Hugging Face).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_DIT = r"(?:model\.diffusion_model\.|diffusion_model\.|model\.model\.|net\.|transformer\.)"
_TEXT_MODEL = r"(?:language_model\.model\.|model\.language_model\.|model\.)"
_BARE_DIT = (
    r"(?:transformer_blocks\.|(?:audio_)?(?:prompt_)?adaln_single\.|(?:audio_)?patchify_proj\."
    r"|(?:audio_)?proj_out\.|(?:audio_)?caption_projection\.|av_ca_|(?:audio_)?scale_shift_table$"
    r"|keyframes_abs_pos_embedding)"
)


@dataclass(frozen=True, slots=True)
class Component:
    """One network, as its tensors are named in files.

    marker: a full name that proves the component is there.  claims: patterns of the names that
    belong to it; group 1 is the name that the network's own file knows.
    """

    name: str
    marker: str
    claims: tuple[str, ...]

    def strip(self, name: str) -> str | None:
        """Return a tensor's name without its prefix, or None if it is not this component's."""
        for pattern in self.claims:
            if match := re.match(pattern, name):
                return match[1]
        return None


COMPONENTS = (
    Component(
        "transformer",
        rf"{_DIT}?audio_adaln_single\.emb\.timestep_embedder\.linear_1\.weight",
        (rf"{_DIT}(?!(?:\w+_)?embeddings_connector\.)(.+)", rf"({_BARE_DIT}.*)"),
    ),
    Component(
        "video_connector",
        rf"{_DIT}?video_embeddings_connector\.learnable_registers",
        (rf"{_DIT}?video_embeddings_connector\.(.+)",),
    ),
    Component(
        "audio_connector",
        rf"{_DIT}?audio_embeddings_connector\.learnable_registers",
        (rf"{_DIT}?audio_embeddings_connector\.(.+)",),
    ),
    Component(
        "text_projection",
        r"(?:text_embedding_projection\.)?(?:video_)?aggregate_embed\.weight",
        (r"(?:text_embedding_projection\.)?((?:video_|audio_)?aggregate_embed\..+)",),
    ),
    Component(
        "video_encoder",
        r"(?:vae\.)?encoder\.down_blocks\.0\.res_blocks\.0\.conv1\.conv\.weight",
        (r"(?:vae\.)?encoder\.(.+)", r"(?:vae\.)?(per_channel_statistics\..+)"),
    ),
    Component(
        "video_decoder",
        r"(?:vae\.)?decoder\.up_blocks\.0\.res_blocks\.0\.conv1\.conv\.weight",
        (r"(?:vae\.)?decoder\.(.+)", r"(?:vae\.)?(per_channel_statistics\..+)"),
    ),
    Component(
        "audio_encoder",
        r"audio_vae\.encoder\.conv_in\.conv\.weight",
        (r"audio_vae\.encoder\.(.+)", r"audio_vae\.(per_channel_statistics\..+)"),
    ),
    Component(
        "audio_decoder",
        r"audio_vae\.decoder\.conv_in\.conv\.weight",
        (r"audio_vae\.decoder\.(.+)", r"audio_vae\.(per_channel_statistics\..+)"),
    ),
    Component(
        "vocoder",
        r"vocoder\.(?:vocoder\.)?conv_pre\.weight",
        (r"vocoder\.(.+)",),
    ),
    Component(
        "upscaler",
        r"initial_conv\.weight",
        (
            r"((?:initial_conv|initial_norm|res_blocks|upsampler|post_upsample_res_blocks"
            r"|final_conv)\..+)",
        ),
    ),
    Component(
        "text_encoder",
        rf"{_TEXT_MODEL}(?:layers\.0\.self_attn\.q_norm\.weight)|blk\.0\.attn_q_norm\.weight",
        (
            rf"{_TEXT_MODEL}((?:layers|embed_tokens|norm)\..+)",
            r"((?:blk\.\d+|token_embd|output_norm)\..+)",
        ),
    ),
    Component(
        "lora",
        r"(?:.+\.(?:lora_[AB](?:\.\w+)?|lora_down|lora_up|lora\.(?:down|up))\.weight"
        r"|(?:lora_unet|lora_transformer|lycoris)_.+"
        r"|.+\.(?:lokr_.+|hada_.+|oft_.+|diff|diff_b))",  # refused by name when read
        (r"(.+)",),
    ),
)
BY_NAME = {component.name: component for component in COMPONENTS}

# Recognised only to be refused or set aside by name; checked before "not an LTX file".
FOREIGN = (
    (r"decoder\.conv_in_x_t\.weight", "the LTX-2.5 diffusion video decoder"),
    (r"duration_head\.", "the LTX-2.5 duration head"),
    (r"encoder\.0\.weight|decoder\.1\.weight", "a tiny preview autoencoder (TAE)"),
    (r"time_embed\.emb\.", "LTX-Video without sound, as diffusers names it"),
    (r"v\.blk\.0\.|mm\.", "a Gemma vision projector (mmproj), not needed for prompts"),
    (rf"{_DIT}?adaln_single\.emb\.timestep_embedder\.linear_1\.weight", "LTX-Video without sound"),
)


def components_in(names: Iterable[str]) -> list[str]:
    """Return the names of the components whose marker is among the tensor names, in order."""
    found = set()
    for name in names:
        for component in COMPONENTS:
            if component.name not in found and re.fullmatch(component.marker, name):
                found.add(component.name)
    return [component.name for component in COMPONENTS if component.name in found]


def foreign(names: Iterable[str]) -> str | None:
    """Name what a file without any component probably is."""
    listed = list(names)
    for pattern, meaning in FOREIGN:
        if any(re.match(pattern, name) for name in listed):
            return meaning
    return None


def is_2_5(names: Iterable[str]) -> bool:
    """Tell whether a transformer, by its names without prefix, is that of LTX-2.5.

    It has the shapes of 2.3, but for the position of keyframes, which some files lack, and the
    biases of the picture's feed-forward; it was trained on another text encoder.
    """
    listed = set(names)
    biases = [f"transformer_blocks.0.{stream}ff.net.2.bias" in listed for stream in ("", "audio_")]
    return "keyframes_abs_pos_embedding" in listed or biases == [False, True]


# Companions of tensors that belong to nobody's network and are expected in files.
COMPANIONS = (
    r"spiece_model$",
    r"tokenizer_json$",
    r"hf_asset__",
    r"(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector)\.",
    r"lm_head\.",
    r"scaled_fp8$",
)


def unclaimed(names: Iterable[str], present: Iterable[str]) -> list[str]:
    """Return tensor names that belong to none of the `present` components and are no companion."""
    active = [BY_NAME[name] for name in present]
    return [
        name
        for name in names
        if all(component.strip(name) is None for component in active)
        and not any(re.match(pattern, name) for pattern in COMPANIONS)
    ]
