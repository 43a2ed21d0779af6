"""QuantTensor: what a quantized tensor is outside a network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ltxlite_quant import decode, scaled
from ltxlite_quant.formats import BlockFormat, FormatError, byte_shape


@dataclass(frozen=True, slots=True, eq=False)
class QuantTensor:
    """A quantized tensor: its blocks, their format, its logical shape and its scales, if apart.

    blocks: (rows, row_bytes) uint8, where rows is the product of all dimensions but the last.
    parts: what a format of `scaled.SCALINGS` needs beside its blocks; empty for all others.
    A record, not a torch.Tensor: nothing computes with it by accident, and its shape is the true
    one.  Raises FormatError if blocks, parts, format and shape disagree.
    """

    blocks: Tensor
    format: BlockFormat
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        decode.check_blocks(self.blocks, self.format, self.shape)
        scaled.check_parts(self.format, self.parts, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks and parts."""
        return self.blocks.numel() + sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values in `dtype`; fp32 arithmetic, one rounding."""
        if self.format.name not in scaled.SCALINGS:
            return decode.dequantize(self.blocks, self.format, self.shape, dtype)
        columns = self.shape[-1] if self.shape else 1
        values = scaled.dequantize(self.blocks, self.format, self.parts, columns, dtype)
        return values.view(self.shape)

    def cropped(self, shape: tuple[int, ...]) -> "QuantTensor":
        """Return the tensor without the padding that its format added in the file.

        Raises FormatError if `shape` padded is not this tensor's shape.
        """
        if scaled.stored_shape(self.format, shape) != self.shape:
            raise FormatError(f"{self.format.name} {self.shape} is no padded form of {shape}")
        rows, row_bytes = byte_shape(shape, self.format)
        blocks = self.blocks[:rows, :row_bytes].contiguous()
        parts = {
            name: part[:rows] if len(part) == self.shape[0] and name != "scale_tiles" else part
            for name, part in self.parts.items()
        }
        if "column_scale" in parts:
            parts["column_scale"] = parts["column_scale"][:, : shape[1]]
        return QuantTensor(blocks, self.format, shape, parts)
