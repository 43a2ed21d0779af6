"""Gives the linears and attentions of a transformer the arithmetic they compute in.

The choice is a table (`ltxlite_kernels.dispatch`) by mode, card and stored format; layers that were
measured to suffer (`math_errors`) are left in bf16.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from ltxlite.arithmetic import Arithmetic, Fp8, Fp16, Int8
from ltxlite.errors import RequestError
from ltxlite.linear import QuantLinear
from ltxlite.models.block import StreamBlock
from ltxlite.models.transformer import Transformer
from ltxlite_kernels.configs import ATTENTION_HEAD_DIMS
from ltxlite_kernels.dispatch import (
    FP8_FROM,
    INT8_ATTENTION_FROM,
    Math,
    Stored,
    attention_math,
    linear_math,
)
from ltxlite_kernels.rotate import HAVE_TRITON
from ltxlite_quant.formats import FORMATS, BlockFormat
from ltxlite_quant.scaled import SCALINGS
from ltxlite_quant.tensor import QuantTensor

ARITHMETICS: Mapping[Math, Arithmetic | None] = MappingProxyType(
    {Math.INT8: Int8(), Math.FP16: Fp16(), Math.FP8: Fp8(), Math.BF16: None}
)
_PLAIN = {item.dtype: item for item in FORMATS.values() if item.dtype is not None}


def capability_of(device: torch.device) -> int | None:
    """Return the compute capability of a card on which our kernels run, 86 for an RTX 3060."""
    if device.type != "cuda" or not HAVE_TRITON:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def set_math(
    network: Transformer, mode: str, capability: int | None, exact: Iterable[str] = ()
) -> dict[Math, int]:
    """Give every linear of the blocks its arithmetic; returns how many have which.

    mode: a name of `Math`.  exact: linears, or modules full of them, that stay in bf16, by name.
    Works before and behind LoRAs, and on meta.  Raises RequestError where a card cannot do what is
    asked.
    """
    mode = Math(mode)
    if mode is Math.FP8 and capability is not None and capability < FP8_FROM:
        raise RequestError(
            f"--math fp8: a card of compute capability {capability / 10} multiplies no fp8, that "
            f"begins with {FP8_FROM / 10} (RTX 40); --math int8 is faster there"
        )
    counts: Counter[Math] = Counter()
    spared = set(exact)
    for name, linear, owner, attribute in list(_linears(network)):
        math = linear_math(mode, capability, _kind(_format(linear)))
        if not spared.isdisjoint(itertools.accumulate(name.split("."), "{}.{}".format)):
            math = Math.BF16
        counts[math] += 1
        if (arithmetic := ARITHMETICS[math]) is not None:
            coded = linear if isinstance(linear, QuantLinear) else as_stored(linear)
            coded.arithmetic = arithmetic
            coded.scales, coded.measured = None, False
            setattr(owner, attribute, coded)
        elif isinstance(linear, QuantLinear):
            linear.arithmetic = None
    _set_attention(network, attention_math(mode, capability), capability)
    return dict(counts)


def _set_attention(network: Transformer, math: Math, capability: int | None) -> None:
    """Let long self-attention have int8 scores, where a kernel has heads of that size."""
    for block in nn.ModuleList.children(network.blocks):
        for stream in block.children():
            if not isinstance(stream, StreamBlock):
                continue
            module = stream.self_attention
            known = capability is None or module.head_dim in ATTENTION_HEAD_DIMS
            int8 = math is Math.INT8 and known
            module.int8_from = INT8_ATTENTION_FROM if int8 else None


def _linears(network: Transformer) -> "list[tuple[str, nn.Linear | QuantLinear, nn.Module, str]]":
    """Return name, module, owner and attribute of the base of every linear in the blocks."""
    found: list[tuple[str, nn.Linear | QuantLinear, nn.Module, str]] = []
    for number, block in enumerate(nn.ModuleList.children(network.blocks)):
        for name, module in block.named_modules():
            for attribute, child in module.named_children():
                if isinstance(child, nn.Linear | QuantLinear):
                    owner = f"{name}." if name else ""
                    whole = f"blocks.{number}.{owner}{attribute}".removesuffix(".base")
                    found.append((whole, child, module, attribute))
    return found


def _format(linear: nn.Linear | QuantLinear) -> BlockFormat:
    return linear.format if isinstance(linear, QuantLinear) else _PLAIN[linear.weight.dtype]


def _kind(block_format: BlockFormat) -> Stored:
    if block_format.name.startswith("F8_"):
        return Stored.FP8
    packed = block_format.is_quantized or block_format.name in SCALINGS
    return Stored.BLOCKS if packed else Stored.PLAIN


def as_stored(linear: nn.Linear) -> QuantLinear:
    """Return a plain linear as one whose weight is brought into codes when it is used."""
    weight = linear.weight.detach()
    rows = weight.contiguous().view(torch.uint8)
    return QuantLinear(QuantTensor(rows, _format(linear), tuple(weight.shape)), linear.bias)
