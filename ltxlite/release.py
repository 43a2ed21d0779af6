"""Names as release files spell them: from module names back to checkpoint names.

The way in is each network's RENAMES; this is the way out, for whatever writes checkpoints. A test
takes every name of a full-size file through both.
"""

import re

_ATTENTION = (
    (r"\.self_attention\.", ".attn1."),
    (r"\.text_attention\.", ".attn2."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.feed_forward\.up\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.down\.", ".ff.net.2."),
)
_ADALN = (
    (r"\.adaln\.", ".adaln_single."),
    (r"\.prompt_adaln\.", ".prompt_adaln_single."),
    (r"^video\.cross_adaln\.", "av_ca_video_scale_shift_adaln_single."),
    (r"^audio\.cross_adaln\.", "av_ca_audio_scale_shift_adaln_single."),
    (r"^video\.gate_adaln\.", "av_ca_a2v_gate_adaln_single."),
    (r"^audio\.gate_adaln\.", "av_ca_v2a_gate_adaln_single."),
    (r"(adaln_single\.)(linear_[12]\.)", r"\1emb.timestep_embedder.\2"),
)
_STATISTICS = (
    (r"^latent_mean$", "per_channel_statistics.mean-of-means"),
    (r"^latent_std$", "per_channel_statistics.std-of-means"),
)
_CONNECTOR = (
    (r"^registers$", "learnable_registers"),
    (r"^blocks\.", "transformer_1d_blocks."),
    (r"\.attention\.", ".attn1."),
    *_ATTENTION[2:],
)

# Component: its prefix in a release file, and the patterns that turn its names back, in order.
EXPORTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "transformer": (
        "model.diffusion_model.",
        (
            *_ATTENTION,
            *_ADALN,
            (r"\.(video|audio)\.cross_table$", r".scale_shift_table_a2v_ca_\1"),
            (r"\.prompt_table$", ".prompt_scale_shift_table"),
            (r"\.table$", ".scale_shift_table"),
            (r"(^|\.)video\.(embed|head|caption)\.", r"\1\2."),
            (r"(^|\.)audio\.(embed|head|caption)\.", r"\1audio_\2."),
            (r"(^|_)embed\.", r"\1patchify_proj."),
            (r"(^|_)head\.", r"\1proj_out."),
            (r"(^|_)caption\.", r"\1caption_projection."),
            (r"^blocks\.", "transformer_blocks."),
            (r"\.audio_to_video\.", ".audio_to_video_attn."),
            (r"\.video_to_audio\.", ".video_to_audio_attn."),
            (r"(^|\.)video\.", r"\1"),
            (r"(^|\.)audio\.", r"\1audio_"),
        ),
    ),
    "video_connector": ("model.diffusion_model.video_embeddings_connector.", _CONNECTOR),
    "audio_connector": ("model.diffusion_model.audio_embeddings_connector.", _CONNECTOR),
    "text_projection": (
        "text_embedding_projection.",
        ((r"^(video|audio)\.", r"\1_aggregate_embed."), (r"^both\.", "aggregate_embed.")),
    ),
    "video_encoder": ("vae.encoder.", _STATISTICS),
    "video_decoder": ("vae.decoder.", _STATISTICS),
    "audio_encoder": ("audio_vae.encoder.", ((r"\.resample\.", ".downsample."), *_STATISTICS)),
    "audio_decoder": ("audio_vae.decoder.", ((r"\.resample\.", ".upsample."), *_STATISTICS)),
    "vocoder": (
        "vocoder.",
        (
            (r"^mel_basis$", "mel_stft.mel_basis"),
            (r"^transform$", "mel_stft.stft_fn.forward_basis"),
            (r"\.(alpha|beta)$", r".act.\1"),
            (r"\.up_filter$", ".upsample.filter"),
            (r"\.down_filter$", ".downsample.lowpass.filter"),
            (r"^core\.", "vocoder."),
            (r"^extension\.", "bwe_generator."),
        ),
    ),
    "upscaler": ("", ()),  # the plain x2 stores its convolution as upsampler.0
    "text_encoder": ("model.", ()),
}


def release_name(component: str, name: str) -> str:
    """Return the full checkpoint name of a module's parameter or buffer."""
    prefix, patterns = EXPORTS[component]
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    if name.startswith("per_channel_statistics."):
        prefix = prefix.removesuffix("encoder.").removesuffix("decoder.")
    return prefix + name
