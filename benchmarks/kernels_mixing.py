"""What is timed besides linears: attention, and kernels that fuse what lies between products."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels_checks import BF16, EPS, INT8
from benchmarks.kernels_checks_rows import FLASH, INT8_SCORES, attention_exactly
from benchmarks.kernels_inputs import turned
from benchmarks.kernels_run import Bench, Contender, Prepared, Trial, relative_error
from ltxlite_kernels.attention import attend, attend_flash
from ltxlite_kernels.attention_inputs import KeyBias
from ltxlite_kernels.attention_keys import prepare
from ltxlite_kernels.gate_heads import gate_heads_quantize
from ltxlite_kernels.norm_modulate import norm_modulate
from ltxlite_kernels.norm_rope import RopeTables, norm_rope
from ltxlite_kernels.norm_silu import norm_silu
from ltxlite_kernels.quantize import norm_modulate_quantize, quantize_rows
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import ScaledRows

SEEN = 48  # queries that are compared with float64


def attentions(small: bool) -> Iterator[Trial]:
    """Yield self-attention at three lengths, both head dims, and text attention with a bias."""
    heads = 2 if small else 32
    for head_dim in (128, 64):
        for tokens in (63,) if small else (6144, 14080, 32640):
            yield _attention((tokens, tokens, heads, head_dim), 0)
    for biased in (0, 5):
        yield _attention((65 if small else 14080, 40 if small else 1024, heads, 128), biased)


def _attention(shape: tuple[int, int, int, int], biased: int) -> Trial:
    queries, keys, heads, head_dim = shape
    facts = {"queries": queries, "keys": keys, "heads": heads, "head_dim": head_dim}
    name = f"attention {queries}x{keys} d{head_dim}" + (" biased" if biased else "")
    flops = 4.0 * queries * keys * heads * head_dim
    build = partial(_mixed, shape, biased)
    return Trial(name, "attention", facts | {"biases": biased}, build, flops, 0, "bf16")


def _mixed(shape: tuple[int, int, int, int], biased: int, bench: Bench) -> Prepared:
    queries, keys, heads, head_dim = shape
    width = heads * head_dim
    q = bench.normal(1, queries, width, seed=1)
    # Keys share an offset, as those of real networks do: int8 must not mind.
    k = bench.normal(1, keys, width, seed=2) + bench.normal(width, seed=3)
    v = bench.normal(1, keys, width, seed=4)
    bias = None
    if biased:  # prompt relay: a row of the table for each frame
        ids = torch.arange(queries, dtype=torch.int32, device=bench.device) % biased
        bias = KeyBias(-4 * bench.normal(biased, keys, seed=5).abs().float(), ids)
    extra = None if bias is None else _seen(bias.scores()[None])
    wanted = attention_exactly(_seen(q), k[0], v[0], heads, extra)
    own = queries == keys

    def int8(_: int) -> Tensor:
        return attend(q, prepare(k, v, heads), bias)

    def flash(_: int) -> Tensor:
        return attend_flash(q, k, v, heads, bias)

    work = "attention int8" if own and head_dim == 128 else None
    found = [
        Contender("ltxlite int8", int8, INT8_SCORES, work, ours=True),
        Contender("ltxlite flash", flash, FLASH, ours=True),
        *_sdpa((q, k, v), heads, bias),
    ]
    return Prepared(found, lambda y: relative_error(_seen(y), wanted))


def _sdpa(
    given: tuple[Tensor, Tensor, Tensor], heads: int, bias: KeyBias | None
) -> Iterator[Contender]:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in given)
    mask = None if bias is None else bias.scores().to(q.dtype)[None, None]

    def with_backend(backend: SDPBackend) -> Callable[[int], Tensor]:
        def run(_: int) -> Tensor:
            with sdpa_kernel(backend):
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return y.transpose(1, 2).flatten(2)

        return run

    if not q.is_cuda:
        yield Contender("SDPA", with_backend(SDPBackend.MATH), FLASH)
        return
    own = given[0].shape == given[1].shape and q.shape[-1] == 128
    work = "attention bf16" if own else None
    if bias is None:
        yield Contender("SDPA flash", with_backend(SDPBackend.FLASH_ATTENTION), FLASH, work)
    else:
        efficient = with_backend(SDPBackend.EFFICIENT_ATTENTION)
        yield Contender("SDPA efficient", efficient, FLASH)
    yield Contender("SDPA cuDNN", with_backend(SDPBackend.CUDNN_ATTENTION), FLASH)


def _seen(y: Tensor) -> Tensor:
    """Return a few queries, the first and last ones among them: (t, W)."""
    at = torch.linspace(0, y.shape[1] - 1, min(SEEN, y.shape[1]), device=y.device).long()
    return y[0, at]


def fusions(small: bool) -> Iterator[Trial]:
    """Yield what stands between products, beside torch's operations and a copy of as many bytes."""
    rows, width = (37, 256) if small else (14080, 4096)
    facts = {"rows": rows, "columns": width}
    elements = rows * width
    # Read, and written, of an element; tables and scales are less than a hundredth.
    for name, family, moved, build in (
        ("norm, modulate, int8", "quantize", 2 + 1, _norm_int8),
        ("norm, modulate, bf16", "norm_modulate", 2 + 2, _norm_bf16),
        ("gate heads, int8", "gate_heads", 2 + 1, _gate_int8),
        ("norm, rope", "norm_rope", 2 + 2, _norm_rope),
    ):
        yield Trial(
            f"fused {name}", family, facts, partial(build, rows, width), nbytes=moved * elements
        )
    shape = (1, 2, 128, 7, 9) if small else (1, 4, 256, 352, 640)  # frames of the VAE's finer half
    planes = partial(_norm_silu, shape)
    moved = 4 * math.prod(shape)
    yield Trial("fused norm, SiLU", "norm_silu", {"shape": list(shape)}, planes, nbytes=moved)
    wide = {"rows": rows, "columns": 4 * width}
    build = partial(_rows_int8, rows, 4 * width)
    yield Trial("fused int8 rows", "quantize", wide, build, nbytes=3 * 4 * elements)


