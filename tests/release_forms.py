"""The published forms of formats.md 1.2 to 1.11 as data: headers, and what is in them."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import release_files as made
from release_files import Typed, prefixed, typed, write_gguf, write_safetensors

FULL = json.loads((Path(__file__).parent / "golden" / "real_22b_keys.json").read_text("utf-8"))
LISTED = FULL["tensors"]
LISTED = (
    LISTED if isinstance(LISTED, list) else [{"name": n, "shape": s} for n, s in LISTED.items()]
)
REAL = {item["name"]: tuple(item["shape"]) for item in LISTED}
CONFIG = {"config": json.dumps(FULL["config"]), "model_version": "2.3.0"}
BOTH = ("video_connector", "audio_connector")
VIDEO, AUDIO = ("video_encoder", "video_decoder"), ("audio_encoder", "audio_decoder")
EVERYTHING = ("transformer", *BOTH, "text_projection", *VIDEO, *AUDIO, "vocoder")


@dataclass(frozen=True, slots=True)
class Form:
    """A published form: how its header looks, and what is to be recognised in it."""

    write: Callable[[Path], Path]
    components: tuple[str, ...]
    formats: dict[str, int] = field(default_factory=dict)
    family: str | None = None
    gigabytes: float | None = None


def form(
    tensors: Typed | Callable[[], Typed],
    *components: str,
    metadata: dict[str, str] | None = None,
    **expected: Any,
) -> Form:
    def write(folder: Path) -> Path:
        given = tensors() if callable(tensors) else tensors
        return write_safetensors(folder / "model.safetensors", given, metadata)

    return Form(write, components, **expected)


def gguf_form(
    tensors: Callable[[], Typed],
    *components: str,
    architecture: str = "ltxv",
    keys: dict[str, Any] | None = None,
    **expected: Any,
) -> Form:
    def write(folder: Path) -> Path:
        return write_gguf(folder / "model.gguf", tensors(), architecture, keys)

    return Form(write, components, **expected)


def whole(family: str) -> dict[str, tuple[int, ...]]:
    return made.dit(family) | made.connectors(family)


def scaled(shapes: dict[str, tuple[int, ...]], blocks: range, inputs: bool) -> Typed:
    """Return fp8 with scales for the linears of some blocks, bf16 for the rest."""
    tensors = typed(shapes)
    for name in shapes:
        if made.is_block_linear(name, blocks) and "connector" not in name:
            tensors[name] = ("F8_E4M3", shapes[name])
            tensors[f"{name}_scale"] = ("F32", ())
            if inputs:
                tensors[f"{name.removesuffix('.weight')}.input_scale"] = ("F32", (1,))
    return tensors


def packed(shapes: dict[str, tuple[int, ...]], words: tuple[str, ...], kind: str) -> Typed:
    """Return the named linears of blocks in a format with companions."""
    tensors = typed(shapes)
    for name, shape in shapes.items():
        if not made.is_block_linear(name) or not any(f".{word}." in name for word in words):
            continue
        layer, (rows, columns) = name.removesuffix(".weight"), shape
        del tensors[name]
        tensors |= PACKED[kind](layer, rows, columns)
    return tensors


def tiles(rows: int, groups: int) -> tuple[int, int]:
    return -(-rows // 128) * 128, -(-groups // 4) * 4


PACKED: dict[str, Callable[[str, int, int], Typed]] = {
    "nvfp4": lambda layer, n, k: {
        f"{layer}.weight": ("U8", (n, k // 2)),
        f"{layer}.weight_scale": ("F8_E4M3", tiles(n, k // 16)),
        f"{layer}.weight_scale_2": ("F32", ()),
        f"{layer}.input_scale": ("F32", ()),
    },
    "mxfp8": lambda layer, n, k: {
        f"{layer}.weight": ("F8_E4M3", (n, k)),
        f"{layer}.weight_scale": ("F8_E8M0", tiles(n, k // 32)),
    },
    "int8": lambda layer, n, k: {
        f"{layer}.weight": ("I8", (n, k)),
        f"{layer}.weight_scale": ("F32", (n, 1)),
    },
    "scenema": lambda layer, n, k: {
        f"{layer}.weight.int8": ("I8", (n, k)),
        f"{layer}.weight_scale": ("F32", (n, 1)),
    },
    "quanto": lambda layer, n, k: {
        f"{layer}.weight._data": ("I8", (n, k)),
        f"{layer}.weight._scale": ("BF16", (n, 1)),
        f"{layer}.input_scale": ("BF16", ()),
        f"{layer}.output_scale": ("BF16", ()),
    },
}
FP4_LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
ALL_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "to_gate_logits")


def gguf_gemma() -> Typed:
    """Return llama.cpp's 626 tensors of Gemma 3 12B, Q4_K with Q6_K embeddings."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "embed_tokens": "token_embd",
    }
    tensors: Typed = {}
    for name, shape in made.gemma("").items():
        name = name.replace("layers.", "blk.").replace("norm.weight", "norm.weight")
        for old, new in names.items():
            name = name.replace(old, new)
        name = "output_norm.weight" if name == "norm.weight" else name
        kind = "Q6_K" if "token_embd" in name else "Q4_K"
        tensors[name] = ("F32" if len(shape) == 1 else kind, shape)
    return tensors


