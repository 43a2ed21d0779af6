"""What to download: the parts of a run, and where each is published. Sizes in decimal GB."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """Where a missing part comes from, and the flag that names it."""

    what: str
    flag: str
    repository: str
    file: str
    gigabytes: float

    def advice(self) -> str:
        """Return one line that tells what to download and how to pass it."""
        return (
            f"{self.what}: download {self.file} ({self.gigabytes:g} GB) from {self.repository} "
            f"and pass it with {self.flag}"
        )


_MONOLITH = ("Lightricks/LTX-2.3", "ltx-2.3-22b-distilled-1.1.safetensors", 46.1)
_KIJAI = "Kijai/LTX2.3_comfy"
_UPSCALERS = "Lightricks/LTX-2.3"

SOURCES = {
    "transformer": Source("the transformer", "--model", *_MONOLITH),
    "video_connector": Source("the connectors", "--connectors", *_MONOLITH),
    "audio_connector": Source("the connectors", "--connectors", *_MONOLITH),
    "text_projection": Source(
        "the text projection",
        "--text-projection",
        _KIJAI,
        "text_encoders/ltx-2.3_text_projection_bf16.safetensors",
        2.31,
    ),
    "video_decoder": Source(
        "the video VAE", "--vae", _KIJAI, "vae/LTX23_video_vae_bf16.safetensors", 1.45
    ),
    "video_encoder": Source(
        "the video VAE", "--vae", _KIJAI, "vae/LTX23_video_vae_bf16.safetensors", 1.45
    ),
    "audio_decoder": Source(
        "the audio VAE", "--audio-vae", _KIJAI, "vae/LTX23_audio_vae_bf16.safetensors", 0.36
    ),
    "audio_encoder": Source(
        "the audio VAE", "--audio-vae", _KIJAI, "vae/LTX23_audio_vae_bf16.safetensors", 0.36
    ),
    "vocoder": Source(
        "the vocoder", "--audio-vae", _KIJAI, "vae/LTX23_audio_vae_bf16.safetensors", 0.36
    ),
    "text_encoder": Source(
        "the text encoder, Gemma 3 12B (gated: accept Google's terms first)",
        "--text-encoder",
        "google/gemma-3-12b-it-qat-q4_0-unquantized",
        "the whole folder",
        24.4,
    ),
    "x2": Source(
        "the x2 upscaler",
        "--upscaler",
        _UPSCALERS,
        "ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
        0.996,
    ),
    "x1.5": Source(
        "the x1.5 upscaler",
        "--upscaler",
        _UPSCALERS,
        "ltx-2.3-spatial-upscaler-x1.5-1.0.safetensors",
        1.09,
    ),
    "distilled_lora": Source(
        "the distilled LoRA, which the refining stages of a dev checkpoint need",
        "--distilled-lora",
        "Lightricks/LTX-2.3",
        "ltx-2.3-22b-distilled-lora-384-1.1.safetensors",
        7.6,
    ),
}
