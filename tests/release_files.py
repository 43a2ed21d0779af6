"""Released files as headers only: names and shapes by the rules of formats.md 1.1, no data.

The rules are written from the specification, not from our networks, so that both can be compared.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf

from ltxlite_quant import FORMATS
from ltxlite_quant.formats import byte_count

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Typed = dict[str, tuple[str, Shape]]

D, A, CAPTIONS, PREFIX = 4096, 2048, 3840, "model.diffusion_model."
LAYERS = 48


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def attention(name: str, queries: int, keys: int, inner: int, gated: bool) -> Shapes:
    shapes = linear(f"{name}.to_q", inner, queries) | linear(f"{name}.to_k", inner, keys)
    shapes |= linear(f"{name}.to_v", inner, keys) | linear(f"{name}.to_out.0", queries, inner)
    shapes |= {f"{name}.q_norm.weight": (inner,), f"{name}.k_norm.weight": (inner,)}
    return shapes | linear(f"{name}.to_gate_logits", 32, queries) if gated else shapes


def adaln(name: str, width: int, count: int) -> Shapes:
    steps = f"{name}.emb.timestep_embedder"
    shapes = linear(f"{steps}.linear_1", width, 256) | linear(f"{steps}.linear_2", width, width)
    return shapes | linear(f"{name}.linear", count * width, width)


def block(name: str, family: str) -> Shapes:
    gated, rows = family != "2.0", 6 if family == "2.0" else 9
    shapes: Shapes = {}
    pairs = {"attn1": (D, D, D), "attn2": (D, D, D), "audio_attn1": (A, A, A)}
    pairs |= {"audio_attn2": (A, A, A), "audio_to_video_attn": (D, A, A)}
    for module, sizes in (pairs | {"video_to_audio_attn": (A, D, A)}).items():
        shapes |= attention(f"{name}.{module}", *sizes, gated)
    for stream, width, bias in (("", D, family != "2.5"), ("audio_", A, True)):
        shapes |= linear(f"{name}.{stream}ff.net.0.proj", 4 * width, width, bias)
        shapes |= linear(f"{name}.{stream}ff.net.2", width, 4 * width, bias)
        shapes[f"{name}.{stream}scale_shift_table"] = (rows, width)
        if gated:
            shapes[f"{name}.{stream}prompt_scale_shift_table"] = (2, width)
    shapes[f"{name}.scale_shift_table_a2v_ca_video"] = (5, D)
    return shapes | {f"{name}.scale_shift_table_a2v_ca_audio": (5, A)}


def dit(family: str) -> Shapes:
    """Return the transformer without connectors: 3510, 4186 or 4091 tensors."""
    rows, shapes = 6 if family == "2.0" else 9, {}
    for stream, width in (("", D), ("audio_", A)):
        shapes |= linear(f"{stream}patchify_proj", width, 128)
        shapes |= linear(f"{stream}proj_out", 128, width)
        shapes |= adaln(f"{stream}adaln_single", width, rows)
        shapes[f"{stream}scale_shift_table"] = (2, width)
        if family == "2.0":
            shapes |= linear(f"{stream}caption_projection.linear_1", width, CAPTIONS)
            shapes |= linear(f"{stream}caption_projection.linear_2", width, width)
        else:
            shapes |= adaln(f"{stream}prompt_adaln_single", width, 2)
    for name, width, count in (("video_scale_shift", D, 4), ("audio_scale_shift", A, 4)):
        shapes |= adaln(f"av_ca_{name}_adaln_single", width, count)
    for name, width in (("a2v_gate", D), ("v2a_gate", A)):
        shapes |= adaln(f"av_ca_{name}_adaln_single", width, 1)
    for number in range(LAYERS):
        shapes |= block(f"transformer_blocks.{number}", family)
    return shapes | ({"keyframes_abs_pos_embedding": (1, D)} if family == "2.5" else {})


def connectors(family: str) -> Shapes:
    shapes: Shapes = {}
    layers, gated = (2, False) if family == "2.0" else (8, True)
    widths = {"video": CAPTIONS, "audio": CAPTIONS} if family == "2.0" else {"video": D, "audio": A}
    for stream, width in widths.items():
        name = f"{stream}_embeddings_connector"
        shapes[f"{name}.learnable_registers"] = (128, width)
        for number in range(layers):
            layer = f"{name}.transformer_1d_blocks.{number}"
            shapes |= attention(f"{layer}.attn1", width, width, width, gated)
            shapes |= linear(f"{layer}.ff.net.0.proj", 4 * width, width)
            shapes |= linear(f"{layer}.ff.net.2", width, 4 * width)
    return shapes


def projection(family: str) -> Shapes:
    if family == "2.0":
        return linear("text_embedding_projection.aggregate_embed", 3840, 188160, bias=False)
    name = "text_embedding_projection."
    shapes = linear(f"{name}video_aggregate_embed", D, 188160)
    return shapes | linear(f"{name}audio_aggregate_embed", A, 188160)


def gemma(prefix: str = "model.", rows: int = 262208) -> Shapes:
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (rows, 3840), f"{prefix}norm.weight": (3840,)}
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for number in range(LAYERS):
        name = f"{prefix}layers.{number}"
        for module, size in (("q", 4096), ("k", 2048), ("v", 2048)):
            shapes |= linear(f"{name}.self_attn.{module}_proj", size, 3840, bias=False)
        shapes |= linear(f"{name}.self_attn.o_proj", 3840, 4096, bias=False)
        shapes |= {f"{name}.self_attn.{module}_norm.weight": (256,) for module in "qk"}
        shapes |= linear(f"{name}.mlp.gate_proj", 15360, 3840, bias=False)
        shapes |= linear(f"{name}.mlp.up_proj", 15360, 3840, bias=False)
        shapes |= linear(f"{name}.mlp.down_proj", 3840, 15360, bias=False)
        shapes |= {f"{name}.{norm}_layernorm.weight": (3840,) for norm in norms}
    return shapes


def vision() -> Shapes:
    """Return what Gemma sees with, which prompts do not need: 0.84 GB in bf16."""
    width, inner, name = 1152, 4304, "vision_model.encoder.layers"
    shapes: Shapes = {"vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14)}
    shapes |= {"vision_model.embeddings.position_embedding.weight": (4096, width)}
    for number in range(27):
        for module in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{name}.{number}.self_attn.{module}", width, width)
        shapes |= linear(f"{name}.{number}.mlp.fc1", inner, width)
        shapes |= linear(f"{name}.{number}.mlp.fc2", width, inner)
        shapes |= {f"{name}.{number}.layer_norm{n}.weight": (width,) for n in (1, 2)}
    return shapes | {"multi_modal_projector.mm_input_projection_weight": (width, 3840)}


def upscaler(width: int, upsampler: Shapes) -> Shapes:
    """Return a latent upscaler with four residual blocks before and after the upsampling."""
    shapes: Shapes = {"initial_conv.weight": (width, 128, 3, 3, 3), "initial_conv.bias": (width,)}
    shapes |= {f"initial_norm.{leaf}": (width,) for leaf in ("weight", "bias")}
    for stage in ("res_blocks", "post_upsample_res_blocks"):
        for block in (f"{stage}.{number}" for number in range(4)):
            for number in (1, 2):
                shapes[f"{block}.conv{number}.weight"] = (width, width, 3, 3, 3)
                shapes[f"{block}.conv{number}.bias"] = (width,)
                shapes |= {f"{block}.norm{number}.{leaf}": (width,) for leaf in ("weight", "bias")}
    shapes |= {"final_conv.weight": (128, width, 3, 3, 3), "final_conv.bias": (128,)}
    return shapes | upsampler


def prefixed(shapes: Shapes, prefix: str = PREFIX) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def typed(shapes: Shapes, dtype: str = "BF16") -> Typed:
    return {
        name: ("F32" if "scale_shift_table" in name else dtype, shape)
        for name, shape in shapes.items()
    }


def is_block_linear(name: str, blocks: Iterable[int] = range(LAYERS)) -> bool:
    if not name.endswith(".weight") or "norm" in name:
        return False
    parts = name.split("transformer_blocks.")
    return len(parts) == 2 and int(parts[1].split(".")[0]) in blocks


def gguf_typed(shapes: Shapes, kind: str, high: str, connector: str | None) -> Typed:
    """Return types as publishers choose them: `high` for AdaLN and projections."""
    wide = ("adaln_single.", "caption_projection.", "patchify_proj.", "proj_out.")
    raw = ("scale_shift_table", "registers", "keyframes")
    types: Typed = {}
    for name, shape in shapes.items():
        if len(shape) == 1 or any(word in name for word in raw):
            chosen = "F32"
        elif any(word in name for word in wide):
            chosen = high
        else:
            chosen = connector if connector and "connector" in name else kind
        types[name] = (chosen, shape)
    return types


def write_safetensors(
    path: Path,
    tensors: Typed,
    metadata: Mapping[str, str] | None = None,
    contents: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a sparse file: the header, and a hole where the data would be, but for `contents`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * FORMATS[dtype].block_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for name, data in (contents or {}).items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(data)
    return path


def write_gguf(
    path: Path, tensors: Typed, architecture: str = "ltxv", keys: Mapping[str, Any] | None = None
) -> Path:
    """Write a sparse GGUF file; its header comes from gguf-py. Lists become arrays."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (keys or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    end = 0
    for name, (kind, shape) in tensors.items():
        size = byte_count(shape, FORMATS[kind])
        wanted = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, shape, _DTYPE, size, raw_dtype=wanted)
        end += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(start + end)
    return path


_DTYPE = gguf.quants.np.dtype("float32")
