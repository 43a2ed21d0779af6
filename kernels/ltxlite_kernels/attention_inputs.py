"""What the attention kernels take: prepared keys and values, and what is added to scores.

Both are made once for a sequence and serve all its queries, which come in chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxlite_quant.formats import FormatError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Keys that share a scale: a tile of the attention kernel, so it folds into the scale of a query.
# One for each key would lower the error by a fifth (.0113 to .0093, D = 128), and is a vector in
# the loop, as the row of a bias is: 736 instructions a tile instead of 545 on sm_86.
KEYS_PER_SCALE = 64

# A bias below counts as this much: finite, so that a row of nothing but masked keys is the mean of
# all values instead of NaN, as it is with the references' finite masks.
LOWEST_BIAS = -1e30


@dataclass(frozen=True, slots=True, eq=False)
class PreparedKeys:
    """Keys in int8 and values in fp16: of one sequence, for all its queries.

    codes: (B, S, H·D) int8, contiguous: keys less their mean over S, over their scale.
    scales: (B, H, ⌈S / 64⌉) fp32, of 64 keys of a head.
    value: (B, S, H·D) fp16, any row stride, less than 512 each, so that sums of 64 products with
    weights of 0 to 1 fit fp16.  value_scales: (B, H·D) fp32, a power of two of each channel.
    Softmax does not see the mean: it adds the same to all scores of a query.
    """

    codes: Tensor
    scales: Tensor
    value: Tensor
    value_scales: Tensor

    def __post_init__(self) -> None:
        batch, keys, width = self.codes.shape
        blocks = -(-keys // KEYS_PER_SCALE)
        fits = self.value.shape == self.codes.shape and self.value_scales.shape == (batch, width)
        fits &= self.scales.dim() == 3 and self.scales.shape[::2] == (batch, blocks)
        if not fits or self.codes.dtype != torch.int8 or self.value.dtype != torch.float16:
            shapes = [tuple(one.shape) for one in self.tensors()]
            raise FormatError(
                "prepared keys are codes (B, S, W) int8, scales (B, H, S / 64), value (B, S, W) "
                f"fp16 and its scales (B, W), got {shapes}, {self.codes.dtype}, {self.value.dtype}"
            )

    @property
    def heads(self) -> int:
        """Return H."""
        return self.scales.shape[1]

    def tensors(self) -> list[Tensor]:
        """Return all parts, in order."""
        return [self.codes, self.scales, self.value, self.value_scales]


@dataclass(frozen=True, slots=True, eq=False)
class KeyBias:
    """What is added to scores, in natural units, looked up by query: never a (t, S) tensor.

    rows: (R, S) floating, any row stride, columns side by side; below -1e30 counts as -1e30.
    row_ids: (t,) or (B, t) int32 in 0..R-1, the row of each query; None: row 0 for all.
    """

    rows: Tensor
    row_ids: Tensor | None = None

    def __post_init__(self) -> None:
        rows, ids = self.rows, self.row_ids
        if rows.dim() != 2 or rows.dtype not in FLOATS or not beside(rows) or not len(rows):
            raise FormatError(
                "rows of a key bias are (R, S) fp32, fp16 or bf16 with columns side by side, got "
                f"{tuple(rows.shape)} {rows.dtype}, stride {rows.stride()}"
            )
        if ids is not None and (ids.dtype != torch.int32 or ids.dim() not in (1, 2)):
            raise FormatError(
                f"row ids are (t,) or (B, t) int32, got {tuple(ids.shape)} {ids.dtype}"
            )

    def of(self, queries: slice) -> "KeyBias":
        """Return the bias of some queries, as a view."""
        ids = None if self.row_ids is None else self.row_ids[..., queries]
        return KeyBias(self.rows, ids)

    def scores(self) -> Tensor:
        """Return what is added: (1, S), (t, S) or (B, t, S) fp32."""
        ids = slice(1) if self.row_ids is None else self.row_ids.long()
        return self.rows[ids].float().clamp(min=LOWEST_BIAS)

    def tensors(self) -> list[Tensor]:
        """Return rows, and row ids if there are any."""
        return [self.rows] if self.row_ids is None else [self.rows, self.row_ids]

    def check(self, batch: int, queries: int, keys: int) -> None:
        """Raise FormatError unless this is a bias of so many queries and keys."""
        ids = self.row_ids
        fits = ids is None or ids.shape in ((queries,), (batch, queries))
        if self.rows.shape[1] != keys or not fits:
            raise FormatError(
                f"a key bias of {tuple(self.rows.shape)}, row ids "
                f"{None if ids is None else tuple(ids.shape)}, does not fit {batch} samples of "
                f"{queries} queries and {keys} keys"
            )


def bias_from(tensors: list[Tensor]) -> KeyBias | None:
    """Return the bias of `tensors()`; None of an empty list."""
    return KeyBias(*tensors) if tensors else None


def beside(x: Tensor) -> bool:
    """Tell whether columns lie side by side in memory."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


LONGEST_STRIDE = 1 << 24  # between tokens: 128 of a tile are addressed by 31 bits


def check_sequence(name: str, x: Tensor, heads: int) -> None:
    """Raise FormatError unless x is (B, S, H·D) floating with columns side by side."""
    fits = x.dim() == 3 and x.dtype in FLOATS and beside(x) and x.stride(1) < LONGEST_STRIDE
    if not fits or not all(x.shape[1:]) or heads < 1 or x.shape[2] % heads:
        raise FormatError(
            f"{name} is (B, tokens, {heads} heads x D) fp32, fp16 or bf16 with columns side by "
            f"side and at least one token, got {tuple(x.shape)} {x.dtype}, stride {x.stride()}"
        )
