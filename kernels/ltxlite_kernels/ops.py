"""The operations whose footprint on a card must be known, as torch operators, and those footprints.

On the meta device an operator says only what it returns. What its CUDA code needs besides while it
runs stands in `WORKSPACES`, as data, so that an allocation account run without a card sees the
card's memory: attention as softmax(q kᵀ) in full would be 64 GiB at 1920x1088x121, flash attention
needs 4 MiB. `FUSED` and `LIBRARIES` say the same of torch's own operations.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxlite_kernels import attention_keys, dequant, matmul
from ltxlite_kernels.configs import DEQUANT

Footprint = Callable[..., int]  # (the operation's result, its arguments) -> bytes

_library = torch.library.Library("ltxlite", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, bool causal=False, "
    "float? scale=None) -> Tensor"
)
_library.define("dequantize(Tensor blocks, str block_format, Tensor(a!) out) -> ()")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute softmax(scale q kᵀ + bias) v per head, as torch does, and let tools see the cost.

    q: (B, H, t, D).  k, v: (B, H, S, D), or fewer heads that groups of queries share.
    bias: additive, broadcast to (B, H, t, S).  causal: query i sees keys 0..i; without bias.
    scale: 1 / √D by default.  Returns (B, H, t, D).  Differentiable where gradients are recorded.
    Cost of being an operator: 3 µs a call on a CPU (torch 2.13).
    """
    if torch.is_grad_enabled():
        return _attention(q, k, v, bias, causal, scale)
    out: Tensor = torch.ops.ltxlite.attention.default(q, k, v, bias, causal, scale)
    return out


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    shared = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=shared
    )


def _attention_result(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    # Flash attention writes its result token by token, whatever the order of q.
    batch, heads, tokens = q.shape[:3]
    return q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)


def _no_result(*_: object) -> None:
    pass


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention", _attention_result, "Meta")
_library.impl("dequantize", dequant.decode_into, "CompositeExplicitAutograd")
_library.impl("dequantize", _no_result, "Meta")

# Key-value splits of flash attention: it takes them where tiles of 64 queries do not fill the
# card; the partial sums then fill it twice at most. 132 multiprocessors are an H200's.
_TILE, _MULTIPROCESSORS = 64, 132


def _attention_bytes(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *_: object
) -> int:
    """Return what flash attention, or with a bias the memory-efficient kernel, needs besides."""
    batch, heads, tokens, width = q.shape
    logsumexp = 4 * batch * heads * tokens
    tiles = batch * heads * math.ceil(tokens / _TILE)
    if bias is not None:
        return logsumexp
    if tiles >= 2 * _MULTIPROCESSORS:
        return logsumexp
    splits = min(2 * _MULTIPROCESSORS // tiles, math.ceil(k.shape[2] / _TILE))
    return logsumexp + (splits > 1) * splits * batch * heads * tokens * 4 * (width + 1)


def _prepare_keys_bytes(_: None, key: Tensor, *__: object) -> int:
    """Return two fp32 numbers a channel for each part of the sequence."""
    batch, keys, width = key.shape
    return 8 * batch * attention_keys.parts_of(keys)[1] * width


def _dequantize_bytes(_: None, blocks: Tensor, block_format: str, out: Tensor) -> int:
    """Return nothing for a kernel, the temporaries of a piece for plain torch."""
    if block_format in DEQUANT:
        return 0
    return min(out.numel(), dequant.PIECE_ELEMENTS) * dequant.PIECE_BYTES_PER_ELEMENT


def _norm_bytes(out: Tensor, x: Tensor, *_: object) -> int:
    return 4 * x.numel() // x.shape[-1]  # a root mean square a row


WORKSPACES: Mapping[Any, Footprint] = MappingProxyType(
    {
        torch.ops.ltxlite.attention.default: _attention_bytes,
        torch.ops.ltxlite.dequantize.default: _dequantize_bytes,
        torch.ops.ltxlite.prepare_keys.default: _prepare_keys_bytes,
        torch.ops.ltxlite.matmul_int8.default: matmul.workspace_bytes,
        torch.ops.ltxlite.matmul_fp16.default: matmul.workspace_bytes,
        torch.ops.ltxlite.matmul_fp8.default: matmul.workspace_bytes,
        torch.ops.aten.scaled_dot_product_attention.default: _attention_bytes,
        torch.ops.aten.rms_norm.default: _norm_bytes,
    }
)


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **named: Any,
) -> Tensor:
    return attention(q, k, v, attn_mask, is_causal, named.get("scale"))


def _fused_norm(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


# Compositions that CUDA runs as one kernel (rms_norm since torch 2.9), although meta and other
# devices run their parts.
FUSED: Mapping[Any, Callable[..., Tensor]] = MappingProxyType(
    {
        torch.ops.aten.scaled_dot_product_attention.default: _fused_attention,
        torch.ops.aten.rms_norm.default: _fused_norm,
    }
)

# torch's default on cards of compute capability 9; 8.1 MiB on others.
_CUBLAS_BYTES = 32 << 20


def _matmul_bytes(*_: object) -> int:
    return _CUBLAS_BYTES


def _convolution_bytes(out: Tensor, x: Tensor, weight: Tensor, *_: object) -> int:
    """Return copies of input, weight and result in the channels-last order of tensor cores.

    An assumption: cuDNN chooses its algorithm, hence its workspace, at run time.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return out.nbytes
    return x.numel() * x.itemsize + weight.numel() * weight.itemsize + out.nbytes


LIBRARIES: Mapping[Any, Footprint] = MappingProxyType(
    {
        torch.ops.aten.mm.default: _matmul_bytes,
        torch.ops.aten.addmm.default: _matmul_bytes,
        torch.ops.aten.bmm.default: _matmul_bytes,
        torch.ops.aten.baddbmm.default: _matmul_bytes,
        torch.ops.aten.convolution.default: _convolution_bytes,
    }
)