def _beside_copy(moved: int, bench: Bench) -> Contender:
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=bench.device)
    target = torch.ones_like(source)
    return Contender("copy of as many bytes", lambda _: target.copy_(source))


def _of_rows(wanted: Tensor) -> Callable[[ScaledRows | Tensor], float]:
    """Return the error of the first rows, of codes or values."""

    def error(found: ScaledRows | Tensor) -> float:
        if isinstance(found, ScaledRows):
            found = found.codes[: len(wanted)] * found.scales[: len(wanted), None]
        return relative_error(found[: len(wanted)], wanted)

    return error


def _norm_int8(rows: int, width: int, bench: Bench) -> Prepared:
    x, shift, scale = _modulated(rows, width, bench)
    rotation = Rotation.of(width)

    def ours(_: int) -> ScaledRows:
        return norm_modulate_quantize(x, shift, scale, None, EPS, rotation)

    wanted = _exactly_modulated(x, shift, scale)
    exact, plain = _of_rows(turned(wanted, rotation)), _of_rows(wanted)
    found = [
        Contender("ltxlite", ours, INT8, ours=True),
        # Without rotation and rounding, which it has no names for.
        Contender("torch to bf16", _eagerly_modulated(x, shift, scale), 2 * BF16),
        _beside_copy(3 * rows * width, bench),
    ]
    return Prepared(found, lambda y: exact(y) if isinstance(y, ScaledRows) else plain(y))


def _norm_bf16(rows: int, width: int, bench: Bench) -> Prepared:
    x, shift, scale = _modulated(rows, width, bench)
    found = [
        Contender("ltxlite", lambda _: norm_modulate(x, shift, scale, None, EPS), BF16, ours=True),
        Contender("torch", _eagerly_modulated(x, shift, scale), 2 * BF16),
        _beside_copy(4 * rows * width, bench),
    ]
    return Prepared(found, _of_rows(_exactly_modulated(x, shift, scale)))


