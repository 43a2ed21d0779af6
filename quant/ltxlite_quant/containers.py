"""Opens a model file as what it is, whatever it is called."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from torch import Tensor

from ltxlite_quant.gguf import MAGIC, GgufFile
from ltxlite_quant.mapped import TensorEntry
from ltxlite_quant.safetensors import SafetensorsFile
from ltxlite_quant.tensor import QuantTensor


class Container(Protocol):
    """An open file of named tensors, as the rest of the program sees it.

    metadata: what the file says of itself; strings in safetensors, strings, numbers and lists in
    GGUF.  tensors: every tensor by name, in file order.
    """

    @property
    def path(self) -> Path:
        """Return where the file is."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Return the file's own description."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Return the entries by name."""

    @property
    def span(self) -> tuple[int, int]:
        """Return address and size of the file's map."""

    def load(self, name: str) -> Tensor | QuantTensor:
        """Return one tensor, mapped and not writable."""

    def close(self) -> None:
        """Let go of the file; tensors loaded from it stay valid."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_container(path: str | Path) -> SafetensorsFile | GgufFile:
    """Open a .safetensors or .gguf file, told apart by its first bytes.

    Reads the header only. Raises FormatError for anything else, saying what it is where known.
    """
    with Path(path).open("rb") as file:
        magic = file.read(len(MAGIC))
    return GgufFile(path) if magic == MAGIC else SafetensorsFile(path)
