"""Safetensors files: our own bounded header reader.

Older safetensors wheels refuse F8_E8M0, and planning needs shapes, dtypes and metadata of a 46 GB
file without touching its data. Layout: u64 length, JSON header, data; offsets count from the data.
"""

import json
import struct
from pathlib import Path
from typing import Any

from torch import Tensor

from ltxlite_quant.formats import FormatError, byte_count, is_shape, plain_format, shown
from ltxlite_quant.mapped import MappedContainer, TensorEntry, check_layout, utf8

# The header of the 5947 tensors of LTX-2.3 takes 0.8 MB; the format's own library stops at 100 MB.
MAX_HEADER_BYTES = 100_000_000
# Bytes of Python objects that a byte of JSON becomes at most: `{"":0},` is a dict of 184 bytes in
# a list, and one character beyond the basic plane makes all others four bytes wide.
_EXPANSION = 40
# Memory that a header may take beyond the size of its file. Headers of 1.6 MB are thus always
# read: trainers describe their data sets in those of small LoRA files.
HEADER_ALLOWANCE = 64 << 20


class SafetensorsFile(MappedContainer):
    """An open safetensors file: `metadata`, `tensors`, and `load` for one tensor.

    Opening reads the header only and checks every offset in it. Raises FormatError for a file that
    is damaged, cut short or something else.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            header, data_start = self._header()
            self.metadata: dict[str, str] = _metadata(header.pop("__metadata__", {}), self.path)
            self.tensors = {
                name: _entry(name, info, data_start, self.path) for name, info in header.items()
            }
            self._check_layout(data_start)
        except BaseException:
            self.close()
            raise

    def load(self, name: str) -> Tensor:
        """Return a tensor, mapped and not writable (copied only if it lies misaligned)."""
        entry = self._entry(name)
        return self._open_file().tensor(entry).view(entry.shape)

    def _header(self) -> tuple[dict[str, Any], int]:
        file = self._open_file()
        if file.size < 8:
            raise FormatError(
                f"{self.path}: {file.size} bytes are too short for safetensors; download it again"
            )
        if file.map[:4] == b"GGUF":
            raise FormatError(f"{self.path}: this is a GGUF file; open it as one (open_container)")
        (length,) = struct.unpack("<Q", file.map[:8])
        self._refuse_length(length, file.size)
        if length and file.map[8:9] != b"{":
            raise FormatError(
                f"{self.path}: the safetensors header is not a JSON object, it starts with "
                f"{file.map[8:12]!r}; download the file again"
            )
        return _parse_json(memoryview(file.map)[8 : 8 + length], self.path), 8 + length

    def _refuse_length(self, length: int, size: int) -> None:
        if length > MAX_HEADER_BYTES:
            raise FormatError(
                f"{self.path}: not a safetensors file, its first 8 bytes announce a header of "
                f"{length} bytes, wanted at most {MAX_HEADER_BYTES}"
            )
        if 8 + length > size:
            raise FormatError(
                f"{self.path}: the file is cut short inside its header, got {size} bytes, "
                f"wanted {8 + length} and the data; download it again"
            )
        most = (size + HEADER_ALLOWANCE) // _EXPANSION
        if length > most:
            raise FormatError(
                f"{self.path}: a header of {length} bytes in a file of {size}, wanted at most "
                f"{most}; the file is damaged, download it again"
            )

    def _check_layout(self, data_start: int) -> None:
        size = self._open_file().size
        end = check_layout(str(self.path), list(self.tensors.values()), size)
        if max(end, data_start) != size:
            raise FormatError(
                f"{self.path}: got {size} bytes, but the header describes {max(end, data_start)}; "
                "the file is damaged, download it again"
            )


def _parse_json(raw: memoryview, path: Path) -> dict[str, Any]:
    header, problem = None, ""
    try:
        header = json.loads(utf8(raw), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem:  # raised here: inside the handler it would keep the text, which the error holds
        raise FormatError(
            f"{path}: the safetensors header is not valid JSON ({problem}); download the file again"
        )
    if not isinstance(header, dict):
        raise FormatError(
            f"{path}: the safetensors header is not a JSON object but {shown(header)}"
        )
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(name)} stands twice")
        found[name] = value
    return found


def _metadata(values: object, path: Path) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(text, str) for text in values.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings, got {shown(values)}")
    return values


def _entry(name: str, info: object, data_start: int, path: Path) -> TensorEntry:
    where = f"{path}: {shown(name)}"
    if not isinstance(info, dict) or not isinstance(info.get("dtype"), str):
        raise FormatError(f"{where}: wanted dtype, shape and data_offsets, got {shown(info)}")
    shape = _sizes(info.get("shape"), "shape", where)
    offsets = _sizes(info.get("data_offsets"), "data_offsets", where)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: data_offsets must be [begin, end], got {shown(offsets)}")
    block_format = plain_format(info["dtype"], where)
    wanted, got = byte_count(shape, block_format, where), offsets[1] - offsets[0]
    if got != wanted:
        raise FormatError(
            f"{where}: {block_format.name} {list(shape)} takes {wanted} bytes, but data_offsets "
            f"give it {got}; the file is damaged, download it again"
        )
    return TensorEntry(name, shape, block_format, data_start + offsets[0], wanted)


def _sizes(values: Any, field: str, where: str) -> tuple[int, ...]:
    if not is_shape(values):
        raise FormatError(f"{where}: {field} must be a list of sizes, got {shown(values)}")
    return tuple(values)
