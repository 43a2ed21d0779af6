"""Recognises how each layer of a safetensors file is quantized, and folds it into one tensor.

A quantized layer is codes and companions (scales, tables, declarations) under a dozen spellings.
Names, shapes and dtypes decide; a declaration (`comfy_quant`, `_quantization_metadata`) counts only
for what they do not show. Source: formats.md 1.3 to 1.8, 1.13 and 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ltxlite.checkpoint.config import parse_json
from ltxlite.checkpoint.packed import BlockState, PackedTensor
from ltxlite.checkpoint.stored import StoredTensor
from ltxlite.errors import CheckpointError
from ltxlite_quant.formats import FORMATS, shown

_FLOATS = ("F32", "BF16", "F16", "F64")
_JSON_LIMIT = 1 << 16  # declarations take about 100 bytes


@dataclass(frozen=True, slots=True)
class Companion:
    """A tensor beside the codes: the part it becomes, its suffixes after the layer, its dtypes."""

    part: str
    suffixes: tuple[str, ...]
    dtypes: tuple[str, ...] = _FLOATS


@dataclass(frozen=True, slots=True)
class Flavour:
    """A way to store a quantized weight.

    format: its name in FORMATS.  suffix, dtype: of the codes.  needs: companions that all must be
    there.  optional: companions that may be.
    """

    format: str
    suffix: str
    dtype: str
    needs: tuple[Companion, ...] = ()
    optional: tuple[Companion, ...] = ()


_SCALE = Companion("scale", (".weight_scale", ".scale_weight"))
_COLUMNS = (Companion("column_scale", (".pre_quant_scale",)),)
_QUANTO = (Companion("scale", (".weight._scale",)),)
_NESTED = (
    Companion("nested_scale", (".weight.nested_absmax",)),
    Companion("nested_code", (".weight.nested_quant_map",)),
)


def _bitsandbytes(kind: str) -> Flavour:
    needs = (
        Companion("scale", (".weight.absmax",), (*_FLOATS, "U8")),
        Companion("code", (".weight.quant_map",)),
        Companion("state", (f".weight.quant_state.bitsandbytes__{kind}",), ("U8",)),
    )
    return Flavour(f"BNB_{kind.upper()}", ".weight", "U8", needs, _NESTED)


# The first row whose codes and companions are there holds.
FLAVOURS = (
    Flavour(
        "NVFP4_TILED",
        ".weight",
        "U8",
        (
            Companion("scale", (".weight_scale_2",)),
            Companion("scale_tiles", (".weight_scale",), ("F8_E4M3", "U8")),
        ),
        _COLUMNS,
    ),
    _bitsandbytes("nf4"),
    _bitsandbytes("fp4"),
    Flavour(
        "MXFP8",
        ".weight",
        "F8_E4M3",
        (Companion("scale_tiles", (".weight_scale",), ("U8", "F8_E8M0")),),
        _COLUMNS,
    ),
    Flavour("F8_E4M3_SCALED", ".weight", "F8_E4M3", (_SCALE,), _COLUMNS),
    Flavour("F8_E5M2_SCALED", ".weight", "F8_E5M2", (_SCALE,), _COLUMNS),
    Flavour("F8_E4M3", ".weight", "F8_E4M3"),
    Flavour("F8_E5M2", ".weight", "F8_E5M2"),
    Flavour("INT8", ".weight", "I8", (_SCALE,), _COLUMNS),
    Flavour(
        "BNB_INT8",
        ".weight",
        "I8",
        (Companion("scale", (".SCB",)),),
        (Companion("layout", (".weight_format",), ("U8", "I8", "I32", "I64")),),
    ),
    Flavour("INT8", ".weight._data", "I8", _QUANTO),
    Flavour("F8_E4M3_SCALED", ".weight._data", "F8_E4M3", _QUANTO),
    Flavour("F8_E5M2_SCALED", ".weight._data", "F8_E5M2", _QUANTO),
    Flavour("INT8", ".weight.int8", "I8", (_SCALE,)),
)
_SUFFIXES = (".weight._data", ".weight.int8", ".weight")  # longest first
_DTYPES = {flavour.dtype for flavour in FLAVOURS}

# What the weight-only use of a layer has no use for. Static activation scales, mostly.
_UNUSED = (".comfy_quant", ".input_scale", ".scale_input", ".output_scale")
_MARKER = "scaled_fp8"  # ComfyUI's former declaration of a whole file
_CONVROT = {256: "INT8_CONVROT", 64: "INT8_CONVROT_64", 16: "INT8_CONVROT_16"}
_UNREADABLE = ("convrot_w4a4", "asym_w4a8_int8", "svdquant_w4a4", "awq_w4a16")
_REVERSED = (".input_global_scale", ".alpha", ".weight_global_scale", ".input_absmax")
_ADVICE = "use an fp8, NVFP4, int8, GGUF or bf16 file instead"

# An fp8 code this large proves a lost scale: scaled weights reach 448, unscaled ones stay far
# below 16 (formats.md 1.13). Beside layers that have their scales, less is proof enough.
_LOST, _LOST_AMONG_SCALED = 240.0, 16.0


@dataclass(frozen=True, slots=True)
class _File:
    """What the layers of a file are judged by."""

    tensors: Mapping[str, StoredTensor]
    declared: Mapping[str, Any]
    where: str
    limit: float

    def declaration(self, layer: str) -> dict[str, Any]:
        """Return what the file declares of a layer, or {}."""
        text = self.tensors.get(f"{layer}.comfy_quant")
        if text is not None:
            found = parse_json(_read_text(text), f"{self.where}: {text.entry.name}")
        else:
            found = self.declared.get(layer, {})
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.where}: the declaration of {layer} is {shown(found)}")
        inner = found.get("params")
        return found | inner if isinstance(inner, dict) else found


def fold(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, Any], where: str
) -> dict[str, StoredTensor]:
    """Replace every quantized layer's tensors by one, named as the unquantized weight would be.

    Other tensors stay as they are, companions without codes too.  Reads nothing but declarations.
    Raises CheckpointError for a scale that is missing and for packings ltxlite does not read.
    """
    scaled = any(name.endswith((*_SCALE.suffixes, _MARKER)) for name in tensors)
    limit = _LOST_AMONG_SCALED if scaled else _LOST
    file = _File(tensors, _declared_layers(metadata, where), where, limit)
    folded: dict[str, StoredTensor] = {}
    used: set[str] = set()
    for name, stored in tensors.items():
        packed = _packed(name, stored, file)
        if packed is None:
            folded[name] = stored
        else:
            layer = _layer(name)
            folded[f"{layer}.weight"] = packed
            used |= {piece.entry.name for piece in packed.pieces}
            used.discard(f"{layer}.weight")
    return {
        name: stored
        for name, stored in folded.items()
        if name not in used and not _is_unused(name, folded)
    }


def _packed(name: str, stored: StoredTensor, file: _File) -> PackedTensor | None:
    """Return the folded tensor whose codes are `name`, or None for an ordinary tensor."""
    if name.endswith((".qweight", ".qweight_packed")):
        raise CheckpointError(f"{file.where}: {name} is GPTQ, AWQ or SVDQuant; {_ADVICE}")
    layer = _layer(name)
    if layer is None or stored.format.name not in _DTYPES:
        return None
    _refuse_reversed(layer, stored, file)
    for flavour in FLAVOURS:
        if (layer + flavour.suffix, flavour.dtype) != (name, stored.format.name):
            continue
        companions = _companions(flavour, layer, file.tensors)
        if companions is not None:
            return _checked(flavour, layer, stored, companions, file)
    raise _unreadable(name, layer, stored, file)


def _layer(name: str) -> str | None:
    return next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end)), None)


def _companions(
    flavour: Flavour, layer: str, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor] | None:
    """Return the companions of a layer by part, or None if one that is needed is not there."""
    found: dict[str, StoredTensor] = {}
    for companion in (*flavour.needs, *flavour.optional):
        for suffix in companion.suffixes:
            stored = tensors.get(layer + suffix)
            if stored is not None and stored.format.name in companion.dtypes:
                found.setdefault(companion.part, stored)
        if companion in flavour.needs and companion.part not in found:
            return None
    return found


def _checked(
    flavour: Flavour,
    layer: str,
    stored: StoredTensor,
    companions: dict[str, StoredTensor],
    file: _File,
) -> PackedTensor:
    packing, shape, state = FORMATS[flavour.format], stored.shape, None
    if "state" in companions:
        text = companions["state"]
        state = BlockState.from_json(_read_text(text), f"{file.where}: {text.entry.name}")
        shape = state.shape
    elif flavour.format == "NVFP4_TILED" and shape:
        shape = (*shape[:-1], 2 * shape[-1])
    elif flavour.format == "INT8" and flavour.suffix == ".weight":
        packing = FORMATS[_int8_format(layer, file)]
    elif not flavour.needs and file.declaration(layer):
        declared = file.declaration(layer).get("format")
        raise CheckpointError(
            f"{file.where}: scale tensor missing for {layer}.weight, which is declared "
            f"{declared!s:.40}; "
            "download the file again"
        )
    packed = PackedTensor(
        stored.container, stored.entry, shape, packing, companions, state, file.limit
    )
    packed.check()
    _refuse_layout(companions.get("layout"), file.where)
    return packed


def _int8_format(layer: str, file: _File) -> str:
    """Return the format of int8 codes, which only a declaration tells from rotated ones."""
    declared = file.declaration(layer)
    if declared.get("format") in _UNREADABLE:
        raise CheckpointError(f"{file.where}: {layer} is {declared['format']}; {_ADVICE}")
    if not declared.get("convrot"):
        return "INT8"
    size = declared.get("convrot_groupsize", 256)
    if type(size) is not int or size not in _CONVROT:
        raise CheckpointError(
            f"{file.where}: {layer} is rotated in groups of {shown(size)}; ltxlite reads groups of "
            f"{', '.join(map(str, _CONVROT))}"
        )
    return _CONVROT[size]


def _refuse_layout(layout: StoredTensor | None, where: str) -> None:
    if layout is not None and bool(layout.values().any()):
        raise CheckpointError(
            f"{where}: {layout.entry.name} is not 0, so the int8 codes are not in row order; "
            f"{_ADVICE}"
        )


def _refuse_reversed(layer: str, stored: StoredTensor, file: _File) -> None:
    found = [end for end in _REVERSED if layer + end in file.tensors]
    if stored.format.name == "U8" and found:
        raise CheckpointError(
            f"{file.where}: {layer}.weight is LightX2V's NVFP4 (it has {layer}{found[0]}), which "
            f"packs codes in the reverse order; {_ADVICE}"
        )


def _unreadable(name: str, layer: str, stored: StoredTensor, file: _File) -> CheckpointError:
    """Return the error for codes whose companions are not there, or not all."""
    kinds = [f for f in FLAVOURS if (layer + f.suffix, f.dtype) == (name, stored.format.name)]
    lacks = [[need for need in kind.needs if not _has(need, layer, file)] for kind in kinds]
    best = min(range(len(kinds)), key=lambda index: len(lacks[index]))
    if len(lacks[best]) == len(kinds[best].needs) and stored.format.name == "U8":
        declared = str(file.declaration(layer).get("format", "nothing"))[:40]
        return CheckpointError(
            f"{file.where}: {name} is U8 {list(stored.shape)}, a packed quantization without the "
            f"tensors that NVFP4 or bitsandbytes keep beside it (declared: {declared}); {_ADVICE}"
        )
    wanted = lacks[best][0]
    names = " or ".join(layer + suffix for suffix in wanted.suffixes)
    return CheckpointError(
        f"{file.where}: scale tensor missing for {name}: its {stored.format.name} codes need "
        f"{names} ({' or '.join(wanted.dtypes)}); the file is incomplete, download it again"
    )


def _has(companion: Companion, layer: str, file: _File) -> bool:
    found = (file.tensors.get(layer + suffix) for suffix in companion.suffixes)
    return any(item is not None and item.format.name in companion.dtypes for item in found)


def _declared_layers(metadata: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    layers = parse_json(text, f"{where}: _quantization_metadata").get("layers", {})
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where}: _quantization_metadata has layers {shown(layers)}")
    return layers


def _is_unused(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    if name == _MARKER or name.endswith(f".{_MARKER}"):
        return True
    return any(
        name.endswith(suffix) and f"{name.removesuffix(suffix)}.weight" in tensors
        for suffix in _UNUSED
    )


def _read_text(stored: StoredTensor) -> str:
    where = f"{stored.container.path}: {stored.entry.name}"
    if stored.format.name != "U8" or stored.nbytes > _JSON_LIMIT:
        raise CheckpointError(
            f"{where} is {stored.format.name} of {stored.nbytes} bytes, wanted a short U8 text"
        )
    try:
        return stored.values().numpy().tobytes().decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{where} is no text; the file is damaged") from None
