"""The shipped tiny model: sizes of its networks, in the words of the release files.

Everything is of the kind and has the switches of LTX-2.3; only widths and depths are small.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

LATENT_CHANNELS = 32
AUDIO_CHANNELS = 32  # 2 channels of 16 bins; the statistics in the files are `ch` long


def _vae_blocks(suffix: str, layers: tuple[int, ...]) -> list[list[Any]]:
    kinds = (("space", 1), ("time", 1), ("all", 2), ("all", 1))
    blocks: list[list[Any]] = [["res_x", {"num_layers": layers[0]}]]
    for (kind, multiplier), count in zip(kinds, layers[1:], strict=True):
        blocks.append([f"compress_{kind}{suffix}", {"multiplier": multiplier}])
        blocks.append(["res_x", {"num_layers": count}])
    return blocks


_GENERATOR = {
    "resblock": "AMP1",
    "activation": "snakebeta",
    "resblock_kernel_sizes": [3],
    "stereo": True,
    "use_bias_at_final": False,
    "use_tanh_at_final": False,
}

TRANSFORMER: Mapping[str, Any] = MappingProxyType(
    {
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 16,
        "num_layers": 4,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "audio_in_channels": AUDIO_CHANNELS,
        "audio_out_channels": AUDIO_CHANNELS,
        "cross_attention_dim": 128,
        "audio_cross_attention_dim": 64,
        "connector_num_attention_heads": 4,
        "connector_attention_head_dim": 32,
        "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 16,
        "connector_num_layers": 2,
        "connector_num_learnable_registers": 128,
        "connector_positional_embedding_max_pos": [4096],
        "connector_apply_gated_attention": True,
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
        "text_encoder_norm_type": "per_token_rms",
        "frequencies_precision": "float64",
        "rope_type": "split",
        "av_ca_timestep_scale_multiplier": 1000.0,
    }
)
VAE: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "CausalVideoAutoencoder",
        "latent_channels": LATENT_CHANNELS,
        "decoder_base_channels": 32,
        "patch_size": 4,
        "timestep_conditioning": False,
        "spatial_padding_mode": "zeros",
        "encoder_blocks": _vae_blocks("_res", (1, 1, 1, 1, 1)),
        "decoder_blocks": _vae_blocks("", (2, 2, 1, 1, 1)),
    }
)
AUDIO_VAE: Mapping[str, Any] = MappingProxyType(
    {
        "model": {
            "params": {
                "sampling_rate": 16000,
                "ddconfig": {
                    "ch": AUDIO_CHANNELS,
                    "ch_mult": [1, 1, 2],
                    "num_res_blocks": 1,
                    "z_channels": 2,
                    "mid_block_add_attention": False,
                },
            }
        }
    }
)
VOCODER: Mapping[str, Any] = MappingProxyType(
    {
        "vocoder": {
            **_GENERATOR,
            "resblock_dilation_sizes": [[1, 3]],
            "upsample_initial_channel": 128,
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        },
        "bwe": {
            **_GENERATOR,
            "resblock_dilation_sizes": [[1]],
            "upsample_initial_channel": 32,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "apply_final_activation": False,
            "n_fft": 256,
            "win_size": 256,
            "hop_length": 80,
            "num_mels": 64,
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
        },
    }
)
UPSCALER: Mapping[str, Any] = MappingProxyType(
    {
        "in_channels": LATENT_CHANNELS,
        "mid_channels": 32,
        "num_blocks_per_stage": 1,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": False,
    }
)
TEMPORAL_UPSCALER: Mapping[str, Any] = MappingProxyType(
    {**UPSCALER, "spatial_upsample": False, "temporal_upsample": True}
)
GEMMA: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "query_pre_attn_scalar": 16,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
)
CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "transformer": dict(TRANSFORMER),
        "vae": dict(VAE),
        "audio_vae": dict(AUDIO_VAE),
        "vocoder": dict(VOCODER),
    }
)
SEED = 7
