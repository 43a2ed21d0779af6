"""Attention: int8 scores and fp16 values on prepared keys, or bf16 and fp16 as they come.

A GeForce card multiplies int8 at four times the rate of bf16, and fp16 summed in fp16 at twice
that. `attend` uses both: sums of 64 products at most are fp16, the rest is fp32. `attend_flash` is
the exact form, for few keys and for the modes that avoid int8. A bias is looked up by query, so
that no mask of (queries, keys) exists.
Twins: `reference_attention.attend`, `reference_attention.attend_flash`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

import math
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import quantize, reference_attention
from ltxlite_kernels.attention_inputs import (
    FLOATS,
    KEYS_PER_SCALE,
    LOWEST_BIAS,
    KeyBias,
    PreparedKeys,
    beside,
    bias_from,
    check_sequence,
)
from ltxlite_kernels.card import card_of
from ltxlite_kernels.configs import ATTENTION_HEAD_DIMS, AttentionConfig, attention_config
from ltxlite_kernels.rotate import HAVE_TRITON
from ltxlite_quant.formats import FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl


def attend(
    q: Tensor, keys: PreparedKeys, bias: KeyBias | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute softmax(q kᵀ / √D + bias) v per head, with q and k in int8.

    q: (B, t, H·D) fp32, fp16 or bf16, normalised and rotated; columns side by side, any other
    strides.  keys: of `attention_keys.prepare`.  bias: of R rows for all samples and heads.
    out: as q, or q itself; None for a new tensor of q's dtype.  Returns (B, t, H·D).
    A query is rounded to int8 by a scale of its own in each head.  Relative error .011 where scores
    have variance 1, .020 at variance 4 (4096 keys, kernels/README.md).  A query of which every key
    is masked gets the mean of all values; one that holds NaN gets NaN.
    D other than 64 and 128, and other devices than CUDA, are computed by the twin.
    Needs no memory besides.  Raises FormatError if anything does not fit.
    """
    check_sequence("q", q, keys.heads)
    out = _checked(q, keys.codes.shape, bias, out)
    tensors = [] if bias is None else bias.tensors()
    torch.ops.ltxlite.attend_int8.default(q, keys.tensors(), tensors, out)
    return out


