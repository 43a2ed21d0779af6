"""Which files a conversion reads, and how they are known again."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ltxlite.checkpoint.stored import StoredTensor

# Pieces of the data that tell a model from its fine-tunes, which have the same header.
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that is read: sha256 of its header, and of pieces all over it."""

    path: Path
    nbytes: int
    header: str
    fingerprint: str

    @property
    def name(self) -> str:
        """Its name, without the user's folders."""
        return self.path.name


def source_files(tensors: Iterable[StoredTensor]) -> tuple[SourceFile, ...]:
    """Return every file that the tensors lie in, once, in order of name."""
    starts: dict[Path, int] = {}
    for stored in tensors:
        for piece in stored.pieces:
            path = piece.container.path
            if path not in starts:
                starts[path] = min(e.offset for e in piece.container.tensors.values())
    return tuple(_described(path, starts[path]) for path in sorted(starts))


def _described(path: Path, data_start: int) -> SourceFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = hashlib.sha256(file.read(data_start))
        samples = header.copy()
        for number in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            samples.update(file.read(_SAMPLE_BYTES))
    return SourceFile(path, size, header.hexdigest(), samples.hexdigest())
