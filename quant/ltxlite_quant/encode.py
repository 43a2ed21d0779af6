"""Values to blocks, by the reference quantizers: their bytes equal gguf-py's."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite_quant.formats import BlockFormat, FormatError, byte_shape
from ltxlite_quant.tensor import QuantTensor


def quantize(values: Tensor, block_format: BlockFormat) -> QuantTensor:
    """Quantize a tensor.

    values: (..., K) of any floating dtype, computed on in fp32.  Blocks stay on its device.
    Raises FormatError if K is not a whole number of blocks, if a value is not finite, or if a
    block's scale exceeds fp16.
    """
    encode = ENCODERS.get(block_format.name)
    if encode is None:
        raise FormatError(
            f"ltxlite cannot quantize to {block_format.name}; choose {', '.join(ENCODERS)}"
        )
    row_bytes = byte_shape(values.shape, block_format)[-1]
    blocks = encode(values.detach().reshape(-1, block_format.block_size).float())
    return QuantTensor(blocks.view(-1, row_bytes), block_format, tuple(values.shape))


def _encode_q8_0(values: Tensor) -> Tensor:
    # A tensor as divisor: CUDA turns division by a Python number into a product, one ULP off.
    scale = values.abs().amax(dim=1, keepdim=True) / values.new_full((), 127)  # (n, 1)
    stored = scale.half()
    if not stored.isfinite().all():
        raise FormatError("Q8_0 holds finite values up to 8.3e6; got a NaN, an infinity or more")
    # The codes use the scale as it was before rounding to fp16, like the reference.
    inverse = scale.reciprocal()
    inverse.masked_fill_(inverse.isinf(), 0)  # all-zero blocks
    codes = _round_half_away(values * inverse).to(torch.int8)
    return torch.cat([stored.view(torch.uint8), codes.view(torch.uint8)], dim=1)  # (n, 34)


def _round_half_away(values: Tensor) -> Tensor:
    whole = values.trunc()
    return whole + (2 * (values - whole)).trunc()


ENCODERS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"Q8_0": _encode_q8_0})
