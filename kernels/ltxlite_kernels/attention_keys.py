"""Prepares keys and values once a sequence: keys to int8, values to a range fp16 can sum.

Keys lose their mean over the sequence first, which softmax does not see and int8 would: an offset
that all keys share takes most of the codes. Two launches: sums and maxima, then the conversion.
Twin: `reference_attention.prepare_into`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import quantize, reference_attention
from ltxlite_kernels.attention_inputs import KEYS_PER_SCALE, PreparedKeys, check_sequence
from ltxlite_kernels.configs import ATTENTION_HEAD_DIMS, ATTENTION_PREPARE_WARPS
from ltxlite_kernels.rotate import HAVE_TRITON
from ltxlite_quant.formats import FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl

# Parts of a sequence that are summed apart: with 32 heads 512 programs, three for each of an H200's
# multiprocessors. The conversion adds 16 numbers a channel, in the same order every time.
PARTS = 16
ROWS = 32  # read at a time for sums


def prepare(key: Tensor, value: Tensor, heads: int, reuse: bool = False) -> PreparedKeys:
    """Prepare keys and values of a whole sequence for `attention.attend`.

    key, value: (B, S, H·D) fp32, fp16 or bf16, columns side by side, any other strides; the keys
    normalised and rotated.  S at least 1.  reuse: let the result's value lie in the memory of
    `value`, which is lost, if its elements have two bytes.
    Keys are off by half a step of absmax / 127 of 64 keys of a head.  Values are exact from fp16
    and bf16, down to 2^-22 of the largest of a channel; smaller ones by 2^-33 of it.
    D other than 64 and 128, and other devices than CUDA, are computed by the twin.
    Needs 8·B·min(16, ⌈S / 64⌉)·H·D bytes while it runs.  Raises FormatError if it does not fit.
    """
    check_sequence("key", key, heads)
    check_sequence("value", value, heads)
    if key.shape != value.shape:
        raise FormatError(
            f"values of {tuple(value.shape)} do not belong to keys of {tuple(key.shape)}"
        )
    out = _empty(key, value, heads, reuse)
    torch.ops.ltxlite.prepare_keys.default(key, value, out.tensors())
    return out


def _empty(key: Tensor, value: Tensor, heads: int, reuse: bool) -> PreparedKeys:
    batch, keys, width = key.shape
    codes = torch.empty(key.shape, dtype=torch.int8, device=key.device)
    scales = codes.new_empty(batch, heads, -(-keys // KEYS_PER_SCALE), dtype=torch.float32)
    value_scales = scales.new_empty(batch, width)
    if reuse and value.itemsize == 2:
        return PreparedKeys(codes, scales, value.view(torch.float16), value_scales)
    halves = codes.new_empty(key.shape, dtype=torch.float16)
    return PreparedKeys(codes, scales, halves, value_scales)


def _prepare_into(key: Tensor, value: Tensor, out: list[Tensor]) -> None:
    prepared = PreparedKeys(*out)
    batch, keys, width = key.shape
    head_dim = width // prepared.heads
    if head_dim not in ATTENTION_HEAD_DIMS or not quantize.runs_kernel(key):
        reference_attention.prepare_into(key, value, prepared)
        return
    rows, parts = parts_of(keys)
    sums = torch.empty(2, batch, parts, width, device=key.device)
    strides = (*key.stride()[:2], *value.stride()[:2])
    add: Any = _sums[prepared.heads, parts, batch]
    convert: Any = _converted[prepared.scales.shape[2], prepared.heads, batch]
    with torch.cuda.device_of(key):  # Triton launches on the current device
        add(key, value, *sums, keys, rows, *strides, **constants(head_dim, ROWS))
        strides += prepared.value.stride()[:2]
        given = constants(head_dim, KEYS_PER_SCALE) | {"PARTS": PARTS}
        convert(key, value, *sums, *out, keys, parts, *strides, **given)


def parts_of(keys: int) -> tuple[int, int]:
    """Return the rows of a part that is summed by a program, whole blocks, and the parts."""
    blocks = -(-keys // KEYS_PER_SCALE)
    rows = -(-blocks // PARTS) * KEYS_PER_SCALE
    return rows, -(-keys // rows)


def constants(head_dim: int, rows: int) -> dict[str, Any]:
    """Return what both kernels are compiled for: rows are those of a tile."""
    return {
        "D": head_dim,
        "ROWS": rows,
        "num_warps": ATTENTION_PREPARE_WARPS,
        "enable_fp_fusion": False,
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define("prepare_keys(Tensor key, Tensor value, Tensor(a!)[] out) -> ()")
_library.impl("prepare_keys", _prepare_into, "CompositeExplicitAutograd")
_library.impl("prepare_keys", lambda *_: None, "Meta")


if HAVE_TRITON:
    LARGEST_VALUE: tl.constexpr = tl.constexpr(reference_attention.LARGEST_VALUE)

    @triton.jit
    def _sums(
        key,
        value,
        sums,
        largest,
        S,  # noqa: N803
        rows,
        key_batch,
        key_row,
        value_batch,
        value_row,
        D: tl.constexpr,  # noqa: N803
        ROWS: tl.constexpr,  # noqa: N803
    ):
        head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        columns = head * D + tl.arange(0, D)
        total = tl.zeros((ROWS, D), tl.float32)
        found = tl.zeros((ROWS, D), tl.int32)
        key_at = key + sample * key_batch + columns[None, :]
        value_at = value + sample * value_batch + columns[None, :]
        for first in range(part * rows, tl.minimum((part + 1) * rows, S), ROWS):
            row = (first + tl.arange(0, ROWS))[:, None]
            wide = row.to(tl.int64)
            total += tl.load(key_at + wide * key_row, mask=row < S, other=0.0).to(tl.float32)
            values = tl.load(value_at + wide * value_row, mask=row < S, other=0.0)
            # Of the bits, so that NaN is the largest.
            found = tl.maximum(found, quantize.largest_bits(values.to(tl.float32)))
        out = (sample * tl.num_programs(1) + part) * (tl.num_programs(0) * D) + columns
        tl.store(sums + out, tl.sum(total, 0))
        tl.store(largest + out, tl.max(found, 0).to(tl.float32, bitcast=True))

    @triton.jit
    def _converted(
        key,
        value,
        sums,
        largest,
        codes,
        scales,
        value_out,
        value_scales,
        S,  # noqa: N803
        parts,
        key_batch,
        key_row,
        value_batch,
        value_row,
        out_batch,
        out_row,
        D: tl.constexpr,  # noqa: N803
        PARTS: tl.constexpr,  # noqa: N803
        ROWS: tl.constexpr,  # noqa: N803
    ):
        block, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        heads = tl.num_programs(1)
        columns = head * D + tl.arange(0, D)
        width = heads * D
        part = tl.arange(0, PARTS)[:, None]
        part_at = (sample * parts + part) * width + columns[None, :]
        mean = tl.sum(tl.load(sums + part_at, mask=part < parts, other=0.0), 0)
        mean = tl.div_rn(mean, tl.cast(S, tl.float32))
        top = tl.load(largest + part_at, mask=part < parts, other=0.0)
        top = quantize.as_largest(tl.max(quantize.largest_bits(top), 0))
        row = (block * ROWS + tl.arange(0, ROWS))[:, None]
        wide, inside = row.to(tl.int64), row < S

        # (ROWS, D): keys of a head that share a scale.
        key_at = key + sample * key_batch + wide * key_row + columns[None, :]
        keys = tl.load(key_at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        keys = tl.where(inside, keys, 0.0)
        step = quantize.as_largest(tl.max(tl.max(quantize.largest_bits(keys), 1), 0))
        step = step * quantize.INVERSE
        tl.store(scales + (sample * heads + head) * tl.num_programs(0) + block, step)
        code_at = codes + (sample * S + wide) * width + columns[None, :]
        tl.store(code_at, quantize.coded(keys * tl.div_rn(1.0, step)), mask=inside)

        power = quantize.power_of_two(top)
        value_at = value + sample * value_batch + wide * value_row + columns[None, :]
        values = tl.load(value_at, mask=inside, other=0.0).to(tl.float32)
        values = values * tl.div_rn(LARGEST_VALUE, power)[None, :]
        out_at = value_out + sample * out_batch + wide * out_row + columns[None, :]
        tl.store(out_at, values.to(tl.float16), mask=inside)
        if block == 0:
            tl.store(value_scales + sample * width + columns, power / LARGEST_VALUE)
