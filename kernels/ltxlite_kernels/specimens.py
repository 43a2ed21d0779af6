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

from ltxlite_kernels import configs, dequant, int8_weight, matmul_int8, quantize
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
    tensor_core: the kind of its matrix products, "int8", "fp16", "bf16" or "fp8"; None without any.
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


def _quantize(_: int) -> Iterator[Specimen]:
    rows = {"x": "*bf16", "codes": "*i8", "scales": "*fp32", "K": "i32:16", "x_stride": "i32:16"}
    tables = {"shift": "*bf16", "scale": "*bf16", "index": "*i32", "eps": "fp32"}
    tables |= {"shift_stride": "i32:16", "scale_stride": "i32:16"}
    for columns in (2048, 4096, 16384):
        for rotation in Rotation:
            given = quantize.row_constants(columns, rotation)
            ending, kind = f"{columns} {rotation.name.lower()}", "fp16" if rotation else None
            yield Specimen(f"quantize {ending}", quantize._rows, rows, given, kind)
            if columns <= 4096:
                given = given | {"LOOKUP": INDEXED}
                types = rows | tables
                yield Specimen(f"norm {ending}", quantize._norm_rows, types, given, kind)


def _matmul_int8(architecture: int) -> Iterator[Specimen]:
    types: dict[str, str | None] = {
        **{"a": "*i8", "a_scales": "*fp32", "w": "*i8", "w_scales": "*fp32", "out": "*bf16"},
        **{"M": "i32", "N": "i32:16", "K": "i32:16", "out_stride": "i32:16"},
        **dict.fromkeys(("bias", "gate", "index", "residual")),
        **dict.fromkeys(("gate_stride", "residual_stride"), "i32:16"),
    }
    gate = {"gate": "*bf16", "index": "*i32", "residual": "*bf16"}
    table = torch.empty(2, 16, device="meta")
    index = torch.empty(64, dtype=torch.int32, device="meta")
    endings: tuple[tuple[str, Mapping[str, str], Epilogue, int], ...] = (
        ("plain", {}, PLAIN, 4096),
        ("bias gelu", {"bias": "*bf16"}, Epilogue(gelu=True), 4096),
        ("bias gate residual", {"bias": "*bf16"} | gate, Epilogue(False, table, index), 4096),
        ("tail", {}, PLAIN, 4096 + 16),
    )
    for least, _ in configs.MATMUL_INT8[architecture]:
        for ending, more, epilogue, columns in endings:
            adds = epilogue.gate is not None
            config = configs.matmul_int8_config(architecture, least, adds)
            given = matmul_int8.constants(config, columns, epilogue, 64)
            name = f"matmul_int8 {least}+ {ending}"
            yield Specimen(name, matmul_int8._kernel, types | dict(more), given, "int8")


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "dequant": _dequant,
        "int8_weight": _int8_weight,
        "quantize": _quantize,
        "matmul_int8": _matmul_int8,
    }
)


def specimens(architecture: int) -> Iterator[Specimen]:
    """Yield everything that is compiled for an architecture, 86 for sm_86."""
    for family in FAMILIES.values():
        yield from family(architecture)