def attend_flash(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    bias: KeyBias | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute softmax(q kᵀ / √D + bias) v per head, in the precision of q, k and v.

    q, bias and out: as for `attend`.  key, value: (B, S, H·D) of q's dtype, S at least 1.
    Sums are fp32.  Weights are rounded to that dtype before they multiply values: relative error
    .002 in bf16, .0003 in fp16.
    fp32, D other than 64 and 128, and other devices than CUDA, are computed by the twin.
    Needs no memory besides.  Raises FormatError if anything does not fit.
    """
    for name, x in (("q", q), ("key", key), ("value", value)):
        check_sequence(name, x, heads)
    if key.shape != value.shape or not q.dtype == key.dtype == value.dtype:
        raise FormatError(
            f"keys of {tuple(key.shape)} {key.dtype} and values of {tuple(value.shape)} "
            f"{value.dtype} are one shape, and queries of {q.dtype} one dtype with them"
        )
    out = _checked(q, key.shape, bias, out)
    tensors = [] if bias is None else bias.tensors()
    torch.ops.ltxlite.attend_flash.default([q, key, value], heads, tensors, out)
    return out


def _checked(q: Tensor, keys: torch.Size, bias: KeyBias | None, out: Tensor | None) -> Tensor:
    if q.shape[::2] != keys[::2]:
        raise FormatError(f"queries of {tuple(q.shape)} do not fit keys of {tuple(keys)}")
    if bias is not None:
        bias.check(q.shape[0], q.shape[1], keys[1])
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.shape != q.shape or out.dtype not in FLOATS or not beside(out):
        raise FormatError(
            f"out is {tuple(q.shape)} fp32, fp16 or bf16 with columns side by side, got "
            f"{tuple(out.shape)} {out.dtype}, stride {out.stride()}"
        )
    return out


def _int8_into(q: Tensor, keys: list[Tensor], bias: list[Tensor], out: Tensor) -> None:
    prepared = PreparedKeys(*keys)
    head_dim = q.shape[2] // prepared.heads
    if head_dim not in ATTENTION_HEAD_DIMS or not quantize.runs_kernel(q):
        reference_attention.attend(q, prepared, bias_from(bias), out)
        return
    scales = [prepared.scales, prepared.value_scales]
    _launch("int8", [q, prepared.codes, prepared.value, *scales], head_dim, bias, out)


def _flash_into(inputs: list[Tensor], heads: int, bias: list[Tensor], out: Tensor) -> None:
    q, key, value = inputs
    head_dim = q.shape[2] // heads
    fits = head_dim in ATTENTION_HEAD_DIMS and q.dtype != torch.float32
    if not fits or not HAVE_TRITON or not quantize.runs_kernel(q):
        reference_attention.attend_flash(q, key, value, heads, bias_from(bias), out)
        return
    _launch("flash", [q, key, value, None, None], head_dim, bias, out)


def _launch(kind: str, inputs: list[Any], head_dim: int, bias: list[Tensor], out: Tensor) -> None:
    # inputs: q, keys, values, and the scales of both if they are prepared.
    batch, queries, width = out.shape
    if not out.numel():
        return
    heads, keys = width // head_dim, inputs[1].shape[1]
    rows, ids = (*bias, None, None)[:2]
    if ids is not None:
        ids = ids.expand(batch, queries)
    looked_up = 1 if ids is None else len(rows)
    strides = [step for one in (*inputs[:3], out) for step in one.stride()[:2]]
    strides += [0 if one is None else one.stride(0) for one in (rows, ids)]
    card = card_of(out)
    config = attention_config(kind, card, head_dim, bool(bias), (queries, heads * batch))
    launch: Any = _kernel[config.tiles(queries), heads, batch * looked_up]
    given = (*inputs, rows, ids, out, queries, keys, looked_up, *strides)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        launch(*given, **constants(config, head_dim, keys))


def constants(config: AttentionConfig, head_dim: int, keys: int) -> dict[str, Any]:
    """Return what the kernel is compiled for."""
    return {
        "D": head_dim,
        "SCALE": math.log2(math.e) / math.sqrt(head_dim),
        "TAIL": keys % config.keys != 0,
        "BLOCK_M": config.queries,
        "BLOCK_N": config.keys,
        "HALF_SUMS": config.half_sums,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define("attend_int8(Tensor q, Tensor[] keys, Tensor[] bias, Tensor(a!) out) -> ()")
_library.define("attend_flash(Tensor[] inputs, int heads, Tensor[] bias, Tensor(a!) out) -> ()")
_library.impl("attend_int8", _int8_into, "CompositeExplicitAutograd")
_library.impl("attend_flash", _flash_into, "CompositeExplicitAutograd")
for _name in ("attend_int8", "attend_flash"):
    _library.impl(_name, lambda *_: None, "Meta")


if HAVE_TRITON:
    # Finite, so that no difference of two is NaN. A key that is not there lies below one that is
    # masked, or a tail would count in the mean of a row that is all masked.
    _LOWEST_BIAS: tl.constexpr = tl.constexpr(LOWEST_BIAS)
    ABSENT: tl.constexpr = tl.constexpr(4 * LOWEST_BIAS)
    LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
    _KEYS_PER_SCALE: tl.constexpr = tl.constexpr(KEYS_PER_SCALE)

    @triton.jit
    def _scored(query, keys, scale, bias, offs_n, S, MASKED: tl.constexpr):  # noqa: N803
        """Return scores (BLOCK_M, BLOCK_N), in units of log 2, and the largest of each row."""
        # (BLOCK_M, D) x (D, BLOCK_N)
        if query.dtype == tl.int8:
            raw = tl.dot(query, tl.trans(keys), out_dtype=tl.int32).to(tl.float32)
        else:
            raw = tl.dot(query, tl.trans(keys), out_dtype=tl.float32)
        scores = raw * scale[:, None]
        if bias is not None:
            # What masks the tail comes with the bias and costs nothing.
            if MASKED:
                added = tl.load(bias + offs_n, mask=offs_n < S, other=0.0).to(tl.float32)
            else:
                added = tl.load(bias + offs_n).to(tl.float32)
            # Not tl.maximum, which would hide NaN.
            added = tl.where(added < _LOWEST_BIAS, _LOWEST_BIAS, added) * LOG2_E
            added = tl.where(offs_n < S, added, ABSENT) if MASKED else added
            scores += added[None, :]
            top = tl.max(scores, 1)
        elif MASKED:
            scores = tl.where((offs_n < S)[None, :], scores, ABSENT)
            top = tl.max(scores, 1)
        else:
            # The largest of products is the product of the largest: a multiplication a row.
            top = tl.max(raw, 1) * scale
        return scores, top

    @triton.jit
    def _tile(
        query, scale, keys_at, values_at, bias, offs_n, S, largest, total, sums,  # noqa: N803
        MASKED: tl.constexpr, HALF_SUMS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """Take a tile of keys; total and sums are relative to the largest score of each row."""
        if MASKED:
            inside = (offs_n < S)[:, None]
            keys = tl.load(keys_at, mask=inside, other=0)
            values = tl.load(values_at, mask=inside, other=0)
        else:
            keys, values = tl.load(keys_at), tl.load(values_at)
        scores, top = _scored(query, keys, scale, bias, offs_n, S, MASKED)
        new = tl.maximum(largest, top)
        keep = tl.exp2(largest - new)
        weights = tl.exp2(scores - new[:, None])
        total = total * keep + tl.sum(weights, 1)
        # (BLOCK_M, BLOCK_N) x (BLOCK_N, D)
        if HALF_SUMS:
            part = tl.dot(weights.to(values.dtype), values, out_dtype=tl.float16)
            sums = sums * keep[:, None] + part.to(tl.float32)
        else:
            weights = weights.to(values.dtype)
            sums = tl.dot(weights, values, sums * keep[:, None], out_dtype=tl.float32)
        return new, total, sums

    @triton.jit
    def _mixed(
        query, step, key, value, key_scales, bias, S, key_row, value_row,  # noqa: N803
        D: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, HALF_SUMS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """Return the weighted mean (BLOCK_M, D) of all values of a head."""
        offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, D)[None, :]
        key_offs = offs_n[:, None] * key_row + offs_d
        value_offs = offs_n[:, None] * value_row + offs_d
        largest = tl.full((query.shape[0],), ABSENT, tl.float32)
        total = tl.zeros((query.shape[0],), tl.float32)
        sums = tl.zeros((query.shape[0], D), tl.float32)
        # Without a bias, masks would be a quarter more instructions in the loop: so the tail is
        # apart, and first, where sums are zero and need no registers (spills on sm_120).
        APART: tl.constexpr = tl.constexpr(TAIL and bias is None)  # noqa: N806
        whole = S // BLOCK_N * BLOCK_N
        if APART:
            scale = step
            if key_scales is not None:
                scale = step * tl.load(key_scales + whole // _KEYS_PER_SCALE)
            after = tl.cast(whole, tl.int64)  # of S = 1 triton makes a constant, which has no .to
            keys_at = key + after * key_row + key_offs
            values_at = value + after * value_row + value_offs
            largest, total, sums = _tile(
                query, scale, keys_at, values_at, bias, whole + offs_n, S,
                largest, total, sums, True, HALF_SUMS,
            )  # fmt: skip
        for first in range(0, whole if APART else S, BLOCK_N):
            scale = step
            if key_scales is not None:
                scale = step * tl.load(key_scales + first // _KEYS_PER_SCALE)
            largest, total, sums = _tile(
                query, scale, key + key_offs, value + value_offs, bias, first + offs_n, S,
                largest, total, sums, TAIL and not APART, HALF_SUMS,
            )  # fmt: skip
            key += BLOCK_N * key_row
            value += BLOCK_N * value_row
            if key_scales is not None:
                # Always so, but it ties `step` to the layout of `total`: else triton moves it
                # through shared memory in each turn, with a barrier.
                step = tl.where(total >= 0.0, step, 0.0)
        return sums * tl.div_rn(1.0, total)[:, None]

    @triton.jit
    def _kernel(
        q,
        key,
        value,
        key_scales,
        value_scales,
        bias,
        ids,
        out,
        T,  # noqa: N803
        S,  # noqa: N803
        rows,
        q_batch,
        q_row,
        key_batch,
        key_row,
        value_batch,
        value_row,
        out_batch,
        out_row,
        bias_row,
        ids_batch,
        D: tl.constexpr,  # noqa: N803
        SCALE: tl.constexpr,  # noqa: N803
        TAIL: tl.constexpr,  # noqa: N803
        BLOCK_M: tl.constexpr,  # noqa: N803
        BLOCK_N: tl.constexpr,  # noqa: N803
        HALF_SUMS: tl.constexpr,  # noqa: N803
    ):
        start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
        sample, row = (tl.program_id(2) // rows).to(tl.int64), tl.program_id(2) % rows
        offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, D)[None, :]
        mask_m = (offs_m < T - start)[:, None]
        if ids is not None:
            # Queries mostly lie in runs of one row, so that most programs of other rows end here.
            ids += sample * ids_batch + start
            own = tl.load(ids + offs_m, mask=offs_m < T - start, other=-1) == row
            if tl.max(own.to(tl.int32), 0) == 0:
                return
            bias += row.to(tl.int64) * bias_row
            mask_m = own[:, None]
        # 64 bits to the first row of a tile, 32 from there: half the registers for addresses.
        q += sample * q_batch + start.to(tl.int64) * q_row + head * D
        query = tl.load(q + offs_m[:, None] * q_row + offs_d, mask=mask_m, other=0.0)
        key += sample * key_batch + head * D
        value += sample * value_batch + head * D
        step = tl.full((BLOCK_M,), SCALE, tl.float32)
        if key_scales is not None:
            query = query.to(tl.float32)
            step = quantize.as_largest(tl.max(quantize.largest_bits(query), 1)) * quantize.INVERSE
            query = quantize.coded(query * tl.div_rn(1.0, step)[:, None])
            step *= SCALE
            key_scales += (sample * tl.num_programs(1) + head) * tl.cdiv(S, _KEYS_PER_SCALE)
        found = _mixed(
            query, step, key, value, key_scales, bias, S, key_row, value_row,
            D, TAIL, BLOCK_N, HALF_SUMS,
        )  # fmt: skip
        if value_scales is not None:
            value_scales += (sample * tl.num_programs(1) + head) * D
            found *= tl.load(value_scales + offs_d)
        out += sample * out_batch + start.to(tl.int64) * out_row + head * D
        tl.store(
            out + offs_m[:, None] * out_row + offs_d, found.to(out.dtype.element_ty), mask=mask_m
        )
