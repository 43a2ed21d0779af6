"""Small files whose headers `fuzz` mutates: every flavour, every kind of key, little data."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ltxlite_quant import FORMATS
from ltxlite_quant.encode import quantize
from ltxlite_quant.gguf import write_gguf

FILE_BYTES = 1 << 20


def _safetensors_seed(folder: Path) -> tuple[bytes, bytes]:
    """Return header and data of a small file with every flavour that has companions."""
    del folder
    header: dict[str, Any] = {"__metadata__": {"model_version": "2"}}
    header["__metadata__"] |= {name: json.dumps(value) for name, value in TEXTS.items()}
    data = bytearray()
    state = {"shape": [8, 8], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.1}
    declared = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    texts = {f"{_BNB}.quant_state.bitsandbytes__nf4": state, "a.comfy_quant": declared}
    for name, (dtype, size, shape) in _LAYERS.items():
        text = json.dumps(texts[name]).encode() if name in texts else b""
        wanted = len(text) if name in texts else size * torch.Size(shape).numel()
        shape = [len(text)] if name in texts else shape
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + wanted],
        }
        data += text or bytes(wanted)
    # The file is filled up to its size; the length of the header changes the rest by little.
    rest = FILE_BYTES - 8 - len(data) - len(json.dumps(header)) - 99
    header["fill"] = {"dtype": "U8", "shape": [rest], "data_offsets": [len(data), len(data) + rest]}
    short = FILE_BYTES - 8 - len(json.dumps(header)) - len(data) - rest
    return json.dumps(header).encode() + b" " * short, bytes(data)


_DIT = "model.diffusion_model."
_BNB = "b.weight"
CONFIG = {
    "transformer": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1},
    "vae": {"latent_channels": 8, "patch_size": 4, "dims": 3},
    "audio_vae": {"model": {"params": {"ddconfig": {"ch": 8}}}},
    "vocoder": {"upsample_rates": [6, 5], "resblock": "AMP1"},
}
# JSON inside of the header's JSON: in these, values are mutated one by one.
TEXTS: dict[str, Any] = {
    "config": CONFIG,
    "_quantization_metadata": {
        "layers": {
            "d": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
            "e": {"format": "float8_e4m3fn", "params": {"convrot": False}},
        }
    },
}


def _layers() -> dict[str, tuple[str, int, list[int]]]:
    layers: dict[str, tuple[str, int, list[int]]] = {}
    for stream in ("", "audio_"):
        timestep = f"{stream}adaln_single.emb.timestep_embedder.linear_1"
        for layer in (f"{stream}patchify_proj", f"{stream}proj_out", timestep):
            layers[f"{_DIT}{layer}.weight"] = ("BF16", 2, [16, 16])
            layers[f"{_DIT}{layer}.bias"] = ("BF16", 2, [16])
        layers[f"{_DIT}{stream}adaln_single.linear.bias"] = ("F32", 4, [144])
        block = f"{_DIT}transformer_blocks.0.{stream}"
        layers[f"{block}attn1.to_gate_logits.bias"] = ("F32", 4, [2])
        layers[f"{block}attn2.to_k.weight"] = ("F8_E4M3", 1, [16, 16])
        layers[f"{block}attn2.to_k.weight_scale"] = ("F32", 4, [1])
        layers[f"{block}ff.net.2.bias"] = ("F16", 2, [16])
    layers[f"{_DIT}transformer_blocks.0.audio_to_video_attn.to_q.bias"] = ("F32", 4, [16])
    for stream in ("video", "audio"):
        registers = f"{_DIT}{stream}_embeddings_connector.learnable_registers"
        layers[registers] = ("F32", 4, [8, 16])
    layers["text_embedding_projection.video_aggregate_embed.weight"] = ("BF16", 2, [4, 32])
    layers["vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"] = ("BF16", 2, [4, 4, 3, 3, 3])
    layers["vocoder.conv_pre.weight"] = ("F32", 4, [4, 4, 3])
    layers["initial_conv.weight"] = ("F32", 4, [4, 8, 3, 3, 3])
    layers["model.layers.0.self_attn.q_norm.weight"] = ("BF16", 2, [8])
    layers["spiece_model"] = ("U8", 1, [64])
    layers |= {"a.weight": ("I8", 1, [16, 16]), "a.weight_scale": ("F32", 4, [16, 1])}
    layers |= {"d.weight": ("I8", 1, [4, 64]), "d.weight_scale": ("F32", 4, [])}
    layers |= {"e.weight": ("F8_E5M2", 1, [8, 8]), "e.scale_weight": ("F32", 4, [8])}
    layers |= {"a.comfy_quant": ("U8", 1, []), _BNB: ("U8", 1, [32, 1])}
    layers |= {f"{_BNB}.absmax": ("F32", 4, [1]), f"{_BNB}.quant_map": ("F32", 4, [16])}
    layers[f"{_BNB}.quant_state.bitsandbytes__nf4"] = ("U8", 1, [])
    layers |= {"c.weight": ("U8", 1, [16, 8]), "c.weight_scale": ("F8_E4M3", 1, [128, 4])}
    return layers | {"c.weight_scale_2": ("F32", 4, [])}


_LAYERS = _layers()


def _gguf_seed(folder: Path) -> tuple[bytes, bytes]:
    """Return header and data of a small text encoder with its vocabulary, and a quantized layer."""
    path = folder / "seed.gguf"
    width, rows = 32, 300
    tensors: dict[str, Any] = {
        "token_embd.weight": quantize(torch.randn(rows, width), FORMATS["Q8_0"]),
        "output_norm.weight": torch.ones(width),
    }
    for name in ("attn_q", "attn_k", "attn_v", "ffn_gate"):
        tensors[f"blk.0.{name}.weight"] = quantize(torch.randn(64, width), FORMATS["Q4_0"])
    tensors["blk.0.attn_q_norm.weight"] = torch.ones(16)
    tensors[f"{_DIT}transformer_blocks.0.scale_shift_table"] = torch.ones(9, 16)
    keys = {"config": json.dumps(CONFIG), "gemma3.block_count": 1, "gemma3.rope.freq_base": 1e6}
    write_gguf(path, tensors, {**keys, "general.file_type": 7}, "gemma3")
    raw = _with_vocabulary(path.read_bytes(), rows)
    size = sum(getattr(t, "nbytes", 0) for t in tensors.values())
    return raw[: len(raw) - size - 512], raw[len(raw) - size - 512 :]


def _with_vocabulary(raw: bytes, rows: int) -> bytes:
    """Return a GGUF file with the arrays of a tokenizer put before its other keys."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{n:02X}>" for n in range(256))]
    tokens += [f"w{n}" for n in range(rows - len(tokens))]
    strings = b"".join(struct.pack("<Q", len(text)) + text.encode() for text in tokens)
    types = [3, 3, 3, 2] + [6] * 256 + [1] * (rows - 260)
    arrays = (
        ("tokens", 8, strings),
        ("scores", 6, struct.pack(f"<{rows}f", *range(rows))),
        ("token_type", 5, struct.pack(f"<{rows}i", *types)),
    )
    prefix, added = "tokenizer.ggml.", b""
    key = f"{prefix}model".encode()
    added += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 5) + b"llama"
    for name, kind, body in arrays:
        key = (prefix + name).encode()
        added += struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, kind, rows) + body
    magic, tensors, keys = raw[:8], *struct.unpack("<QQ", raw[8:24])
    # Padding to the alignment of 32, so that data starts where it should.
    name = b"p" * (32 - (len(added) + 13) % 32)
    added += struct.pack("<Q", len(name)) + name + struct.pack("<IB", 0, 0)
    return magic + struct.pack("<QQ", tensors, keys + 5) + added + raw[24:]


SEEDS: dict[str, Callable[[Path], tuple[bytes, bytes]]] = {
    "safetensors": _safetensors_seed,
    "gguf": _gguf_seed,
}
