"""A model file mapped read-only into memory, and the record of where a tensor lies in it."""

import codecs
import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ltxlite_quant.formats import BlockFormat, FormatError, shown

_LONG_TEXT = 1 << 16
# What people really have under a model's name: (first bytes, lower case; what it is; what to do).
_IMPOSTORS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the model", "run `git lfs pull`"),
    (b"<!doctype html", "a web page", "download the file itself, not its page"),
    (b"<html", "a web page", "download the file itself, not its page"),
    (b"pk\x03\x04", "a zip archive (a PyTorch .pt or .ckpt?)", "use .safetensors or .gguf"),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: logical shape, format, absolute offset and size in bytes."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int
    nbytes: int


class MappedFile:
    """Bytes of a file without reading it: pages come in as they are touched.

    The map is read-only: it costs address space only, whereas a private writable map of a 46 GB
    checkpoint counts in full against the memory that a 16 GB machine may promise. Tensors keep
    the map alive after `close`. Raises FormatError for files that cannot be a model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(64)
            if not head:
                raise FormatError(f"{path}: the file is empty; download it again")
            _refuse_impostors(path, head)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self.map)
        self._storage = _storage_of(self.map)

    def tensor(self, entry: TensorEntry) -> Tensor:
        """Return the bytes of `entry` as (nbytes,) uint8 or, for a plain format, its values.

        Zero-copy, so writing to it ends the process; a misaligned tensor is copied.  Raises
        FormatError if the file became shorter since it was opened: reading what is not there any
        more would end the process too.
        """
        if self.map.size() < entry.offset + entry.nbytes:
            raise FormatError(
                f"{self.path}: became shorter while it was open, got {self.map.size()} bytes, "
                f"wanted {entry.offset + entry.nbytes}; is another program still writing it?"
            )
        dtype = entry.format.dtype or torch.uint8
        if entry.nbytes == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        storage = self._storage[entry.offset : entry.offset + entry.nbytes]
        if entry.offset % dtype.itemsize:
            storage = storage.clone()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage)

    @property
    def span(self) -> tuple[int, int]:
        """Address and size of the map: a tensor between them has the file's bytes."""
        return self._storage.data_ptr(), self.size

    def close(self) -> None:
        """Let go of the file; it stays mapped as long as a loaded tensor needs it."""
        del self.map, self._storage


class MappedContainer:
    """What both containers share: an open file, its entries, and closing it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors: dict[str, TensorEntry] = {}
        self._file: MappedFile | None = MappedFile(self.path)

    @property
    def span(self) -> tuple[int, int]:
        """Address and size of the file's map. Raises FormatError if it was closed."""
        return self._open_file().span

    def close(self) -> None:
        """Let go of the file; tensors loaded from it stay valid."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_file(self) -> MappedFile:
        if self._file is None:
            raise FormatError(f"{self.path}: the file was closed; open it again to load tensors")
        return self._file

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise FormatError(
                f"{self.path}: has no tensor {shown(name)} (it has {len(self.tensors)} tensors)"
            )
        return self.tensors[name]


def utf8(data: memoryview) -> str:
    """Return bytes as text; raises UnicodeDecodeError, which holds little however long they are."""
    if len(data) > _LONG_TEXT:  # its error would hold all that the decoder was given
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(data), _LONG_TEXT):
            decoder.decode(data[start : start + _LONG_TEXT], start + _LONG_TEXT >= len(data))
    return str(data, "utf-8")


def check_layout(where: str, entries: list[TensorEntry], file_size: int) -> int:
    """Return the end of the last tensor; raise FormatError on overlap or a truncated file."""
    end, previous = 0, "the header"
    for entry in sorted(entries, key=lambda item: (item.offset, item.nbytes)):
        if entry.offset < end:
            raise FormatError(
                f"{where}: {shown(entry.name)} starts at byte {entry.offset}, inside "
                f"{shown(previous)} which ends at {end}; the file is damaged, download it again"
            )
        end, previous = entry.offset + entry.nbytes, entry.name
    if end > file_size:
        raise FormatError(
            f"{where}: the file is cut short, got {file_size} bytes, wanted {end} "
            f"({shown(previous)} is incomplete); download it again"
        )
    return end


def _refuse_impostors(path: Path, head: bytes) -> None:
    text = head.lstrip().lower()
    for magic, what, action in _IMPOSTORS:
        if text.startswith(magic):
            raise FormatError(f"{path}: this is {what}; {action}")


def _storage_of(mapped: mmap.mmap) -> torch.UntypedStorage:
    with warnings.catch_warnings():
        # "The given buffer is not writable": meant, and nothing writes to checkpoint tensors.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()
