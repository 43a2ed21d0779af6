"""A quantized weight that a safetensors file spreads over several tensors, as one tensor."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxlite.checkpoint.config import parse_json
from ltxlite.checkpoint.stored import StoredTensor
from ltxlite.errors import CheckpointError
from ltxlite_quant.formats import BlockFormat, byte_shape
from ltxlite_quant.scaled import scaling_of, tiles_shape
from ltxlite_quant.tensor import QuantTensor

# Bytes of an unscaled fp8 weight that are searched for codes only a scaled one has. The largest of
# a million gaussian values is within 20 % of the largest of the whole weight.
_SEARCHED = 1 << 20
_LARGEST_OFFSET = 1e30  # a mean of scales; those of Gemma are below 1


@dataclass(frozen=True, slots=True)
class BlockState:
    """What bitsandbytes writes as JSON beside a 4-bit weight.

    block, nested_block: elements, respectively scales, of the flattened tensor that share a scale.
    """

    shape: tuple[int, ...]
    block: int
    nested_block: int = 0
    nested_offset: float = 0.0

    @classmethod
    def from_json(cls, text: str, where: str) -> "BlockState":
        """Parse and check it; CheckpointError names what is wrong."""
        state = parse_json(text, where)
        shape, offset = state.get("shape"), state.get("nested_offset", 0.0)
        block, nested = state.get("blocksize"), state.get("nested_blocksize", 0)
        if not isinstance(shape, list) or len(shape) != 2:
            raise CheckpointError(f"{where}: wanted a shape of a matrix, got {text!r:.120}")
        if type(offset) not in (int, float) or not abs(offset) <= _LARGEST_OFFSET:
            raise CheckpointError(f"{where}: wanted a nested_offset, a number, got {text!r:.120}")
        if not all(type(size) is int and 0 <= size < 1 << 31 for size in (*shape, block, nested)):
            raise CheckpointError(f"{where}: wanted shape and block sizes, got {text!r:.120}")
        if not block:
            raise CheckpointError(f"{where}: blocksize must be at least 1, got {block}")
        return cls((shape[0], shape[1]), block, nested, float(offset))


@dataclass(frozen=True, slots=True)
class PackedTensor(StoredTensor):
    """Codes and the tensors they cannot be read without.

    container, entry: of the codes.  logical: shape of the weight.  packing: its format.
    companions: the others, by the part they become.  state: of bitsandbytes' 4-bit weights.
    limit: a larger value proves that an fp8 weight without scale has lost it.
    """

    logical: tuple[int, ...]
    packing: BlockFormat
    companions: Mapping[str, StoredTensor]
    state: BlockState | None = None
    limit: float = math.inf

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape; of padded formats, with the padding."""
        return self.logical

    @property
    def format(self) -> BlockFormat:
        """How it is stored."""
        return self.packing

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors in the file."""
        return sum(piece.entry.nbytes for piece in self.pieces)

    @property
    def pieces(self) -> tuple[StoredTensor, ...]:
        """Every tensor of the file that it consists of, codes first."""
        return (StoredTensor(self.container, self.entry), *self.companions.values())

    def load(self) -> QuantTensor:
        """Read it; codes and tiled scales are zero-copy. Raises CheckpointError for lost scales."""
        row_bytes = byte_shape(self.logical, self.packing, self.entry.name)[-1]
        codes = self.pieces[0].values().view(torch.uint8)
        blocks = codes.reshape(-1, row_bytes) if codes.numel() else codes.new_empty(0, row_bytes)
        if self.packing.dtype is not None:
            self._refuse_lost_scale(blocks, self.packing.dtype)
        scaling = scaling_of(self.packing)
        names = (*scaling.parts, *scaling.optional)
        raw = {part: item.values() for part, item in self.companions.items() if part in names}
        if self.state is None:
            parts = _row_parts(raw, self.packing, self.logical)
        else:
            parts = block_parts(raw, self.state)
        return QuantTensor(blocks, self.packing, self.logical, parts)

    def check(self) -> None:
        """Raise CheckpointError unless the sizes of all tensors agree; reads none of them."""
        where = f"{self.container.path}: {self.entry.name}"
        if math.prod(byte_shape(self.logical, self.packing, where)) != self.entry.nbytes:
            raise CheckpointError(
                f"{where} has {self.entry.nbytes} bytes, which are not {list(self.logical)} of "
                f"{self.packing.name}; the file is damaged"
            )
        for part, wanted in self._sizes().items():
            if part not in self.companions:
                continue
            entry = self.companions[part].entry
            if math.prod(entry.shape) not in wanted:
                raise CheckpointError(
                    f"{self.container.path}: {entry.name} is {list(entry.shape)}, a "
                    f"{self.packing.name} weight {list(self.logical)} needs "
                    f"{' or '.join(map(str, sorted(wanted)))} values; the file is damaged"
                )

    def _sizes(self) -> dict[str, set[int]]:
        """Return how many values each part may have."""
        if self.state is not None:
            scales = -(-math.prod(self.logical) // self.state.block)
            nested = -(-scales // max(1, self.state.nested_block))
            return {
                "scale": {scales},
                "code": {16},
                "nested_scale": {nested},
                "nested_code": {256},
            }
        sizes = {"scale": {1} if len(self.logical) < 2 else {1, self.logical[0]}}
        if "scale_tiles" in self.companions:
            sizes |= {"scale": {1}, "scale_tiles": {-1}}
        if "scale_tiles" in self.companions and len(self.logical) == 2:
            sizes["scale_tiles"] = {math.prod(tiles_shape(self.packing, self.logical))}
        return sizes | {"column_scale": {self.logical[-1] if self.logical else 1}}

    def _refuse_lost_scale(self, blocks: Tensor, dtype: torch.dtype) -> None:
        if not blocks.numel():
            return
        largest = (blocks.flatten()[:_SEARCHED] & 0x7F).amax().view(dtype).item()
        if not largest < self.limit:
            raise CheckpointError(
                f"{self.container.path}: scale tensor missing for {self.entry.name}: its fp8 codes "
                f"reach {largest:g}, which no weight does; the file was repacked without its "
                "scales, download the original"
            )


def _row_parts(
    raw: Mapping[str, Tensor], packing: BlockFormat, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    parts = {}
    for part, values in raw.items():
        if part == "scale_tiles":
            parts[part] = values.view(torch.uint8).reshape(tiles_shape(packing, shape))
        elif part == "column_scale":
            parts[part] = values.float().reshape(1, -1)
        else:
            each = values.float().reshape(-1, 1)
            repeats = math.prod(shape[:-1]) // len(each) if len(each) > 1 else 1
            parts[part] = each if repeats == 1 else each.repeat_interleave(repeats, dim=0)
    return parts


def block_parts(raw: Mapping[str, Tensor], state: BlockState) -> dict[str, Tensor]:
    """Return the parts of a bitsandbytes weight with every scale in the row that it serves."""
    rows, columns = state.shape
    scale = _by_rows(raw["scale"].flatten(), state.block, rows, columns)
    parts = {"scale": scale, "code": raw["code"].float().reshape(1, 16)}
    if "nested_scale" not in raw:
        return parts | {"scale": scale.float()}
    covered = state.block // math.gcd(state.block, columns) * state.nested_block
    nested = _by_rows(raw["nested_scale"].float().flatten(), covered, rows, scale.shape[1])
    return parts | {
        "nested_scale": nested,
        "nested_code": raw["nested_code"].float().reshape(1, 256),
        "nested_offset": torch.tensor([[state.nested_offset]], dtype=torch.float32),
    }


def _by_rows(values: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """Lay values, each of `size` elements of the flattened matrix, out as (rows, n).

    Blocks that cross rows are repeated in pieces, so that rows can be decoded alone; those of
    Gemma do not, and nothing is copied.
    """
    step = math.gcd(size, columns)
    repeats = size // step
    spread = values if repeats == 1 else values.repeat_interleave(repeats)
    return spread[: rows * (columns // step)].view(rows, columns // step)
