"""Checks of attention and of what stands between products; see `kernels_checks`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernels_checks import BF16, EPS, INT8, Check, Comparisons, Finding
from benchmarks.kernels_inputs import turned
from benchmarks.kernels_run import Bench, relative_error
from ltxlite_kernels.attention import attend, attend_flash
from ltxlite_kernels.attention_inputs import KeyBias
from ltxlite_kernels.attention_keys import prepare
from ltxlite_kernels.gate_heads import gate_heads, gate_heads_quantize
from ltxlite_kernels.norm_modulate import norm_modulate
from ltxlite_kernels.norm_rope import RopeTables, norm_rope
from ltxlite_kernels.norm_silu import norm_silu
from ltxlite_kernels.rotate import Rotation

FLASH = 0.012  # bf16 weights and values: .003 to .009 at 4096 keys (kernels.md 5)
INT8_SCORES = 0.035  # smoothed int8 scores: .013 to .029 there
HEADS = 3


def attention_exactly(
    q: Tensor, k: Tensor, v: Tensor, heads: int, extra: Tensor | None = None
) -> Tensor:
    """Return softmax(q kᵀ / √D + extra) v per head in float64; q (t, W), k and v (S, W).

    extra: (1 or t, S), what a bias adds to scores.
    """
    parts = []
    added = 0.0 if extra is None else extra.double()
    for head in zip(*(x.unflatten(-1, (heads, -1)).unbind(1) for x in (q, k, v)), strict=True):
        own, key, value = (x.double() for x in head)
        scores = own @ key.T / math.sqrt(own.shape[-1]) + added
        parts.append(scores.softmax(dim=-1) @ value)
    return torch.cat(parts, dim=-1)


def _attention(bench: Bench) -> Comparisons:
    """Odd numbers of queries and keys; keys share an offset; a key bias by row id masks some."""
    lengths = ((1, 1), (63, 129), (200, 70)) if bench.small else ((1, 1), (63, 129), (1111, 1025))
    for head_dim in (64, 128):
        for queries, keys in lengths:
            width = HEADS * head_dim
            q = bench.normal(1, queries, width, seed=1)
            k = bench.normal(1, keys, width, seed=2) + bench.normal(width, seed=3)
            v = bench.normal(1, keys, width, seed=4)
            for bias in (None, _bias(bench, queries, keys)):
                extra = None if bias is None else bias.scores()
                wanted = attention_exactly(q[0], k[0], v[0], HEADS, extra)
                case = f"d{head_dim} {queries}x{keys}" + ("" if bias is None else " biased")
                found = attend(q, prepare(k, v, HEADS), bias)[0]
                yield Finding(f"int8 {case}", relative_error(found, wanted), INT8_SCORES)
                found = attend_flash(q, k, v, HEADS, bias)[0]
                yield Finding(f"flash {case}", relative_error(found, wanted), FLASH)


def _bias(bench: Bench, queries: int, keys: int) -> KeyBias:
    rows = -3 * bench.normal(4, keys, seed=5).abs().float()
    rows[1, : keys // 2] = -1e30
    ids = torch.arange(queries, dtype=torch.int32, device=bench.device) % 4
    return KeyBias(rows, ids)


def _norm_modulate(bench: Bench) -> Comparisons:
    for columns in (2048, 4096):
        x = bench.normal(65, columns + 8, seed=1)[:, :columns]
        shift, scale = bench.normal(2, 3, columns, seed=2) * 0.5
        index = torch.arange(65, dtype=torch.int32, device=bench.device) % 3
        wide = x.double() * (x.double().square().mean(1, keepdim=True) + EPS).rsqrt()
        at = index.long()
        wanted = wide * (1 + scale[at].double()) + shift[at].double()
        found = norm_modulate(x, shift, scale, index, EPS)
        yield Finding(f"65x{columns}", relative_error(found, wanted), BF16)


def _norm_rope(bench: Bench) -> Comparisons:
    for width in (2048, 4096):
        heads, half, tokens = 32, width // 64, 67
        x = bench.normal(2, tokens, width, seed=1)
        weight = 1 + 0.1 * bench.normal(width, seed=2)
        angles = bench.normal(29, heads, half, seed=3, dtype=torch.float32)
        index = torch.arange(tokens, device=bench.device)[None, :, None] % 29
        tables = RopeTables(angles.cos(), angles.sin(), index.int())
        wide = x.double() * (x.double().square().mean(2, keepdim=True) + EPS).rsqrt()
        wide = wide * weight.double()
        low, high = wide.unflatten(2, (heads, 2, half)).unbind(3)
        turn = angles.double()[index[0, :, 0]]
        cosines, sines = turn.cos(), turn.sin()
        parts = [low * cosines - high * sines, high * cosines + low * sines]
        wanted = torch.stack(parts, dim=3).flatten(2)
        out = torch.full_like(x, torch.nan)
        norm_rope(x, weight, tables, EPS, out)
        yield Finding(f"turned 2x{tokens}x{width}", relative_error(out, wanted), BF16)
        found = norm_rope(x, weight, None, EPS)
        yield Finding(f"unturned 2x{tokens}x{width}", relative_error(found, wide), BF16)


def _norm_silu(bench: Bench) -> Comparisons:
    for channels, columns in ((128, 37), (512, 16), (1024, 5)):
        x = bench.normal(1, 3, channels, 7, columns, seed=1)
        wide = x.double()
        wide = wide * (wide.square().mean(2, keepdim=True) + EPS).rsqrt()
        wanted = wide * wide.sigmoid()
        out = torch.full_like(x, torch.nan)
        norm_silu(x, EPS, out)
        yield Finding(f"3x{channels}x7x{columns}", relative_error(out, wanted), BF16)
        apart = bench.normal(1, 3, channels, 7, columns + 3, seed=1)[..., :columns]
        wide = apart.double()
        wide = wide * (wide.square().mean(2, keepdim=True) + EPS).rsqrt()
        error = relative_error(norm_silu(apart, EPS), wide * wide.sigmoid())
        yield Finding(f"3x{channels}x7x{columns}, rows apart", error, BF16)


def _gate_heads(bench: Bench) -> Comparisons:
    for width in (2048, 4096):
        x, logits = bench.normal(65, width, seed=1), bench.normal(65, 32, seed=2)
        gates = 2 * logits.double().sigmoid()
        wanted = (x.double().unflatten(1, (32, -1)) * gates[..., None]).flatten(1)
        for rotation in Rotation:
            rows = gate_heads_quantize(x, logits, rotation)
            values = rows.codes.double() * rows.scales.double()[:, None]
            error = relative_error(values, turned(wanted, rotation))
            yield Finding(f"65x{width} {rotation.name}", error, INT8)
        yield Finding(f"65x{width} bf16", relative_error(gate_heads(x, logits), wanted), BF16)


CHECKS: Sequence[Check] = (
    Check("attention", _attention),
    Check("norm_modulate", _norm_modulate),
    Check("norm_rope", _norm_rope),
    Check("gate_heads", _gate_heads),
    Check("norm_silu", _norm_silu),
)
