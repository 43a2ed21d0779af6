"""The published forms of the text encoder (formats.md 1.11) as data: headers and contents."""

import json
from collections.abc import Callable

import release_files as made
from release_files import Shapes, Typed, typed
from release_forms import PACKED, Form, form, gguf_form

SPIECE_BYTES = 4_689_074
LINEARS = 7 * 48
# The last of them that the mixed releases keep in a larger format.
FP8_OF_MIXED = tuple(f".layers.{number}." for number in range(43, 48))


def comfy() -> Shapes:
    return made.gemma() | made.vision()


def with_tokenizer(tensors: Typed) -> Typed:
    return tensors | {"spiece_model": ("U8", (SPIECE_BYTES,))}


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") and ".layers." in name and "vision" not in name


def fp8_scaled(layer: str, rows: int, columns: int) -> Typed:
    return {
        f"{layer}.weight": ("F8_E4M3", (rows, columns)),
        f"{layer}.weight_scale": ("F32", ()),
        f"{layer}.comfy_quant": ("U8", (27,)),
    }


def bitsandbytes(layer: str, rows: int, columns: int) -> Typed:
    """Return what unsloth's bnb-4bit holds for a layer: NF4, its scales quantized once more."""
    count = rows * columns
    return {
        f"{layer}.weight": ("U8", (count // 2, 1)),
        f"{layer}.weight.absmax": ("U8", (count // 64,)),
        f"{layer}.weight.quant_map": ("F32", (16,)),
        f"{layer}.weight.nested_absmax": ("F32", (count // 64 // 256,)),
        f"{layer}.weight.nested_quant_map": ("F32", (256,)),
        f"{layer}.weight.quant_state.bitsandbytes__nf4": ("U8", (len(state(rows, columns)),)),
    }


def state(rows: int, columns: int) -> bytes:
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
    told |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.046}
    return json.dumps(told).encode()


def states(tensors: Typed) -> dict[str, bytes]:
    """Return the JSON beside each weight of bitsandbytes."""
    suffix = ".weight.quant_state.bitsandbytes__nf4"
    layers = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    shapes = made.gemma("language_model.model.")
    return {f"{n}{suffix}": state(*shapes[f"{n}.weight"]) for n in layers}


def quantized(
    shapes: Shapes,
    pack: Callable[[str, int, int], Typed],
    chosen: Callable[[str], bool] = is_linear,
) -> Typed:
    """Return the chosen layers packed, and the rest in bf16."""
    tensors: Typed = {}
    for name, shape in shapes.items():
        if chosen(name) and len(shape) == 2:
            tensors |= pack(name.removesuffix(".weight"), *shape)
        else:
            tensors[name] = ("BF16", shape)
    return tensors


def fp4_mixed() -> Typed:
    """Return nine tenths of the layers in NVFP4 and the rest in fp8."""
    small = quantized(
        made.gemma(),
        PACKED["nvfp4"],
        lambda name: is_linear(name) and not any(part in name for part in FP8_OF_MIXED),
    )
    large = quantized(made.gemma(), fp8_scaled)
    large = {name: kind for name, kind in large.items() if any(p in name for p in FP8_OF_MIXED)}
    kept = {name: kind for name, kind in small.items() if f"{name}_scale" not in large}
    return with_tokenizer(kept | large | typed(made.vision()))


def plain_fp8() -> Typed:
    """Return every matrix cast to fp8, without scales and without a tokenizer."""
    return {
        name: ("F8_E4M3" if len(shape) == 2 and "embed" not in name else "BF16", shape)
        for name, shape in comfy().items()
    }


def llama_cpp(kind: str, table: str) -> Typed:
    """Return the 626 tensors of a GGUF: a type for the layers, another for the embeddings."""
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
        name = name.replace("layers.", "blk.")
        for old, new in names.items():
            name = name.replace(old, new)
        name = "output_norm.weight" if name == "norm.weight" else name
        chosen = table if "token_embd" in name else kind
        tensors[name] = ("F32" if len(shape) == 1 else chosen, shape)
    return tensors


def gguf_gemma(kind: str, table: str, gigabytes: float) -> Form:
    counts = {"F32": 6 * 48 + 1}
    for used, count in ((kind, LINEARS), (table, 1)):
        counts[used] = counts.get(used, 0) + count
    return gguf_form(
        lambda: llama_cpp(kind, table),
        "text_encoder",
        architecture="gemma3",
        keys={"gemma3.block_count": 48, "gemma3.embedding_length": 3840},
        formats=counts,
        gigabytes=gigabytes,
    )


FORMS: dict[str, Form] = {
    "Gemma of transformers": form(
        lambda: typed(made.gemma("language_model.model.")), "text_encoder", gigabytes=23.5
    ),
    "Gemma of newer transformers": form(
        lambda: typed(made.gemma("model.language_model.")), "text_encoder"
    ),
    "Gemma of Comfy": form(
        lambda: with_tokenizer(typed(comfy())), "text_encoder", gigabytes=24.379
    ),
    "Gemma of Comfy, layers in fp8": form(
        lambda: with_tokenizer(quantized(comfy(), fp8_scaled)),
        "text_encoder",
        formats={"F8_E4M3_SCALED": LINEARS},
        gigabytes=13.7,
    ),
    "Gemma of Comfy, all in fp8": form(
        lambda: with_tokenizer(
            quantized(comfy(), fp8_scaled, lambda n: n.endswith(".weight") and "embed" not in n)
        ),
        "text_encoder",
        formats={"F8_E4M3_SCALED": LINEARS + 6 * 27},
        gigabytes=13.2,
    ),
    "Gemma of Comfy, fp4 mixed": form(
        fp4_mixed,
        "text_encoder",
        formats={"NVFP4_TILED": 7 * 43, "F8_E4M3_SCALED": 7 * 5},
        gigabytes=9.447,
    ),
    "Gemma in plain fp8": form(
        plain_fp8,
        "text_encoder",
        formats={"F8_E4M3": LINEARS + 6 * 27 + 1},
        gigabytes=13.2,
    ),
    "Gemma of bitsandbytes": form(
        lambda: quantized(made.gemma("language_model.model."), bitsandbytes),
        "text_encoder",
        texts=states,
        formats={"BNB_NF4": LINEARS, "U8": 0},
    ),
    "Gemma of Wan2GP": form(
        lambda: quantized(made.gemma("language_model.model."), PACKED["quanto"]),
        "text_encoder",
        metadata={"quantization_format": "quanto"},
        formats={"INT8": LINEARS},
    ),
    "Gemma GGUF, Q4_K": gguf_gemma("Q4_K", "Q6_K", 6.9),
    "Gemma GGUF of Google": gguf_gemma("Q4_0", "F16", 8.07),
}
