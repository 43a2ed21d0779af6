"""Rows of a stored tensor as numbers, rows of numbers as bytes of a format: a chunk at a time.

Nothing here ever holds a whole matrix: the source is mapped, and a chunk is 8 Mi values.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ltxlite.checkpoint.stored import StoredTensor
from ltxlite.errors import CheckpointError
from ltxlite.low_rank import LowRankDelta
from ltxlite_quant import decode, scaled
from ltxlite_quant.formats import BlockFormat, FormatError
from ltxlite_quant.policy import Decision
from ltxlite_quant.search import quantize
from ltxlite_quant.search_plan import Effort
from ltxlite_quant.tensor import QuantTensor

# Values quantized at a time, 32 MiB of fp32: larger chunks are no faster, smaller ones call numba
# and torch more often. A row of the text projection has 188160.
CHUNK_VALUES = 8 << 20


@dataclass(frozen=True, slots=True)
class Encoder:
    """Where blocks are computed, and how patiently scales are searched for."""

    device: torch.device
    effort: Effort = "default"

    def __call__(
        self, values: Tensor, block_format: BlockFormat, importance: Tensor | None = None
    ) -> Tensor:
        """Turn (n, K) fp32 into the bytes (n, row_bytes) of a format, quantized or plain.

        importance: (K,) of the inputs, for formats with a search.  The result is on the CPU.
        Raises FormatError for values beyond the format.
        """
        if block_format.dtype is None:
            quant = quantize(values.to(self.device), block_format, self.effort, importance)
            return quant.blocks.cpu()
        plain = values.to(block_format.dtype)
        if not bool(plain.isfinite().all()):
            raise FormatError(f"{block_format.name} holds no {values.abs().amax().item():.3g}")
        return plain.contiguous().view(torch.uint8).view(len(values), -1)


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the file to be: what it becomes, and what of.

    shift: added to every value; llama.cpp stores the norms of Gemma as w + 1.
    importance: mean square (K,) of each input, where it is known and of use.
    delta: of LoRA files, added to a weight (N, K) before it is encoded.
    """

    decision: Decision
    source: StoredTensor
    shift: float = 0.0
    importance: Tensor | None = field(default=None, compare=False)
    delta: LowRankDelta | None = None

    @property
    def name(self) -> str:
        """Name in the new file."""
        return self.decision.name

    @property
    def is_copied(self) -> bool:
        """Tell whether the source is taken as it is, without another loss."""
        same = self.source.format == self.decision.format
        same = same and self.source.shape == self.decision.shape
        return same and not self.shift and self.delta is None


class Rows:
    """A planned tensor's source as a matrix (rows, K), of which rows can be read."""

    def __init__(self, planned: Planned) -> None:
        shape = planned.decision.shape
        loaded = planned.source.load()
        if isinstance(loaded, QuantTensor) and loaded.shape != shape:
            is_padded = len(shape) == 2 and scaled.stored_shape(loaded.format, shape) != shape
            loaded = loaded.cropped(shape) if is_padded else loaded
        self.columns = shape[-1] if shape else 1
        self.count = math.prod(shape[:-1])
        self._planned = planned
        self._loaded = loaded

    def values(self, first: int, last: int) -> Tensor:
        """Return rows as (n, K) fp32, finite. Raises CheckpointError for NaN and infinity."""
        values = self._read(first, last)
        if self._planned.shift:
            values = values + self._planned.shift
        if self._planned.delta is not None:
            values = self._planned.delta.added(values, slice(first, last))
        if not bool(values.isfinite().all()):
            source = self._planned.source
            raise CheckpointError(
                f"{source.container.path}: {source.entry.name} holds NaN or infinity; download it "
                "again"
            )
        return values

    def encoded(self, first: int, last: int, encode: Encoder) -> Tensor:
        """Return rows in the format decided upon, as (n, row_bytes) uint8 on the CPU."""
        decision = self._planned.decision
        if self._planned.is_copied and decision.format.is_quantized:
            return self._stored(first, last)
        values = self.values(first, last)
        try:
            return encode(values, decision.format, self._planned.importance)
        except FormatError as error:
            raise CheckpointError(f"{decision.name}: {error}; choose another format") from None

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Cut all rows into pieces of at most `CHUNK_VALUES` values, or one row."""
        step = max(1, CHUNK_VALUES // max(1, self.columns))
        for first in range(0, self.count, step):
            yield first, min(first + step, self.count)

    def _read(self, first: int, last: int) -> Tensor:
        loaded = self._loaded
        if not isinstance(loaded, QuantTensor):
            return loaded.reshape(self.count, self.columns)[first:last].float()
        rows = slice(first, last)
        if loaded.format.name in scaled.SCALINGS:
            return scaled.dequantize(
                loaded.blocks, loaded.format, loaded.parts, self.columns, torch.float32, rows
            )
        blocks = loaded.blocks.view(self.count, -1)[rows]
        return decode.dequantize(blocks, loaded.format, (len(blocks), self.columns), torch.float32)

    def _stored(self, first: int, last: int) -> Tensor:
        assert isinstance(self._loaded, QuantTensor)  # as the header said
        return self._loaded.blocks.view(self.count, -1)[first:last]


def decoded(data: Tensor, block_format: BlockFormat, columns: int) -> Tensor:
    """Turn bytes (n, row_bytes) back into (n, K) fp32."""
    if block_format.dtype is None:
        return decode.dequantize(data, block_format, (len(data), columns), torch.float32)
    return data.contiguous().view(block_format.dtype).view(len(data), columns).float()
