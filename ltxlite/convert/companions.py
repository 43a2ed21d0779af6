"""What a ComfyUI user needs beside a converted file, and in which of ComfyUI's folders.

Source: formats.md 1.5, 4.1 and 4.3.
"""

_NAMES = "tools of llama.cpp itself (llama-quantize) refuse the long tensor names; loaders do not"
_PARTS = {
    "text_projection": ("ltxlite reads it as --text-projection; ComfyUI wants it as safetensors",),
    "vae": ("ltxlite reads it as --vae; ComfyUI wants it as safetensors",),
    "audio_vae": ("ltxlite reads it as --audio-vae; ComfyUI wants it as safetensors",),
    "text_encoder": (
        "ComfyUI: this file goes to models/text_encoders; the vocabulary is inside, no mmproj is "
        "needed",
    ),
}
_TRANSFORMER = (
    "ComfyUI: this file goes to models/unet and needs ComfyUI-GGUF of January 2026 or newer",
    "beside it: Gemma 3 12B in models/text_encoders (Comfy-Org/ltx-2 gemma_3_12B_it, or a GGUF)",
)
_FAMILIES = {
    "2.3": (
        "the text projection in models/text_encoders "
        "(Kijai/LTX2.3_comfy text_encoders/ltx-2.3_text_projection_bf16.safetensors)",
        "the video VAE in models/vae (Kijai/LTX2.3_comfy vae/LTX23_video_vae_bf16.safetensors)",
        "the audio VAE in models/checkpoints "
        "(Kijai/LTX2.3_comfy vae/LTX23_audio_vae_bf16.safetensors)",
    ),
    "2.0": (
        "connectors and text projection of the same variant in models/text_encoders "
        "(Kijai/LTXV2_comfy text_encoders/ltx-2-19b-embeddings_connector_*_bf16.safetensors)",
        "the video VAE in models/vae (Kijai/LTXV2_comfy VAE/LTX2_video_vae_bf16.safetensors)",
        "the audio VAE in models/checkpoints "
        "(Kijai/LTXV2_comfy VAE/LTX2_audio_vae_bf16.safetensors)",
    ),
}


def companions(part: str, family: str | None) -> tuple[str, ...]:
    """Return lines of advice on using a converted part."""
    if family is None:
        return _PARTS[part]
    return (*_TRANSFORMER, *_FAMILIES[family], _NAMES)
