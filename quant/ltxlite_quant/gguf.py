"""GGUF files: our own bounded reader, and a writer through the gguf package.

gguf.GGUFReader builds Python objects for every element of an array and takes about ten seconds on
the vocabulary of a text encoder; the direct parse here takes a tenth of one.
Source of the layout: ggml docs/gguf.md (version 3).
"""

import math
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ltxlite_quant.formats import (
    FORMATS,
    BlockFormat,
    FormatError,
    byte_count,
    byte_shape,
    format_of_ggml_type,
    is_shape,
    shown,
)
from ltxlite_quant.mapped import (
    MappedContainer,
    MappedFile,
    TensorEntry,
    check_layout,
    utf8,
)
from ltxlite_quant.tensor import QuantTensor

if TYPE_CHECKING:
    import gguf

MAGIC = b"GGUF"
MAX_DIMENSIONS = 4
MAX_SIZE = 1 << 48  # bounds every dimension, so that later arithmetic stays in 64 bits
DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# GGUF value type -> how numpy spells it; strings and arrays are read apart.
_INTEGERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 10: "<u8", 11: "<i8"}
_NUMBERS = _INTEGERS | {6: "<f4", 7: "?", 12: "<f8"}
# Memory that a header may take beyond the size of its file, which it never does in a real one: the
# vocabulary of Gemma takes 38 MB, the smallest file that has it 4.8 GB.
HEADER_ALLOWANCE = 1 << 17
# Memory that values take once read: a tensor in all our tables, a key in its dictionary, a number
# in a list (Python keeps the 256 smallest ones, of which only the slot counts).
_TENSOR_MEMORY, _KEY_MEMORY, _NUMBER_MEMORY, _SMALL_NUMBER_MEMORY = 1024, 256, 40, 8
_SMALL_NUMBERS = (0, 7)
_LONG_TEXT = 1 << 16
# Keys that the format defines as u32; other integers are i32, the only width ComfyUI reads back.
_UNSIGNED_KEYS = ("general.quantization_version", "general.file_type")
# Keys that the writer sets itself.
_OWN_KEYS = ("general.architecture", "general.alignment")

MetadataValue = str | int | float | bool


