"""Cuts large linears by rows, so that they too can be streamed."""

from collections.abc import Iterable

from torch import nn

from ltxlite.linear import QuantLinear
from ltxlite.models.layers import RowPieces
from ltxlite_quant.formats import BlockFormat
from ltxlite_quant.tensor import QuantTensor

PIECE_BYTES = 64 << 20  # stored; 170 rows of the text projection in bf16


def cut_linears(network: nn.Module, names: Iterable[str], limit: int = PIECE_BYTES) -> None:
    """Replace linears by rows of smaller ones, of at most `limit` stored bytes each.

    Pieces are views: nothing is copied. A format whose scales are apart stays whole.
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        pieces = nn.ModuleList(_pieces(network.get_submodule(name), limit))
        setattr(network.get_submodule(parent), child, RowPieces(pieces))


def _pieces(linear: nn.Module, limit: int) -> Iterable[nn.Module]:
    if isinstance(linear, QuantLinear):
        if linear.part_names:
            return [linear]
        row_bytes = linear.blocks.shape[1]
    elif type(linear) is nn.Linear:
        row_bytes = linear.in_features * linear.weight.element_size()
    else:
        return [linear]  # with low-rank terms beside it
    step = max(1, limit // row_bytes)
    starts = range(0, linear.out_features, step)
    return [_rows(linear, slice(start, start + step)) for start in starts]


def _rows(linear: nn.Linear | QuantLinear, rows: slice) -> nn.Module:
    bias = None if linear.bias is None else linear.bias[rows]
    if isinstance(linear, QuantLinear):
        blocks = linear.blocks[rows]
        kind: BlockFormat = linear.format
        return QuantLinear(QuantTensor(blocks, kind, (len(blocks), linear.columns)), bias)
    weight = linear.weight[rows]
    piece = nn.Linear(linear.in_features, len(weight), bias is not None, device="meta")
    piece.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        piece.bias = nn.Parameter(bias, requires_grad=False)
    return piece
