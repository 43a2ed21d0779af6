"""The table of what is timed: ceilings, decoding, linears; the rest is in `kernels_mixing`."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernels_torch_decode as torch_decode
from benchmarks.kernels_checks import BF16, FP8, INT8, has_fp8
from benchmarks.kernels_inputs import exact, random_blocks, turned
from benchmarks.kernels_run import Bench, Contender, Prepared, Trial, relative_error
from ltxlite_kernels import dequant, int8_weight, quantize
from ltxlite_kernels.coding import Coding
from ltxlite_kernels.configs import DEQUANT
from ltxlite_kernels.matmul_fp8 import matmul_fp8
from ltxlite_kernels.matmul_fp16 import matmul_fp16
from ltxlite_kernels.matmul_int8 import matmul_int8
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import ScaledRows
from ltxlite_quant.formats import FORMATS

FP16_ROWS, FP8_ROWS = Coding(torch.float16), Coding(FP8)
FP8_ERROR = 0.06  # e4m3 on both sides: 2^-4 / √12 of a value, twice
NF4_ERROR = 0.15  # of weights in four bits
FP16_MATH = 2.0**-7  # decoded in fp16 by three operations, then rounded to bf16
EDGE = 64  # first and last rows that are compared with float64, of products of many


def ceilings(small: bool) -> Iterator[Trial]:
    """Yield what nothing can exceed: a copy, and plain products of each type."""
    size = 64 if small else 8192
    nbytes = (1 << 20) if small else 2 << 30
    yield Trial("ceiling copy", "ceiling", {"bytes": nbytes}, partial(_copy, nbytes), 0, 2 * nbytes)
    for name in ("bf16", "fp16", "int8", "fp8"):
        build = partial(_square, name, size)
        facts = {"size": size, "dtype": name}
        yield Trial(f"ceiling {name}", "ceiling", facts, build, 2.0 * size**3, 0, name)


def _copy(nbytes: int, bench: Bench) -> Prepared:
    source = torch.ones(nbytes, dtype=torch.uint8, device=bench.device)
    target = torch.zeros_like(source)
    run = Contender("copy", lambda _: target.copy_(source), 0.0, "memory")
    return Prepared([run], lambda _: float((target[::4097] != 1).count_nonzero()))


def _square(name: str, size: int, bench: Bench) -> Prepared:
    a, b = bench.normal(size, size, seed=1), bench.normal(size, size, seed=2)
    if name == "int8":
        a8, b8 = (quantize.quantize_rows(one).codes for one in (a, b))
        run, values = (lambda _: torch._int_mm(a8, b8.T)), (a8, b8)
    elif name == "fp8":
        a8, b8 = (one.to(FP8) for one in (a, b))
        one = torch.ones((), device=bench.device)
        product = partial(torch._scaled_mm, a8, b8.T, one, one, out_dtype=torch.bfloat16)
        run, values = (lambda _: product(use_fast_accum=True)), (a8, b8)
    else:
        dtype = torch.float16 if name == "fp16" else torch.bfloat16
        a, b = a.to(dtype), b.to(dtype)
        run, values = (lambda _: a @ b.T), (a, b)
    wanted = values[0][:EDGE].double() @ values[1].double().T
    allowed = 0.0 if name == "int8" else BF16
    return Prepared([Contender(name, run, allowed)], lambda y: relative_error(y[:EDGE], wanted))


def decodings(small: bool) -> Iterator[Trial]:
    """Yield all formats to bf16 and to int8, in the shape of a feed-forward weight."""
    shape = (64, 1024) if small else (16384, 4096)
    elements = shape[0] * shape[1]
    for name in DEQUANT:
        packed = elements * FORMATS[name].bits_per_element / 8
        facts = {"format": name, "rows": shape[0], "columns": shape[1]}
        for kind, size, build in (("bf16", 2, _to_bf16), ("int8", 1, _to_int8)):
            yield Trial(
                f"dequant {name} {kind}",
                "dequant" if kind == "bf16" else "int8_weight",
                facts | {"dtype": kind},
                partial(build, name, shape),
                nbytes=packed + size * elements,
            )


def _to_bf16(name: str, shape: tuple[int, int], bench: Bench) -> Prepared:
    form = FORMATS[name]
    count = bench.copies(shape[0] * shape[1] * form.block_bytes // form.block_size)
    given = [random_blocks(bench, name, shape, seed) for seed in range(count)]
    wanted = exact(name, given[0], shape)
    out = torch.empty(shape, dtype=torch.bfloat16, device=bench.device)
    plain = torch.ones_like(out)

    def ours(turn: int) -> Tensor:
        return dequant.dequantize(given[turn % count], form, shape, torch.bfloat16, out)

    work = "dequant" if name == "Q4_K" else None
    found = [Contender("ltxlite", ours, BF16, work, ours=True)]
    if name in torch_decode.DECODERS:
        run: Callable[[int], Tensor] | None = lambda turn: torch_decode.decoded(  # noqa: E731
            name, given[turn % count], shape
        )
        found.append(Contender("torch ops", run, FP16_MATH))
    else:
        found.append(Contender("torch ops", None, missing="ComfyUI-GGUF does not read it"))
    found.append(Contender("copy of the output", lambda _: out.copy_(plain)))
    return Prepared(found, lambda y: relative_error(y, wanted))


def _to_int8(name: str, shape: tuple[int, int], bench: Bench) -> Prepared:
    form, rotation = FORMATS[name], Rotation.of(shape[1])
    count = bench.copies(shape[0] * shape[1] * form.block_bytes // form.block_size)
    given = [random_blocks(bench, name, shape, seed) for seed in range(count)]
    wanted = turned(exact(name, given[0], shape)[:EDGE], rotation)
    scales = [int8_weight.row_scales(one, form, shape[1], rotation) for one in given]
    codes = torch.empty(shape, dtype=torch.int8, device=bench.device)
    out = ScaledRows(codes, torch.empty_like(scales[0]), rotation)

    def ours(turn: int) -> ScaledRows:
        at = turn % count
        return int8_weight.int8_codes(given[at], form, scales[at], out)

    def error(rows: ScaledRows) -> float:
        return relative_error(rows.codes[:EDGE] * rows.scales[:EDGE, None], wanted)

    return Prepared([Contender("ltxlite", ours, INT8, ours=True)], error)


SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384), (2048, 2048))  # (N, K)
ROWS = (256, 1024, 6144, 8192, 32768)


def linears(small: bool) -> Iterator[Trial]:
    """Yield products of M token rows by a weight (N, K), rounding of activations included."""
    shapes, rows = (((96, 256),), (33,)) if small else (SHAPES, ROWS)
    for features, columns in shapes:
        for m in rows:
            facts = {"M": m, "N": features, "K": columns}
            build = partial(_linear, m, features, columns)
            flops = 2.0 * m * features * columns
            name = f"linear {m}x{features}x{columns}"
            yield Trial(name, "matmul_int8", facts, build, flops, 0, "bf16")


def _linear(m: int, features: int, columns: int, bench: Bench) -> Prepared:
    count = bench.copies(2 * columns * (m + features))
    xs = [bench.normal(m, columns, seed=seed) for seed in range(count)]
    ws = [bench.normal(features, columns, seed=99 + s) * columns**-0.5 for s in range(count)]
    wanted = torch.cat([xs[0][:EDGE], xs[0][-EDGE:]]).double() @ ws[0].double().T

    def error(y: Tensor) -> float:
        return relative_error(torch.cat([y[:EDGE], y[-EDGE:]]), wanted)

    found = [*_ours(bench, xs, ws), *_libraries(xs, ws), _bitsandbytes(xs, ws)]
    return Prepared(found, error)


def _ours(bench: Bench, xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Iterator[Contender]:
    """Yield our products of values, each with the rounding of its activations."""
    rotation, count = Rotation.of(xs[0].shape[1]), len(xs)
    int8 = [quantize.quantize_rows(w, rotation) for w in ws]

    def by_int8(turn: int) -> Tensor:
        return matmul_int8(quantize.quantize_rows(xs[turn % count], rotation), int8[turn % count])

    yield Contender("ltxlite int8", by_int8, INT8 * 1.5, "matmul int8", ours=True)
    fp16 = [w.half() for w in ws]

    def by_fp16(turn: int) -> Tensor:
        return matmul_fp16(quantize.quantize_rows(xs[turn % count], FP16_ROWS), fp16[turn % count])

    yield Contender("ltxlite fp16", by_fp16, BF16, "matmul fp16", ours=True)
    if not has_fp8(bench):
        yield Contender("ltxlite fp8", None, missing="this card has no fp8")
        return
    fp8 = [quantize.quantize_rows(w, FP8_ROWS) for w in ws]

    def by_fp8(turn: int) -> Tensor:
        return matmul_fp8(quantize.quantize_rows(xs[turn % count], FP8_ROWS), fp8[turn % count])

    yield Contender("ltxlite fp8", by_fp8, FP8_ERROR, "matmul fp8", ours=True)


def _libraries(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Iterator[Contender]:
    """Yield torch's own products; int8 and fp8 ones with the rounding, written in torch."""
    count = len(xs)
    yield Contender(
        "cuBLAS bf16", lambda t: F.linear(xs[t % count], ws[t % count]), BF16, "matmul bf16"
    )
    int8 = [quantize.quantize_rows(w) for w in ws]

    def int_mm(turn: int) -> Tensor:
        rows, w = quantize.quantize_rows(xs[turn % count]), int8[turn % count]
        sums = torch._int_mm(rows.codes, w.codes.T)
        return (sums * rows.scales[:, None] * w.scales).to(torch.bfloat16)

    # INT8: rows are not rotated here, and need not be: they are normal.
    yield Contender("_int_mm", int_mm, INT8 * 1.5)
    fp8 = [_fp8_rows(w) for w in ws]

    def scaled_mm(turn: int) -> Tensor:
        (a, a_scales), (w, w_scales) = _fp8_rows(xs[turn % count]), fp8[turn % count]
        return torch._scaled_mm(a, w.T, a_scales, w_scales.T, out_dtype=torch.bfloat16)

    yield Contender("_scaled_mm", scaled_mm, FP8_ERROR)


def _fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(dim=1, keepdim=True).float() / 448
    return (x / scales).to(FP8), scales


def _bitsandbytes(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Contender:
    name, count = "bitsandbytes nf4", len(xs)
    if not xs[0].is_cuda:
        return Contender(name, None, missing="needs a card")
    try:
        bnb: Any = importlib.import_module("bitsandbytes")
    except ImportError as error:
        return Contender(name, None, missing=f"not installed: {error}")
    packed = [bnb.functional.quantize_4bit(w, quant_type="nf4") for w in ws]

    def run(turn: int) -> Tensor:
        codes, state = packed[turn % count]
        out: Tensor = bnb.matmul_4bit(xs[turn % count], codes.t(), quant_state=state)
        return out

    return Contender(name, run, NF4_ERROR)
