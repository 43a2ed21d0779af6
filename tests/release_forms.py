"""The published transformers of formats.md 1.2 to 1.8 as data: headers, and what is in them."""

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
    texts: Callable[[Typed], dict[str, bytes]] | None = None,
    **expected: Any,
) -> Form:
    """Describe a safetensors file; `texts` gives the data of the tensors that hold text."""

    def write(folder: Path) -> Path:
        given = tensors() if callable(tensors) else tensors
        contents = texts(given) if texts else None
        return write_safetensors(folder / "model.safetensors", given, metadata, contents)

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


CONVROT = json.dumps({"format": "int8_tensorwise", "convrot": True}).encode()


def declarations(tensors: Typed) -> dict[str, bytes]:
    return {name: CONVROT for name in tensors if name.endswith(".comfy_quant")}


def convrot_layers(shapes: dict[str, tuple[int, ...]]) -> str:
    """Return the same declaration for all layers of blocks, as one text of the header."""
    layers = [name.removesuffix(".weight") for name in shapes if made.is_block_linear(name)]
    return json.dumps({"layers": dict.fromkeys(layers, json.loads(CONVROT))})


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
    "convrot": lambda layer, n, k: {
        f"{layer}.weight": ("I8", (n, k)),
        f"{layer}.weight_scale": ("F32", (n, 1)),
        f"{layer}.comfy_quant": ("U8", (len(CONVROT),)),
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


BASE64 = {
    "config_base64": base64.b64encode(json.dumps(FULL["config"]).encode()).decode(),
    "quantization_format": "quanto",
}


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
    **{
        name: form(
            lambda kept=kept: scaled(prefixed(whole("2.3")), kept, inputs=True),
            *EVERYTHING[:3],
            formats={"F8_E4M3_SCALED": 34 * len(kept)},
            family="2.3",
            gigabytes=gigabytes,
        )
        # v2 and v3 differ from the first in calibration and in which layers; not in the format.
        for name, kept, gigabytes in (
            ("Kijai fp8 with input scales", range(48), 23.5),
            ("Kijai fp8 with input scales, v2", range(1, 48), 23.8),
            ("Kijai fp8 with input scales, v3", range(2, 46), None),
        )
    },
    "Kijai mxfp8": form(
        lambda: packed(prefixed(whole("2.3")), ALL_LAYERS, "mxfp8"),
        *EVERYTHING[:3],
        formats={"MXFP8": 34 * 48},
        family="2.3",
        gigabytes=24.1,
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
    "Wan2GP ConvRot, declared in the header": form(
        lambda: packed(made.dit("2.3"), ALL_LAYERS, "int8"),
        "transformer",
        metadata=BASE64 | {"_quantization_metadata": convrot_layers(made.dit("2.3"))},
        formats={"INT8_CONVROT": 34 * 48, "INT8": 0},
        family="2.3",
    ),
    "ConvRot, declared layer by layer": form(
        lambda: packed(prefixed(whole("2.3")), ALL_LAYERS, "convrot"),
        *EVERYTHING[:3],
        texts=declarations,
        formats={"INT8_CONVROT": 34 * 48, "INT8": 0, "U8": 0},
        family="2.3",
        gigabytes=23.5,
    ),
    "Wan2GP's own blocks in NVFP4": form(
        lambda: packed(made.dit("2.3"), ALL_LAYERS[:-1], "nvfp4"),
        "transformer",
        metadata=BASE64,
        formats={"NVFP4_TILED": 28 * 48},
        family="2.3",
    ),
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
}