GEMMA_KEYS = {"gemma3.block_count": 48, "gemma3.embedding_length": 3840}
BASE64 = {
    "config_base64": base64.b64encode(json.dumps(FULL["config"]).encode()).decode(),
    "quantization_format": "quanto",
}


def vae_names(prefix: str, keep: str) -> dict[str, tuple[int, ...]]:
    """Return the release's tensors under some prefixes, one of them cut off."""
    return {
        name.removeprefix(prefix): shape
        for name, shape in REAL.items()
        if name.startswith(tuple(keep.split()))
    }


def upscaler() -> Typed:
    shapes: dict[str, tuple[int, ...]] = {"initial_conv.weight": (1024, 128, 3, 3, 3)}
    shapes |= {"upsampler.0.weight": (4096, 1024, 3, 3), "final_conv.weight": (128, 1024, 3, 3, 3)}
    return typed(shapes)


def lora(prefix: str, a: str, b: str) -> Typed:
    layer = f"{prefix}transformer_blocks.0.attn1.to_q"
    return {f"{layer}.{a}": ("BF16", (384, 4096)), f"{layer}.{b}": ("BF16", (4096, 384))}


FORMS: dict[str, Form] = {
    # 1.2 and 1.3
    "2.3 monolith": form(
        lambda: typed(REAL), *EVERYTHING, metadata=CONFIG, family="2.3", gigabytes=46.1
    ),
    "2.0 monolith": form(
        lambda: typed(prefixed(whole("2.0")) | made.projection("2.0")),
        *EVERYTHING[:4],
        family="2.0",
        gigabytes=40.6,
    ),
    "official fp8": form(
        lambda: scaled(prefixed(whole("2.3")), range(2, 45), inputs=True),
        *EVERYTHING[:3],
        formats={"F8_E4M3_SCALED": 2924 // 2, "U8": 0},
        family="2.3",
        gigabytes=25.4,
    ),
    "official fp8 of 2.0": form(
        lambda: scaled(prefixed(made.dit("2.0")), range(1, 43), inputs=True),
        "transformer",
        formats={"F8_E4M3_SCALED": 42 * 28},
        family="2.0",
        gigabytes=21.6,
    ),
    # 1.4
    "nvfp4": form(
        lambda: packed(prefixed(whole("2.3")), FP4_LAYERS, "nvfp4"),
        *EVERYTHING[:3],
        formats={"NVFP4_TILED": 48 * len(FP4_LAYERS)},
        family="2.3",
    ),
    # 1.5
    "Kijai bf16": form(
        lambda: typed(prefixed(whole("2.3"))), *EVERYTHING[:3], family="2.3", gigabytes=42.0
    ),
    "Kijai fp8": form(
        lambda: scaled(prefixed(whole("2.3")), range(48), inputs=False),
        *EVERYTHING[:3],
        formats={"F8_E4M3_SCALED": 34 * 48},
        family="2.3",
        gigabytes=23.5,
    ),
    "Kijai mxfp8": form(
        lambda: packed(prefixed(whole("2.3")), ALL_LAYERS, "mxfp8"),
        *EVERYTHING[:3],
        formats={"MXFP8": 34 * 48},
        family="2.3",
        gigabytes=24.1,
    ),
    "Kijai projection": form(
        lambda: typed(made.projection("2.3")), "text_projection", gigabytes=2.312
    ),
    "Kijai video VAE": form(lambda: typed(vae_names("vae.", "vae.")), *VIDEO, gigabytes=1.452),
    "Kijai audio VAE": form(
        lambda: typed(vae_names("", "audio_vae. vocoder.")), *AUDIO, "vocoder", gigabytes=0.365
    ),
    "2.0 connectors with projection": form(
        lambda: typed(prefixed(made.connectors("2.0")) | made.projection("2.0")),
        *BOTH,
        "text_projection",
        gigabytes=2.86,
    ),
    # 1.6
    "unsloth Q8_0": gguf_form(
        lambda: made.gguf_typed(whole("2.3"), "Q8_0", "BF16", None),
        *EVERYTHING[:3],
        family="2.3",
        gigabytes=22.8,
    ),
    "QuantStack Q4_0": gguf_form(
        lambda: made.gguf_typed(whole("2.3"), "Q4_0", "F32", "BF16"), *EVERYTHING[:3], family="2.3"
    ),
    "light Q8_0": gguf_form(
        lambda: made.gguf_typed(made.dit("2.3"), "Q8_0", "BF16", None),
        "transformer",
        formats={"F32": 2526, "BF16": 28, "Q8_0": 1632},
        family="2.3",
    ),
    "2.0 Q6_K": gguf_form(
        lambda: made.gguf_typed(made.dit("2.0"), "Q6_K", "BF16", None), "transformer", family="2.0"
    ),
    "prefix kept": gguf_form(
        lambda: made.gguf_typed(prefixed(made.dit("2.3")), "Q5_K", "F32", None),
        "transformer",
        family="2.3",
    ),
    "architecture pig": gguf_form(
        lambda: made.gguf_typed(made.dit("2.3"), "Q4_1", "F32", None),
        "transformer",
        architecture="pig",
        family="2.3",
    ),
    "architecture cow, config in a key": gguf_form(
        lambda: made.gguf_typed(whole("2.3"), "IQ4_XS", "F32", None),
        *EVERYTHING[:3],
        architecture="cow",
        keys={"config": CONFIG["config"]},
        family="2.3",
    ),
    "flattened, with its original shape": gguf_form(
        lambda: (
            made.gguf_typed(made.dit("2.3"), "Q3_K", "BF16", None)
            | {"audio_scale_shift_table": ("F32", (2 * 2048,))}
        ),
        "transformer",
        keys={"comfy.gguf.orig_shape.audio_scale_shift_table": [2, 2048]},
        family="2.3",
    ),
    # 1.7 and 1.8
    "Wan2GP quanto": form(
        lambda: packed(made.dit("2.3"), ALL_LAYERS, "quanto"),
        "transformer",
        metadata=BASE64,
        formats={"INT8": 34 * 48},
        family="2.3",
    ),
    "Wan2GP connectors": form(lambda: typed(made.connectors("2.3")), *BOTH),
    "int8 tensorwise": form(
        lambda: packed(made.dit("2.3"), ALL_LAYERS, "int8"),
        "transformer",
        formats={"INT8": 34 * 48},
        family="2.3",
    ),
    "scenema": form(
        lambda: packed(made.dit("2.3"), ALL_LAYERS, "scenema"),
        "transformer",
        formats={"INT8": 34 * 48},
        family="2.3",
    ),
    "plain fp8": form(
        lambda: typed(made.dit("2.3"), "F8_E5M2"),
        "transformer",
        formats={"F32": 2 + 6 * 48},
        family="2.3",
    ),
    # 1.9 and 1.10
    "official LoRA": form(lora("diffusion_model.", "lora_A.weight", "lora_B.weight"), "lora"),
    "LoRA with down and up": form(lora("", "lora_down.weight", "lora_up.weight"), "lora"),
    "trainer's LoRA": form(
        lora("transformer.", "lora_A.default.weight", "lora_B.default.weight"), "lora"
    ),
    "upscaler": form(upscaler, "upscaler"),
    # 1.11
    "Gemma of transformers": form(
        lambda: typed(made.gemma("language_model.model.")), "text_encoder", gigabytes=23.5
    ),
    "Gemma of newer transformers": form(
        lambda: typed(made.gemma("model.language_model.")), "text_encoder"
    ),
    "Gemma of Comfy": form(
        lambda: (
            typed(made.gemma() | {"spiece_model": (4_689_074,)})
            | {"spiece_model": ("U8", (4_689_074,))}
        ),
        "text_encoder",
    ),
    "Gemma GGUF": gguf_form(
        gguf_gemma,
        "text_encoder",
        architecture="gemma3",
        keys=GEMMA_KEYS,
        formats={"F32": 6 * 48 + 1, "Q4_K": 7 * 48, "Q6_K": 1},
    ),
}
