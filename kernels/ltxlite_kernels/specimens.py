"""Every kernel as it is launched, as data: what `python -m benchmarks compile` compiles and checks.

A specimen is a kernel, the types of its arguments and the constants it is compiled for. A family
yields the specimens of one operation on one architecture; a new kernel is a row of `FAMILIES`.
Importing this module imports every kernel, and needs Triton.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ltxlite_kernels import (
    attention,
    attention_inputs,
    attention_keys,
    configs,
    dequant,
    gate_heads,
    int8_weight,
    matmul,
    norm_modulate,
    norm_rope,
    norm_silu,
    quantize,
)
from ltxlite_kernels.card import Card
from ltxlite_kernels.coding import Coding
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import INDEXED, PLAIN, Epilogue
from ltxlite_quant.formats import FORMATS

ARCHITECTURES = (80, 86, 89, 90, 120)


@dataclass(frozen=True, slots=True)
class Specimen:
    """One compilation of a kernel.

    types: of its arguments by name, in Triton's spelling: `*bf16`, `i32`, `fp32`; `i32:16` for a
    number known to be a multiple of 16, `None` for an absent pointer.  Pointers are aligned to 16
    bytes.  constants: of the kernel, and `num_warps`, `num_stages`, `enable_fp_fusion`.
    tensor_core: the kinds of its matrix products, "int8", "fp16", "bf16", "fp8" or several of them
    ("int8 fp16"); None without any.
    byte_loads: whether it may load single bytes from global memory.
    """

    name: str
    kernel: Any
    types: Mapping[str, str | None]
    constants: Mapping[str, Any]
    tensor_core: str | None = None
    byte_loads: bool = False


Family = Callable[[int], Iterator[Specimen]]  # architecture -> its specimens


def _dequant(_: int) -> Iterator[Specimen]:
    for name, config in configs.DEQUANT.items():
        constants = {
            "UNPACK": dequant.KERNELS[name],
            "BYTES": FORMATS[name].block_bytes,
            "SIZE": FORMATS[name].block_size,
            "BLOCKS": config.blocks,
            "num_warps": config.warps,
            "enable_fp_fusion": False,
        }
        for out in ("bf16", "fp16"):
            types = {"blocks": "*u8", "out": f"*{out}", "count": "i32:16"}
            bytewise = config.alignment == 1
            yield Specimen(
                f"dequant {name} {out}", dequant._kernel, types, constants, None, bytewise
            )


def _int8_weight(_: int) -> Iterator[Specimen]:
    for name in configs.DEQUANT:
        yield from _decoded(name, Rotation.NONE)
        yield from _decoded(name, Rotation.SIGNS_128)
    yield from _decoded("Q4_K", Rotation.REGULAR_256)


def _decoded(name: str, rotation: Rotation) -> Iterator[Specimen]:
    given = int8_weight.constants(name, rotation)
    kind, bytewise = "fp16" if rotation else None, configs.DEQUANT[name].alignment == 1
    ending = f"{name} {rotation.name.lower()}"
    types = {"blocks": "*u8", "scales": "*fp32", "per_row": "i32:16"}
    if rotation:  # without, the loop is the same and the rest is less
        scales = f"row_scales {ending}"
        yield Specimen(scales, int8_weight._scales, types, given, kind, bytewise)
    types = types | {"codes": "*i8", "units": "i32:16"}
    given = given | {"UNIT": int8_weight.unit_of(name, rotation)}
    yield Specimen(f"int8_codes {ending}", int8_weight._codes, types, given, kind, bytewise)


_ROWS: Mapping[str, str | None] = MappingProxyType(
    {
        **{"x": "*bf16", "scales": "*fp32", "eps": "fp32", "index": "*i32"},
        **dict.fromkeys(("shift", "scale", "mixed", "logits"), "*bf16"),
        **dict.fromkeys(("K", "x_stride", "shift_stride", "scale_stride"), "i32:16"),
        **dict.fromkeys(("mixed_stride", "logits_stride"), "i32:16"),
    }
)
_CODES = MappingProxyType({torch.int8: "i8", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv"})


def _codings(architecture: int) -> Iterator[tuple[str, Coding]]:
    """Yield the codings that rows are rounded to on an architecture, and their names."""
    for dtype, name in _CODES.items():
        if dtype == torch.float8_e4m3fn and architecture < quantize.FP8_FROM:
            continue
        for rotation in Rotation:
            if dtype == torch.int8 or rotation is not Rotation.SIGNS_128:
                ending = "" if dtype == torch.int8 else f" {name}"
                yield rotation.name.lower() + ending, Coding(dtype, rotation)


def _quantize(architecture: int) -> Iterator[Specimen]:
    for name, coding in _codings(architecture):
        types = {**_ROWS, "codes": f"*{_CODES[coding.dtype]}"}
        kind = "fp16" if coding.rotation else None
        for columns in (2048, 4096, 16384):
            given = quantize.row_constants(columns, coding)
            yield Specimen(f"quantize {columns} {name}", quantize._rows, types, given, kind)
            if columns <= 4096:
                more = given | {"LOOKUP": INDEXED}
                ending = f"{columns} {name}"
                yield Specimen(f"norm {ending}", quantize._norm_rows, types, more, kind)
                more = given | {"HEAD": columns // 32}
                yield Specimen(f"gate_heads {ending}", gate_heads._gated_rows, types, more, kind)


def _values(_: int) -> Iterator[Specimen]:
    types = {**_ROWS, "out": "*bf16"}
    for columns in (2048, 4096):
        given = norm_modulate.constants(columns, INDEXED)
        yield Specimen(f"norm {columns} values", norm_modulate._norm_values, types, given)
        given = gate_heads.constants(columns, 32)
        yield Specimen(f"gate_heads {columns} values", gate_heads._gated_values, types, given)


_MATMUL_END: Mapping[str, str | None] = MappingProxyType(
    {
        **dict.fromkeys(("a_scales", "w_scales"), "*fp32"),
        **{"out": "*bf16", "M": "i32", "N": "i32:16", "out_stride": "i32:16"},
        **dict.fromkeys(("bias", "gate", "index", "residual")),
        **dict.fromkeys(("gate_stride", "residual_stride"), "i32:16"),
    }
)
# An ending's name, the arguments that it adds, and its epilogue for 64 rows.
_Ending = tuple[str, Mapping[str, str], Epilogue]


def _matmul_endings() -> tuple[_Ending, ...]:
    table = torch.empty(2, 16, device="meta")
    index = torch.empty(64, dtype=torch.int32, device="meta")
    gate = {"gate": "*bf16", "index": "*i32", "residual": "*bf16"}
    return (
        ("plain", {}, PLAIN),
        ("bias gelu", {"bias": "*bf16"}, Epilogue(gelu=True)),
        ("bias gate residual", {"bias": "*bf16"} | gate, Epilogue(False, table, index)),
        ("tail", {}, PLAIN),
    )


def _matmul(kind: str, codes: str) -> Family:
    def family(architecture: int) -> Iterator[Specimen]:
        given = {"a": f"*{codes}", "w": f"*{codes}", "K": "i32:16"}
        types = {**_MATMUL_END, **given, "parts": None}
        if kind == "fp16":
            types["w_scales"] = None
        tensor_core = kind.partition("_")[0]
        for least, _ in configs.MATMUL[kind].get(architecture, ()):
            for ending, more, epilogue in _matmul_endings():
                columns = 4096 + 16 * (ending == "tail")
                card = Card(architecture, 1)  # so small that all tiles fill it
                adds = epilogue.gate is not None
                config = configs.matmul_config(kind, card, max(1, least), 4096, adds)
                constants = matmul.constants(config, columns, 1)
                constants |= matmul.end_constants(epilogue, 64)
                name = f"matmul_{kind} {least}+ {ending}"
                yield Specimen(name, matmul._kernel, types | dict(more), constants, tensor_core)
        yield from _matmul_parts(kind, types, architecture)

    return family


def _matmul_parts(
    kind: str, types: Mapping[str, str | None], architecture: int
) -> Iterator[Specimen]:
    """Yield the pair of kernels that sum over four parts of K."""
    if architecture not in configs.MATMUL[kind]:
        return
    config = configs.MATMUL[kind][architecture][-1][1]
    types = {**types, "parts": "*i32" if kind == "int8" else "*fp32"}
    constants = matmul.constants(config, 8192, 4) | matmul.end_constants(PLAIN, 64)
    tensor_core = kind.partition("_")[0]
    yield Specimen(f"matmul_{kind} parts", matmul._kernel, types, constants, tensor_core)
    for ending, more, epilogue in _matmul_endings()[1:3]:
        constants = matmul.reduce_constants(4) | matmul.end_constants(epilogue, 64)
        name = f"matmul_{kind} sum of parts {ending}"
        yield Specimen(name, matmul._reduce, types | dict(more), constants)


def _norm_rope(_: int) -> Iterator[Specimen]:
    types: dict[str, str | None] = {
        **dict.fromkeys(("x", "weight", "out"), "*bf16"),
        **dict.fromkeys(("x_batch", "x_stride", "out_batch", "out_stride"), "i32:16"),
        **{"W": "i32:16", "eps": "fp32"},
    }
    tables = {"cosines": "*fp32", "sines": "*fp32", "index": "*i32", "index_batch": "i32"}
    for width in (2048, 4096):
        given = norm_rope.norm_constants(width)
        yield Specimen(f"norm_rope {width} unturned", norm_rope._norm, types, given)
        for axes, tokens in ((1, 500), (3, 6144)):
            given = norm_rope.rope_constants(32, width // 64, axes, tokens)
            more = types | tables | {"tokens": "i32"}
            yield Specimen(f"norm_rope {width} axes {axes}", norm_rope._turn, more, given)


def _norm_silu(_: int) -> Iterator[Specimen]:
    """Yield frames to frames, and into windows: activated, copied, and copied from planes."""
    planes, pixels = ("x_column", "out_column"), ("x_channel", "out_channel")
    for channels in (128, 256, 512, 1024, 2048):
        if channels < 2048:  # of the encoder of 2.0
            yield _spread(f"norm_silu {channels}", channels, planes, 1)
            yield _spread(f"norm_silu copies {channels}", channels, pixels, norm_silu.SLOTS, False)
        yield _spread(f"norm_silu windows {channels}", channels, pixels, norm_silu.SLOTS)
    for channels in (48, 128):  # what the first convolutions see
        turned = ("x_column", "out_channel")
        yield _spread(f"norm_silu turns {channels}", channels, turned, norm_silu.SLOTS, False)


def _spread(
    name: str, channels: int, inner: tuple[str, str], slots: int, active: bool = True
) -> Specimen:
    """Return one in which the strides named `inner` are one."""
    types: dict[str, str | None] = {
        **{"x": "*bf16", "out": "*bf16", "C": "i32:16", "frames": "i32", "first": "i32"},
        **{"X": "i32:16" if "x_column" in inner else "i32", "count": "i32", "eps": "fp32"},
        **{stride: None if stride in inner else "i32:16" for stride in norm_silu.STRIDES},
    }
    given = norm_silu.constants(channels, slots, active) | dict.fromkeys(inner, 1)
    return Specimen(name, norm_silu._spread, types, given)


def _attention(architecture: int) -> Iterator[Specimen]:
    yield from _prepared_keys()
    for kind, table in configs.ATTENTION.items():
        for (head_dim, biased), fitting in table[architecture].items():
            for config in fitting:
                name = f"attend {kind} {head_dim} {config.queries}x{config.keys}"
                if not biased:  # with one, what is masked costs nothing
                    yield _attend(f"{name} whole", kind, head_dim, config, False)
                yield _attend(f"{name} {'rows' if biased else 'tail'}", kind, head_dim, config)
                if biased and config is fitting[0]:
                    yield _attend(f"{name} row", kind, head_dim, config)


def _attend(
    name: str, kind: str, head_dim: int, config: configs.AttentionConfig, tail: bool = True
) -> Specimen:
    """Return one with keys past the last tile, and the bias that the end of its name says."""
    bias = name.partition(" row")[1] and "*fp32"
    strides = ("q_batch", "q_row", "key_batch", "key_row", "value_batch", "value_row")
    types: dict[str, str | None] = {
        **{"q": "*bf16", "key": "*bf16", "value": "*bf16", "out": "*bf16"},
        **{"T": "i32", "S": "i32" if tail else "i32:16", "rows": "i32", "ids_batch": "i32"},
        **dict.fromkeys((*strides, "out_batch", "out_row"), "i32:16"),
        **{"bias": bias or None, "ids": "*i32" if name.endswith("rows") else None},
        **{"bias_row": "i32", "key_scales": None, "value_scales": None},
    }
    if kind == "int8":
        types |= {"key": "*i8", "value": "*fp16", "key_scales": "*fp32", "value_scales": "*fp32"}
    given = attention.constants(config, head_dim, config.keys + tail)
    if not name.endswith("rows"):
        given["rows"] = 1
    return Specimen(
        name, attention._kernel, types, given, "int8 fp16" if kind == "int8" else "bf16"
    )


def _prepared_keys() -> Iterator[Specimen]:
    strides = ("key_batch", "key_row", "value_batch", "value_row", "out_batch", "out_row")
    types = {
        **{"key": "*bf16", "value": "*bf16", "sums": "*fp32", "largest": "*fp32", "S": "i32"},
        **{"codes": "*i8", "scales": "*fp32", "value_out": "*fp16", "value_scales": "*fp32"},
        **{"rows": "i32:16", "parts": "i32"},
        **dict.fromkeys(strides, "i32:16"),
    }
    for head_dim in configs.ATTENTION_HEAD_DIMS:
        given = attention_keys.constants(head_dim, attention_keys.ROWS)
        yield Specimen(f"key_sums {head_dim}", attention_keys._sums, types, given)
        given = attention_keys.constants(head_dim, attention_inputs.KEYS_PER_SCALE)
        given |= {"PARTS": attention_keys.PARTS}
        yield Specimen(f"key_codes {head_dim}", attention_keys._converted, types, given)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "dequant": _dequant,
        "int8_weight": _int8_weight,
        "quantize": _quantize,
        "values": _values,
        "matmul_int8": _matmul("int8", "i8"),
        "matmul_fp16": _matmul("fp16", "fp16"),
        "matmul_fp8": _matmul("fp8", "fp8e4nv"),
        "matmul_fp8_capped": _matmul("fp8_capped", "fp8e4nv"),
        "norm_rope": _norm_rope,
        "norm_silu": _norm_silu,
        "attention": _attention,
    }
)


def specimens(architecture: int) -> Iterator[Specimen]:
    """Yield everything that is compiled for an architecture, 86 for sm_86."""
    for family in FAMILIES.values():
        yield from family(architecture)
