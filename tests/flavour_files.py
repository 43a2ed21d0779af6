"""Writers of quantized safetensors: a layer's weight to the tensors that files hold for it."""

import json

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from ltxlite_quant import FORMATS
from ltxlite_quant.encode_scaled import quantize_scaled

Tensors = dict[str, Tensor]


def text(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def fp8_plain(layer: str, weight: Tensor, dtype: torch.dtype) -> Tensors:
    return {f"{layer}.weight": weight.to(dtype)}


def fp8_scaled(layer: str, weight: Tensor, kind: str, scale: str, extra: Tensors) -> Tensors:
    quant = quantize_scaled(weight.flatten(1), FORMATS[f"{kind}_SCALED"])
    dtype = FORMATS[kind].dtype
    assert dtype is not None
    extra = {layer + suffix: value.clone() for suffix, value in extra.items()}
    codes = quant.blocks.view(dtype).view(weight.shape)
    return {f"{layer}.weight": codes, f"{layer}.{scale}": quant.parts["scale"].view(()), **extra}


def official_fp8(layer: str, weight: Tensor) -> Tensors:
    declared = {".comfy_quant": text({"format": "float8_e4m3fn"}), ".input_scale": torch.ones(1)}
    return fp8_scaled(layer, weight, "F8_E4M3", "weight_scale", declared)


def legacy_e5m2(layer: str, weight: Tensor) -> Tensors:
    # ComfyUI's converter labels every such layer e4m3; the dtype is right.
    wrong = {
        ".comfy_quant": text({"format": "float8_e4m3fn"}),
        ".scale_input": torch.tensor(1.0),
    }
    return fp8_scaled(layer, weight, "F8_E5M2", "scale_weight", wrong)


def row_scaled_fp8(layer: str, weight: Tensor) -> Tensors:
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    return {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}


def nvfp4(layer: str, weight: Tensor) -> Tensors:
    quant = quantize_scaled(weight, FORMATS["NVFP4_TILED"])
    return {
        f"{layer}.weight": quant.blocks,
        f"{layer}.weight_scale": quant.parts["scale_tiles"].view(torch.float8_e4m3fn),
        f"{layer}.weight_scale_2": quant.parts["scale"].view(()),
        f"{layer}.input_scale": torch.tensor(0.01),
    }


def mxfp8(layer: str, weight: Tensor) -> Tensors:
    quant = quantize_scaled(weight, FORMATS["MXFP8"])
    return {
        f"{layer}.weight": quant.blocks.view(torch.float8_e4m3fn),
        f"{layer}.weight_scale": quant.parts["scale_tiles"],
    }


def int8(
    layer: str, weight: Tensor, codes: str = ".weight", scale: str = ".weight_scale"
) -> Tensors:
    quant = quantize_scaled(weight, FORMATS["INT8"])
    return {layer + codes: quant.blocks.view(torch.int8), layer + scale: quant.parts["scale"]}


def quanto(layer: str, weight: Tensor) -> Tensors:
    unused = {f"{layer}.input_scale": torch.ones(()), f"{layer}.output_scale": torch.ones(())}
    return int8(layer, weight, ".weight._data", ".weight._scale") | unused


def convrot(layer: str, weight: Tensor) -> Tensors:
    if weight.shape[1] % 16:
        return int8(layer, weight)
    quant = quantize_scaled(weight, FORMATS["INT8_CONVROT_16"])
    declared = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}}
    return {
        f"{layer}.weight": quant.blocks.view(torch.int8),
        f"{layer}.weight_scale": quant.parts["scale"],
        f"{layer}.comfy_quant": text(declared),
    }


def bnb_4bit(layer: str, weight: Tensor, kind: str, nested: bool = False) -> Tensors:
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    packed = state.as_dict(packed=True)
    return {f"{layer}.weight": codes} | {f"{layer}.weight.{key}": packed[key] for key in packed}


def bnb_int8(layer: str, weight: Tensor) -> Tensors:
    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    layout = torch.tensor(0, dtype=torch.uint8)
    return {
        f"{layer}.weight": codes,
        f"{layer}.SCB": scale,
        f"{layer}.weight_format": layout,
    }


# name: (writer, format it loads as, relative error of a gaussian matrix by formats.md 2.0; fp4
# and nf4 as measured here)
FLAVOURS = {
    "plain e4m3": (lambda n, w: fp8_plain(n, w, torch.float8_e4m3fn), "F8_E4M3", 0.033),
    "plain e5m2": (lambda n, w: fp8_plain(n, w, torch.float8_e5m2), "F8_E5M2", 0.055),
    "official fp8": (official_fp8, "F8_E4M3_SCALED", 0.03),
    "legacy e5m2": (legacy_e5m2, "F8_E5M2_SCALED", 0.055),
    "fp8 rows": (row_scaled_fp8, "F8_E4M3_SCALED", 0.03),
    "nvfp4": (nvfp4, "NVFP4_TILED", 0.1),
    "mxfp8": (mxfp8, "MXFP8", 0.033),
    "int8": (int8, "INT8", 0.01),
    "int8 convrot": (convrot, "INT8_CONVROT_16", 0.01),
    "int8 scenema": (lambda n, w: int8(n, w, ".weight.int8"), "INT8", 0.01),
    "quanto": (quanto, "INT8", 0.01),
    "bnb nf4": (lambda n, w: bnb_4bit(n, w, "nf4"), "BNB_NF4", 0.1),
    "bnb nf4 nested": (lambda n, w: bnb_4bit(n, w, "nf4", True), "BNB_NF4", 0.1),
    "bnb fp4": (lambda n, w: bnb_4bit(n, w, "fp4", True), "BNB_FP4", 0.13),
    "bnb int8": (bnb_int8, "BNB_INT8", 0.01),
}
