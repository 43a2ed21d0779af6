"""One tensor of an open file, known from the header and read when asked."""

from dataclasses import dataclass

from torch import Tensor

from ltxlite_quant.containers import Container
from ltxlite_quant.formats import BlockFormat
from ltxlite_quant.mapped import TensorEntry
from ltxlite_quant.tensor import QuantTensor


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of an open container."""

    container: Container
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.entry.shape

    @property
    def format(self) -> BlockFormat:
        """How it is stored."""
        return self.entry.format

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.entry.nbytes

    @property
    def pieces(self) -> tuple["StoredTensor", ...]:
        """Every tensor of the file that it consists of."""
        return (self,)

    def load(self) -> Tensor | QuantTensor:
        """Read it, zero-copy where the file allows."""
        return self.container.load(self.entry.name)

    def values(self) -> Tensor:
        """Read a tensor of a plain format."""
        loaded = self.container.load(self.entry.name)
        assert isinstance(loaded, Tensor)  # callers know the format from the header
        return loaded