def _modulated(rows: int, width: int, bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
    x = bench.normal(rows, width, seed=1)
    return x, bench.normal(1, width, seed=2) * 0.3, bench.normal(1, width, seed=3) * 0.3


def _exactly_modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    wide = x[:64].double()
    wide = wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt()
    return wide * (1 + scale.double()) + shift.double()


def _eagerly_modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Callable[[int], Tensor]:
    shape = (x.shape[1],)
    return lambda _: torch.addcmul(shift, F.rms_norm(x, shape, None, EPS), 1 + scale)


def _gate_int8(rows: int, width: int, bench: Bench) -> Prepared:
    heads = width // 128
    x, logits = bench.normal(rows, width, seed=1), bench.normal(rows, heads, seed=2)
    rotation = Rotation.of(width)
    gates = 2 * logits[:64].double().sigmoid()
    gated = (x[:64].double().unflatten(1, (heads, -1)) * gates[..., None]).flatten(1)
    exact, plain = _of_rows(turned(gated, rotation)), _of_rows(gated)

    def eager(_: int) -> Any:
        return (x.unflatten(1, (heads, -1)) * (2 * logits.sigmoid())[..., None]).flatten(1)

    found = [
        Contender("ltxlite", lambda _: gate_heads_quantize(x, logits, rotation), INT8, ours=True),
        Contender("torch to bf16", eager, 2 * BF16),
        _beside_copy(3 * rows * width, bench),
    ]
    return Prepared(found, lambda y: exact(y) if isinstance(y, ScaledRows) else plain(y))


def _rows_int8(rows: int, width: int, bench: Bench) -> Prepared:
    x = F.gelu(bench.normal(rows, width, seed=1))
    rotation = Rotation.of(width)
    exact = _of_rows(turned(x[:64], rotation))
    found = [
        Contender("ltxlite", lambda _: quantize_rows(x, rotation), INT8, ours=True),
        _beside_copy(3 * rows * width, bench),
    ]
    return Prepared(found, exact)


def _norm_silu(shape: tuple[int, ...], bench: Bench) -> Prepared:
    x = bench.normal(*shape, seed=1)
    first = x[:, :1].double()
    first = first * (first.square().mean(2, keepdim=True) + EPS).rsqrt()
    wanted = first * first.sigmoid()

    def eager(_: int) -> Tensor:
        return F.silu(x * (x.float().square().mean(2, keepdim=True) + EPS).rsqrt().to(x.dtype))

    found = [
        Contender("ltxlite", lambda _: norm_silu(x, EPS), BF16, ours=True),
        Contender("torch", eager, 3 * BF16),
        _beside_copy(4 * x.numel(), bench),
    ]
    return Prepared(found, lambda y: relative_error(y[:, :1], wanted))


def _norm_rope(rows: int, width: int, bench: Bench) -> Prepared:
    heads = width // 128
    x = bench.normal(1, rows, width, seed=1)
    weight = 1 + 0.1 * bench.normal(width, seed=2)
    angles = bench.normal(110, heads, 64, seed=3, dtype=torch.float32)
    index = torch.arange(rows, dtype=torch.int32, device=bench.device)[None, :, None] % 110
    tables = RopeTables(angles.cos(), angles.sin(), index)
    first = x[0, :64].double()
    wide = first * (first.square().mean(1, keepdim=True) + EPS).rsqrt() * weight.double()
    low, high = wide.unflatten(1, (heads, 2, 64)).unbind(2)
    at = index[0, :64, 0].long()
    cosines, sines = angles.double().cos()[at], angles.double().sin()[at]
    turned_rows = torch.stack([low * cosines - high * sines, high * cosines + low * sines], dim=2)
    wanted = turned_rows.flatten(1)

    def eager(_: int) -> Any:
        normed = F.rms_norm(x, (width,), weight, EPS).float()
        a, b = normed.unflatten(2, (heads, 2, 64)).unbind(3)
        c, s = (table[index[..., 0].long()] for table in (tables.cosines, tables.sines))
        return torch.stack([a * c - b * s, b * c + a * s], dim=3).flatten(2).to(x.dtype)

    found = [
        Contender("ltxlite", lambda _: norm_rope(x, weight, tables, EPS), BF16, ours=True),
        Contender("torch", eager, 3 * BF16),
        _beside_copy(4 * rows * width, bench),
    ]
    return Prepared(found, lambda y: relative_error(y[0, :64], wanted))
