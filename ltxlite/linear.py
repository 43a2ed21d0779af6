"""Linear layers over quantized blocks: the one place where quant meets kernels.

A network is written with nn.Linear; these take the place of some of its layers afterwards.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.arithmetic import Arithmetic, Operands
from ltxlite.errors import ShapeError
from ltxlite.models.activation import Activation, Multiplier, Tail
from ltxlite_kernels.dequant import dequantize
from ltxlite_quant import QuantTensor, scaled

# Largest decoded piece of a weight. It fits the second-level cache of an Ada card, and the matmul
# loses nothing at LTX token counts (kernels/README.md); a whole 16384x4096 bf16 weight is 134 MB.
SCRATCH_BYTES = 32 << 20
# Pieces hold whole multiples of this many rows, so that only the last one has ragged matmul tiles.
ROW_MULTIPLE = 256


class QuantMatrix(nn.Module):
    """A matrix that stays quantized.

    Buffers: blocks (N, row_bytes) uint8 and the format's parts by their names.
    Attributes: format, rows N, columns K.
    """

    blocks: Tensor

    def __init__(self, weight: QuantTensor) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ShapeError(f"a quantized matrix has 2 dimensions (N, K), got {weight.shape}")
        self.format = weight.format
        self.rows, self.columns = weight.shape
        self.register_buffer("blocks", weight.blocks)
        self.part_names = tuple(weight.parts)
        for name, part in weight.parts.items():
            self.register_buffer(name, part)

    def decoded(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Return rows of the matrix, decoded: (rows, K) in `dtype`."""
        if self.format.name in scaled.SCALINGS:
            given = (self.blocks, self.format, self.parts(), self.columns)
            return scaled.dequantize(*given, dtype, rows)
        blocks = self.blocks[rows]
        if self.format.dtype is not None:  # not quantized, but of another dtype than its network
            return blocks.view(self.format.dtype).to(dtype)
        return dequantize(blocks, self.format, (len(blocks), self.columns), dtype)

    def parts(self) -> dict[str, Tensor]:
        """Return the format's parts by their names."""
        return {name: self.get_buffer(name) for name in self.part_names}

    def is_finite(self) -> bool:
        """Tell whether every value is a finite number; decodes all of them."""
        pieces = row_pieces(self.rows, self.columns * torch.float32.itemsize)
        return all(bool(self.decoded(torch.float32, rows).isfinite().all()) for rows in pieces)


class QuantEmbedding(QuantMatrix):
    """An Embedding whose table stays quantized; only rows that are asked for are decoded.

    The 262208 x 3840 table of Gemma is 2 GB in bf16; a prompt needs a few hundred of its rows.
    """

    def __init__(self, table: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__(table)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return (..., K) in the compute dtype.  ids: (...) integers below N."""
        wanted, places = ids.unique(return_inverse=True)
        if self.format.name in scaled.SCALINGS:  # scales may lie in tiles: a row at a time
            starts = wanted.tolist()
            table = torch.cat([self.decoded(self.dtype, slice(i, i + 1)) for i in starts])
        else:
            shape = (len(wanted), self.columns)
            table = dequantize(self.blocks[wanted], self.format, shape, self.dtype)
        return table[places]


class QuantLinear(QuantMatrix, Multiplier):
    """A Linear whose weight stays quantized; a piece at a time is decoded for the product.

    Buffers: those of the weight, and bias (N,) or None.  The weight is decoded to the dtype of the
    input, or, with an `arithmetic`, to its codes.  scales: what that keeps of a weight (N,), once
    it has `measured` it.
    """

    bias: Tensor | None

    def __init__(self, weight: QuantTensor, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ShapeError(
                f"a bias of {tuple(bias.shape)} does not fit a weight of {weight.shape}"
            )
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.arithmetic: Arithmetic | None = None
        self.scales: Tensor | None = None
        self.measured = False

    @property
    def in_features(self) -> int:
        """K, as in nn.Linear."""
        return self.columns

    @property
    def out_features(self) -> int:
        """N, as in nn.Linear."""
        return self.rows

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias.  x: (..., K) floating; returns (..., N) in its dtype.

        The decoded weight has the same bits in pieces or whole; the product may differ by its
        rounding, since matmul libraries choose the order of a sum by N.
        """
        pieces = self.pieces(x.dtype)
        if len(pieces) == 1:
            return self._product(x, pieces[0])
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for rows in pieces:
            y[..., rows] = self._product(x, rows)
        return y

    @property
    def codes(self) -> bool:
        """Whether `multiply` is the way to compute."""
        return self.arithmetic is not None

    def multiply(self, given: Activation, tail: Tail) -> Tensor:
        """Return tail(given Wᵀ + bias), (B, t, N), by the linear's arithmetic."""
        assert self.arithmetic is not None
        operands = Operands(given, self.bias, self.out_features, tail)
        return self.arithmetic.multiply(operands, self)

    def pieces(self, dtype: torch.dtype) -> list[slice]:
        """Return the rows that are decoded to `dtype` at a time."""
        return list(row_pieces(self.out_features, self.in_features * dtype.itemsize))

    def _product(self, x: Tensor, rows: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[rows].to(x.dtype)
        return F.linear(x, self.decoded(x.dtype, rows), bias)

    def extra_repr(self) -> str:
        """Return what print(model) shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, format={self.format.name}"


def swap_linears(model: nn.Module, names_to_quant: Mapping[str, QuantTensor]) -> None:
    """Replace nn.Linear modules by QuantLinear modules that hold the given weights.

    names_to_quant: module name (`transformer_blocks.0.attn1.to_q`) to its weight (N, K).  A bias
    stays what it was, on `meta` too, and is assigned afterwards under its old name.  All names and
    shapes are checked before the first module changes.  Raises ShapeError naming the module.
    """
    modules = dict(model.named_modules())
    swapped = {
        name: _quantized(name, modules.get(name), weight) for name, weight in names_to_quant.items()
    }
    for name, module in swapped.items():
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, module)


def swap_embeddings(
    model: nn.Module, tables: Mapping[str, QuantTensor], dtype: torch.dtype
) -> None:
    """Replace nn.Embedding modules by ones that keep the given tables (N, K) quantized.

    dtype: of what they return.  Raises ShapeError naming the module that a table does not fit.
    """
    for name, table in tables.items():
        module = model.get_submodule(name)
        if not isinstance(module, nn.Embedding) or tuple(module.weight.shape) != table.shape:
            raise ShapeError(f"{name}: the model has no embedding table of {table.shape}")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantEmbedding(table, dtype))


def row_pieces(rows: int, row_bytes: int) -> Iterator[slice]:
    """Cut `rows` rows of `row_bytes` decoded bytes into pieces of at most SCRATCH_BYTES."""
    fitting = SCRATCH_BYTES // row_bytes
    step = max(1, fitting // ROW_MULTIPLE * ROW_MULTIPLE or fitting)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _quantized(name: str, module: nn.Module | None, weight: QuantTensor) -> QuantLinear:
    if not isinstance(module, nn.Linear):
        found = "no module" if module is None else f"a {type(module).__name__}"
        raise ShapeError(
            f"{name}: {weight.format.name} weights belong to a Linear, but the model has {found} "
            "of that name; dequantize this tensor instead"
        )
    if tuple(module.weight.shape) != weight.shape:
        raise ShapeError(
            f"{name}: the {weight.format.name} weight is {weight.shape}, the model wants "
            f"{tuple(module.weight.shape)}; the file is of another model"
        )
    return QuantLinear(weight, module.bias)
