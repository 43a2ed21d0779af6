"""QuantTensor: what a quantized tensor is outside a network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxlite_quant import decode
from ltxlite_quant.formats import BlockFormat


@dataclass(frozen=True, slots=True, eq=False)
class QuantTensor:
    """A quantized tensor: its blocks, their format and its logical shape.

    blocks: (rows, row_bytes) uint8, where rows is the product of all dimensions but the last.
    A record, not a torch.Tensor: nothing computes with it by accident, and its shape is the true
    one.  Raises FormatError if blocks, format and shape disagree.
    """

    blocks: Tensor
    format: BlockFormat
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        decode.check_blocks(self.blocks, self.format, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.blocks.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values in `dtype`; fp32 arithmetic, one rounding."""
        return decode.dequantize(self.blocks, self.format, self.shape, dtype)