class GgufFile(MappedContainer):
    """An open GGUF file: `metadata`, `tensors`, and `load` for one tensor.

    Shapes are in torch's order. Opening reads the header only and checks every length and offset
    in it. Raises FormatError for a file that is damaged, cut short, big-endian, of another version
    or holds tensor types that ltxlite does not decode.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.metadata: dict[str, Any] = {}
        try:
            self._read_header(_Cursor(self._open_file()))
        except BaseException:
            self.close()
            raise

    def load(self, name: str) -> Tensor | QuantTensor:
        """Return a tensor, mapped and not writable; a QuantTensor if its format has blocks."""
        entry = self._entry(name)
        data = self._open_file().tensor(entry)
        if not entry.format.is_quantized:
            return data.view(entry.shape)
        row_bytes = byte_shape(entry.shape, entry.format, name)[-1]
        rows = math.prod(entry.shape[:-1])
        return QuantTensor(data.view(rows, row_bytes), entry.format, entry.shape)

    def _read_header(self, cursor: "_Cursor") -> None:
        _check_version(cursor)
        tensor_count = cursor.count("tensors", smallest=24)
        key_count = cursor.count("metadata keys", smallest=13)
        cursor.spend(_KEY_MEMORY * key_count, f"{key_count} metadata keys")
        for _ in range(key_count):
            key = cursor.string("a metadata key")
            if key in self.metadata:
                raise cursor.error(f"metadata key {shown(key)} stands twice")
            self.metadata[key] = cursor.value(cursor.u32(), key)
        cursor.spend(_TENSOR_MEMORY * tensor_count, f"{tensor_count} tensors")
        infos = [self._tensor_info(cursor) for _ in range(tensor_count)]
        self._place(infos, cursor)

    def _tensor_info(self, cursor: "_Cursor") -> TensorEntry:
        name = cursor.string("a tensor name")
        dimensions = cursor.u32()
        if dimensions > MAX_DIMENSIONS:
            raise cursor.error(
                f"{shown(name)} has {dimensions} dimensions, wanted {MAX_DIMENSIONS}"
            )
        sizes = [cursor.u64() for _ in range(dimensions)]
        if not is_shape(sizes):
            raise cursor.error(f"{shown(name)} has the impossible dimensions {sizes}")
        where = f"{self.path}: {shown(name)}"
        block_format = format_of_ggml_type(cursor.u32(), where)
        offset = cursor.u64()
        shape = self._original_shape(name, tuple(reversed(sizes)))
        nbytes = byte_count(shape, block_format, where)
        return TensorEntry(name, shape, block_format, offset, nbytes)

    def _original_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        # ComfyUI-GGUF's converter keeps here what GGUF cannot express ([1, 4096], 5 dimensions).
        wanted = self.metadata.get(f"comfy.gguf.orig_shape.{name}")
        if wanted is None:
            return shape
        where = f"{self.path}: comfy.gguf.orig_shape of {shown(name)}"
        if not is_shape(wanted):
            raise FormatError(f"{where} must be a list of sizes, got {shown(wanted)}")
        if math.prod(wanted) != math.prod(shape):
            raise FormatError(f"{where} is {wanted}, which does not hold {shape}")
        return tuple(wanted)

    def _place(self, infos: list[TensorEntry], cursor: "_Cursor") -> None:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment is {shown(alignment)}, wanted a power of two")
        start = -(-cursor.position // alignment) * alignment
        for info in infos:
            if info.name in self.tensors:
                raise cursor.error(f"tensor {shown(info.name)} stands twice")
            if info.offset % alignment:
                raise cursor.error(
                    f"{shown(info.name)} has offset {info.offset}, wanted a multiple of {alignment}"
                )
            self.tensors[info.name] = TensorEntry(
                info.name, info.shape, info.format, start + info.offset, info.nbytes
            )
        check_layout(str(self.path), list(self.tensors.values()), self._open_file().size)


class _Cursor:
    """Reads a header front to back; no length is believed before the file and memory allow it."""

    def __init__(self, file: MappedFile) -> None:
        self.position = 0
        self._data = file.map
        self._size = file.size
        self._path = file.path
        self._left = file.size + HEADER_ALLOWANCE

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self._path}: {problem}; the file is damaged, download it again")

    def spend(self, nbytes: int, what: str) -> None:
        """Count memory that Python objects are going to take."""
        self._refuse_beyond(nbytes, self._left, what)
        self._left -= nbytes

    def _refuse_beyond(self, nbytes: int, left: int, what: str) -> None:
        if nbytes > left:
            raise self.error(f"{what:.80} take more memory than a file of {self._size} bytes may")

    def skip(self, nbytes: int, what: str) -> int:
        """Go on behind the next bytes; return where they begin."""
        begin, end = self.position, self.position + nbytes
        if end > self._size:
            raise FormatError(
                f"{self._path}: the file is cut short inside its header, got {self._size} bytes, "
                f"wanted {end} to read {what:.80}; download it again"
            )
        self.position = end
        return begin

    def take(self, nbytes: int, what: str) -> bytes:
        """Return the next bytes."""
        begin = self.skip(nbytes, what)
        return self._data[begin : begin + nbytes]

    def u32(self) -> int:
        return int.from_bytes(self.take(4, "a number"), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8, "a number"), "little")

    def count(self, what: str, smallest: int) -> int:
        """Read a count of things that take at least `smallest` bytes each."""
        count = self.u64()
        if count * smallest > self._size - self.position:
            raise self.error(f"it announces {count} {what} in a file of {self._size} bytes")
        return count

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """Read strings; a loop over locals, since a vocabulary has 262 thousand of them."""
        data, size, position = memoryview(self._data), self._size, self.position
        length_at, size_of = struct.Struct("<Q").unpack_from, sys.getsizeof
        self.spend(8 * count, f"{count} strings")
        texts = [""] * count  # one that grows would need twice the memory at times
        taken, most, problem = 0, self._left, ""
        try:
            for index in range(count):
                begin = position + 8
                position = begin + length_at(data, position)[0]
                if position > size:
                    raise self.error(f"a string of {what:.80} ends at byte {position} of {size}")
                if position - begin > _LONG_TEXT:
                    # One character in a million makes all of them four bytes wide.
                    self._refuse_beyond(4 * (position - begin), most - taken, what)
                    texts[index] = text = utf8(data[begin:position])
                else:
                    texts[index] = text = str(data[begin:position], "utf-8")
                taken += size_of(text)
                if taken > most:
                    break
        except (struct.error, UnicodeDecodeError) as error:
            problem = str(error)
        if problem:  # raised here: inside the handler it would keep what the decoder was given
            raise self.error(f"the text of {what:.80} cannot be read ({problem})")
        self.spend(taken, f"{count} strings of {what}")
        self.position = position
        return texts

    def value(self, kind: int, key: str) -> Any:
        """Read one metadata value: str, int, float, bool or a list of one of them."""
        if kind == _STRING:
            return self.string(key)
        if kind in _NUMBERS:
            return self._numbers(kind, 1, key)[0]
        if kind != _ARRAY:
            raise self.error(f"metadata {shown(key)} has the unknown value type {kind}")
        element = self.u32()
        if element == _STRING:
            return self.strings(self.count(f"elements of {shown(key)}", smallest=8), key)
        if element in _NUMBERS:
            return self._numbers(element, self.count(f"elements of {shown(key)}", smallest=1), key)
        raise self.error(f"metadata {shown(key)} is an array of value type {element}")

    def _numbers(self, kind: int, count: int, key: str) -> list[Any]:
        dtype = np.dtype(_NUMBERS[kind])
        begin = self.skip(count * dtype.itemsize, key)
        each = _SMALL_NUMBER_MEMORY if kind in _SMALL_NUMBERS else _NUMBER_MEMORY
        self.spend(each * count, f"{count} numbers of {key}")
        numbers: list[Any] = np.frombuffer(self._data, dtype, count, begin).tolist()
        return numbers


def _check_version(cursor: _Cursor) -> None:
    magic, version = cursor.take(4, "the magic"), cursor.u32()
    if magic != MAGIC:
        raise cursor.error(f"not a GGUF file, it starts with {magic!r}")
    if version and not version & 0xFFFF:
        raise cursor.error("a big-endian GGUF; ltxlite reads little-endian ones")
    if version not in (2, 3):  # 2 differs from 3 only in not knowing big-endian files
        raise cursor.error(f"GGUF version {version}, wanted 2 or 3")


def write_gguf(
    path: str | Path,
    tensors: Mapping[str, Tensor | QuantTensor],
    metadata: Mapping[str, MetadataValue],
    architecture: str,
) -> None:
    """Write a GGUF file, beside its place first and renamed when complete.

    Strings, booleans, integers (i32) and floats (f32) become metadata; `architecture` becomes
    general.architecture.  Raises FormatError for a tensor or value that GGUF cannot hold.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        _write_part(part, tensors, metadata, architecture)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_part(
    part: Path,
    tensors: Mapping[str, Tensor | QuantTensor],
    metadata: Mapping[str, MetadataValue],
    architecture: str,
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(part, architecture)
    try:
        for key, value in metadata.items():
            _add_metadata(writer, key, value)
        for name, tensor in tensors.items():
            _add_tensor(writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_metadata(writer: "gguf.GGUFWriter", key: str, value: MetadataValue) -> None:
    if key in _OWN_KEYS:
        raise FormatError(f"{key} is set by write_gguf; leave it out of the metadata")
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif key in _UNSIGNED_KEYS and 0 <= value < 1 << 32:
        writer.add_uint32(key, value)
    elif -(1 << 31) <= value < 1 << 31:
        writer.add_int32(key, value)
    else:
        raise FormatError(f"metadata {key!r} is {value}, which does not fit 32 bits")


def _add_tensor(writer: "gguf.GGUFWriter", name: str, tensor: Tensor | QuantTensor) -> None:
    from gguf import GGMLQuantizationType

    block_format = tensor.format if isinstance(tensor, QuantTensor) else _plain_format(name, tensor)
    if block_format.ggml_type is None:
        raise FormatError(
            f"{name}: GGUF has no type for {block_format.name}; decode it, or quantize it to Q8_0"
        )
    if not 1 <= len(tensor.shape) <= MAX_DIMENSIONS:
        raise FormatError(
            f"{name}: GGUF holds 1 to {MAX_DIMENSIONS} dimensions, got shape {tuple(tensor.shape)}"
        )
    raw = tensor.blocks if isinstance(tensor, QuantTensor) else tensor.detach()
    raw = raw.contiguous().cpu().view(torch.uint8)
    stored = raw.view(byte_shape(tensor.shape, block_format, name)).numpy()
    writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType(block_format.ggml_type))


def _plain_format(name: str, tensor: Tensor) -> BlockFormat:
    for block_format in FORMATS.values():
        if block_format.dtype == tensor.dtype and block_format.ggml_type is not None:
            return block_format
    raise FormatError(f"{name}: GGUF has no type for {tensor.dtype}; convert the tensor first")
