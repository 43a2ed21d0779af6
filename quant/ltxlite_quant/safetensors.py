"""Safetensors files: our own bounded header reader.

Older safetensors wheels refuse F8_E8M0, and planning needs shapes, dtypes and metadata of a 46 GB
file without touching its data. Layout: u64 length, JSON header, data; offsets count from the data.
"""

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from ltxlite_quant.formats import FormatError, byte_count, plain_format
from ltxlite_quant.mapped import MappedContainer, TensorEntry, check_layout

# The header of the 5947 tensors of LTX-2.3 takes 0.8 MB; the format's own library stops at 100 MB.
MAX_HEADER_BYTES = 100_000_000


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
        if length > MAX_HEADER_BYTES:
            raise FormatError(
                f"{self.path}: not a safetensors file, its first 8 bytes {file.map[:8]!r} announce "
                f"a header of {length} bytes, wanted at most {MAX_HEADER_BYTES}"
            )
        if 8 + length > file.size:
            raise FormatError(
                f"{self.path}: the file is cut short inside its header, got {file.size} bytes, "
                f"wanted {8 + length} and the data; download it again"
            )
        return _parse_json(file.map[8 : 8 + length], self.path), 8 + length

    def _check_layout(self, data_start: int) -> None:
        size = self._open_file().size
        end = check_layout(str(self.path), list(self.tensors.values()), size)
        if max(end, data_start) != size:
            raise FormatError(
                f"{self.path}: got {size} bytes, but the header describes {max(end, data_start)}; "
                "the file is damaged, download it again"
            )


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: the safetensors header is not valid JSON ({error}); download the file again"
        ) from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the safetensors header is not a JSON object but {header!r:.40}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    if len(counts) != len(pairs):
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} stands twice")
    return dict(pairs)


def _metadata(values: object, path: Path) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(text, str) for text in values.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings, got {values!r:.80}")
    return values


def _entry(name: str, info: object, data_start: int, path: Path) -> TensorEntry:
    where = f"{path}: {name!r}"
    if not isinstance(info, dict) or not isinstance(info.get("dtype"), str):
        raise FormatError(f"{where}: wanted dtype, shape and data_offsets, got {info!r:.80}")
    shape = _sizes(info.get("shape"), "shape", where)
    offsets = _sizes(info.get("data_offsets"), "data_offsets", where)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: data_offsets must be [begin, end], got {list(offsets)}")
    block_format = plain_format(info["dtype"], where)
    wanted, got = byte_count(shape, block_format, where), offsets[1] - offsets[0]
    if got != wanted:
        raise FormatError(
            f"{where}: {block_format.name} {list(shape)} takes {wanted} bytes, but data_offsets "
            f"give it {got}; the file is damaged, download it again"
        )
    return TensorEntry(name, shape, block_format, data_start + offsets[0], wanted)


def _sizes(values: object, field: str, where: str) -> tuple[int, ...]:
    # 2**48 bounds every size and file, so that later arithmetic stays in 64 bits.
    if not isinstance(values, list) or not all(
        type(value) is int and 0 <= value < 1 << 48 for value in values
    ):
        raise FormatError(f"{where}: {field} must be a list of sizes, got {values!r:.80}")
    return tuple(values)
