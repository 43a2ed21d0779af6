"""The published parts of formats.md 1.5 to 1.10 that are no transformer: headers as data."""

import re

import release_files as made
from release_files import Shapes, Typed, prefixed, typed
from release_forms import AUDIO, BOTH, REAL, VIDEO, Form, form


def of_release(words: str, prefix: str = "") -> Typed:
    """Return the release's tensors under some prefixes, one of which is cut off."""
    return typed(
        {
            name.removeprefix(prefix): shape
            for name, shape in REAL.items()
            if name.startswith(tuple(words.split()))
        }
    )


def upscaler(width: int, upsampler: Shapes) -> Form:
    return form(lambda: typed(made.upscaler(width, upsampler)), "upscaler")


def lora(prefix: str, a: str, b: str) -> Typed:
    layer = f"{prefix}transformer_blocks.0.attn1.to_q"
    return {f"{layer}.{a}": ("BF16", (384, 4096)), f"{layer}.{b}": ("BF16", (4096, 384))}


def kohya() -> Typed:
    """Return a LoRA whose names have lost their dots."""
    tensors: Typed = {}
    for module in ("transformer_blocks_0_attn1_to_q", "transformer_blocks_47_audio_attn1_to_out_0"):
        width = 2048 if "audio" in module else 4096
        name = f"lora_unet_{module}"
        tensors[f"{name}.lora_down.weight"] = ("BF16", (32, width))
        tensors[f"{name}.lora_up.weight"] = ("BF16", (width, 32))
        tensors[f"{name}.alpha"] = ("BF16", ())
    return tensors


# Into what diffusers' converter turns official names, one after the other.
# Source: diffusers 0.42.1, the modules of LTX2VideoTransformer3DModel and LTX2TextConnectors.
TO_DIFFUSERS = (
    (r"patchify_proj\.", "proj_in."),
    (r"av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    (r"av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    (r"av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    (r"av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    (r"prompt_adaln_single", "prompt_adaln"),
    (r"adaln_single", "time_embed"),
    (r"scale_shift_table_a2v_ca_(video|audio)", r"\1_a2v_cross_attn_scale_shift_table"),
    (r"([qk])_norm", r"norm_\1"),
    (r"_embeddings_connector", "_connector"),
    (r"transformer_1d_blocks", "transformer_blocks"),
    (r"text_embedding_projection\.(\w*)aggregate_embed", r"\1text_proj_in"),
)


def diffusers_name(name: str) -> str:
    """Return an official name, without prefix, as diffusers spells it."""
    for pattern, replacement in TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name


def in_diffusers(shapes: Shapes) -> Typed:
    return typed({diffusers_name(name): shape for name, shape in shapes.items()})


FORMS: dict[str, Form] = {
    "Kijai projection": form(
        lambda: typed(made.projection("2.3")), "text_projection", gigabytes=2.312
    ),
    "projection in fp8": form(
        lambda: typed(made.projection("2.3"), "F8_E4M3"), "text_projection", gigabytes=1.16
    ),
    "Kijai video VAE": form(lambda: of_release("vae.", "vae."), *VIDEO, gigabytes=1.452),
    "Kijai audio VAE": form(
        lambda: of_release("audio_vae. vocoder."), *AUDIO, "vocoder", gigabytes=0.365
    ),
    "2.0 connectors with projection": form(
        lambda: typed(prefixed(made.connectors("2.0")) | made.projection("2.0")),
        *BOTH,
        "text_projection",
        gigabytes=2.86,
    ),
    # Wan2GP: sizes of its files, which agree with official prefixes in their headers.
    "Wan2GP connectors": form(
        lambda: typed(prefixed(made.connectors("2.3"))), *BOTH, gigabytes=4.0324
    ),
    "Wan2GP connectors without prefix": form(lambda: typed(made.connectors("2.3")), *BOTH),
    "Wan2GP video VAE": form(lambda: of_release("vae."), *VIDEO, gigabytes=1.4523),
    "Wan2GP audio VAE": form(lambda: of_release("audio_vae."), *AUDIO, gigabytes=0.10654),
    "Wan2GP vocoder": form(lambda: of_release("vocoder."), "vocoder", gigabytes=0.25835),
    "official LoRA": form(lora("diffusion_model.", "lora_A.weight", "lora_B.weight"), "lora"),
    "LoRA with down and up": form(lora("", "lora_down.weight", "lora_up.weight"), "lora"),
    "trainer's LoRA": form(
        lora("transformer.", "lora_A.default.weight", "lora_B.default.weight"), "lora"
    ),
    "kohya LoRA": form(kohya, "lora"),
    "diffusers transformer": form(
        lambda: in_diffusers(made.dit("2.3")), "transformer", family="2.3", gigabytes=37.98
    ),
    "diffusers transformer of 2.0": form(
        lambda: in_diffusers(made.dit("2.0")), "transformer", family="2.0", gigabytes=37.75
    ),
    "diffusers connectors": form(
        lambda: in_diffusers(made.connectors("2.3") | made.projection("2.3")),
        *BOTH,
        "text_projection",
    ),
    "diffusers connectors of 2.0": form(
        lambda: in_diffusers(made.connectors("2.0") | made.projection("2.0")),
        *BOTH,
        "text_projection",
    ),
}
# Formats.md 1.10: what the upsampler is, its file in GB, and what we call it.
UPSCALERS: dict[str, tuple[Form, float, str]] = {
    "x2": (upscaler(1024, {"upsampler.0.weight": (4096, 1024, 3, 3)}), 0.996, "x2"),
    "temporal": (upscaler(512, {"upsampler.0.weight": (1024, 512, 3, 3, 3)}), 0.262, "temporal x2"),
    "x1.5": (
        upscaler(
            1024,
            {"upsampler.conv.weight": (9216, 1024, 3, 3), "upsampler.conv.bias": (9216,)}
            | {"upsampler.blur_down.kernel": (1, 1, 5, 5)},
        ),
        1.09,
        "x1.5",
    ),
}
