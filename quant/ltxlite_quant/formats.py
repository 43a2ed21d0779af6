"""The one table of tensor formats: how the elements of a tensor lie in bytes.

A format is a record. A new one is a row of `FORMATS`, a decoder in `decode.DECODERS`, and where we
also write it an encoder in `encode.ENCODERS`; nothing else in the program names a format.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

_MOST_DIMENSIONS = 16  # convolutions over time have 5
_QUOTED = 160  # characters of a name that a message repeats; LTX-2 has names of 100


class FormatError(ValueError):
    """A malformed container, or a tensor format that is unknown or does not fit its shape."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How a row of elements becomes bytes.

    Every `block_size` consecutive elements of a row (the last dimension) take `block_bytes` bytes.
    A plain format has blocks of one element and the torch `dtype` that reads them; a quantized one
    has no dtype.  ggml_type: GGUF's number of the type, None where GGUF has none.
    """

    name: str
    ggml_type: int | None
    block_size: int
    block_bytes: int
    dtype: torch.dtype | None = None

    @property
    def is_quantized(self) -> bool:
        """Tell whether blocks must be decoded before they are numbers."""
        return self.dtype is None

    @property
    def bits_per_element(self) -> float:
        """Bits that one element costs on disk, with the scales that lie in its block."""
        return 8 * self.block_bytes / self.block_size


_ROWS = (
    BlockFormat("F32", 0, 1, 4, torch.float32),
    BlockFormat("F16", 1, 1, 2, torch.float16),
    BlockFormat("BF16", 30, 1, 2, torch.bfloat16),
    BlockFormat("F64", 28, 1, 8, torch.float64),
    BlockFormat("I8", 24, 1, 1, torch.int8),
    BlockFormat("I16", 25, 1, 2, torch.int16),
    BlockFormat("I32", 26, 1, 4, torch.int32),
    BlockFormat("I64", 27, 1, 8, torch.int64),
    BlockFormat("U8", None, 1, 1, torch.uint8),
    BlockFormat("BOOL", None, 1, 1, torch.bool),
    BlockFormat("F8_E4M3", None, 1, 1, torch.float8_e4m3fn),
    BlockFormat("F8_E5M2", None, 1, 1, torch.float8_e5m2),
    BlockFormat("F8_E8M0", None, 1, 1, torch.float8_e8m0fnu),
    BlockFormat("Q4_0", 2, 32, 18),
    BlockFormat("Q4_1", 3, 32, 20),
    BlockFormat("Q5_0", 6, 32, 22),
    BlockFormat("Q5_1", 7, 32, 24),
    BlockFormat("Q8_0", 8, 32, 34),
    BlockFormat("Q2_K", 10, 256, 84),
    BlockFormat("Q3_K", 11, 256, 110),
    BlockFormat("Q4_K", 12, 256, 144),
    BlockFormat("Q5_K", 13, 256, 176),
    BlockFormat("Q6_K", 14, 256, 210),
    BlockFormat("IQ4_NL", 20, 32, 18),
    BlockFormat("IQ4_XS", 23, 256, 136),
    BlockFormat("MXFP4", 39, 32, 17),
    BlockFormat("NVFP4", 40, 64, 36),
    # Below: codes only, the scales are tensors of their own (scaled.SCALINGS).
    BlockFormat("F8_E4M3_SCALED", None, 1, 1),
    BlockFormat("F8_E5M2_SCALED", None, 1, 1),
    BlockFormat("MXFP8", None, 1, 1),
    BlockFormat("NVFP4_TILED", None, 2, 1),
    BlockFormat("INT8", None, 1, 1),
    BlockFormat("INT8_CONVROT", None, 256, 256),
    BlockFormat("INT8_CONVROT_64", None, 64, 64),
    BlockFormat("INT8_CONVROT_16", None, 16, 16),
    BlockFormat("BNB_INT8", None, 1, 1),
    BlockFormat("BNB_NF4", None, 2, 1),
    BlockFormat("BNB_FP4", None, 2, 1),
)
FORMATS: Mapping[str, BlockFormat] = MappingProxyType({row.name: row for row in _ROWS})

# Every type number GGML ever gave out, so that a file we cannot read is refused by name.
# Source: ggml/include/ggml.h (ggml-org/ggml d99724f).
GGML_NAMES: Mapping[int, str] = MappingProxyType(
    {row.ggml_type: row.name for row in _ROWS if row.ggml_type is not None}
    | {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
    | {21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 41: "Q1_0", 42: "Q2_0"}
)
GGML_RETIRED: Mapping[int, str] = MappingProxyType(
    {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
    | {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
)


def is_shape(values: object) -> bool:
    """Tell whether what a file gives as a shape is one: a short list of sizes below 2**48.

    The bounds keep products of sizes in 64 bits or, of a hostile list, at least short.
    """
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        return False
    return all(type(size) is int and 0 <= size < 1 << 48 for size in values)


def shown(value: object) -> str:
    """Return a value read from a file as an error message may quote it: cut where it is long."""
    return repr(value[:_QUOTED]) if isinstance(value, str) else reprlib.repr(value)


def plain_format(name: str, where: str) -> BlockFormat:
    """Return the plain format that safetensors calls `name`; `where` opens the error message."""
    found = FORMATS.get(name)
    if found is None or found.is_quantized:
        plain = ", ".join(row.name for row in _ROWS if not row.is_quantized)
        raise FormatError(f"{where}: unknown dtype {shown(name)}; ltxlite reads {plain}")
    return found


def format_of_ggml_type(number: int, where: str) -> BlockFormat:
    """Return the format of a GGML type number, or refuse the type by its name.

    where: file and tensor, which open the error message.
    """
    name = GGML_NAMES.get(number, "")
    if name in FORMATS:
        return FORMATS[name]
    if name:
        problem = f"{name} tensors are not supported yet"
    elif number in GGML_RETIRED:
        problem = f"{GGML_RETIRED[number]} (GGML type {number}) was retired by GGML itself"
    else:
        problem = f"GGML type {number} is unknown; the file is damaged or newer than ltxlite"
    readable = [row.name for row in _ROWS if row.ggml_type is not None]
    raise FormatError(f"{where}: {problem}; use a file of {', '.join(readable)} tensors")


def byte_shape(
    shape: Sequence[int], block_format: BlockFormat, where: str = "tensor"
) -> tuple[int, ...]:
    """Turn a logical shape (..., K) into the shape of its bytes (..., row_bytes).

    A scalar () takes one block.  Raises FormatError where K is not a whole number of blocks.
    """
    *rows, length = shape if shape else (1,)
    if length % block_format.block_size:
        raise FormatError(
            f"{where}: {block_format.name} needs rows of a multiple of {block_format.block_size} "
            f"elements, got {length} (shape {tuple(shape)}); store this tensor as BF16 instead"
        )
    return *rows, length // block_format.block_size * block_format.block_bytes


def logical_shape(
    stored: Sequence[int], block_format: BlockFormat, where: str = "tensor"
) -> tuple[int, ...]:
    """Turn the shape of bytes (..., row_bytes) back into the logical shape (..., K).

    Raises FormatError where row_bytes is not a whole number of blocks.
    """
    *rows, length = stored if stored else (0,)
    if length % block_format.block_bytes:
        raise FormatError(
            f"{where}: {block_format.name} blocks take {block_format.block_bytes} bytes, which "
            f"does not divide rows of {length} bytes (shape {tuple(stored)}); is the format right?"
        )
    return *rows, length // block_format.block_bytes * block_format.block_size


def byte_count(shape: Sequence[int], block_format: BlockFormat, where: str = "tensor") -> int:
    """Return the bytes that a tensor of logical `shape` takes in `block_format`."""
    return math.prod(byte_shape(shape, block_format, where))
