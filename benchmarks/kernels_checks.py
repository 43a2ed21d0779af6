"""What kernels compute, against float64: fresh random data, poisoned outputs, odd tails.

A check is a row of CHECKS: the kernel's family and a function from a bench to pairs of a case and
its error over what is allowed; a new kernel is a new row. Tolerances are derived beside each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels_inputs import exact, random_blocks, turned
from benchmarks.kernels_run import UNABLE, Bench, poisoned, relative_error, said
from ltxlite_kernels import dequant, int8_weight, quantize
from ltxlite_kernels.coding import Coding
from ltxlite_kernels.configs import DEQUANT
from ltxlite_kernels.matmul_fp8 import matmul_fp8, matmul_fp8_capped
from ltxlite_kernels.matmul_fp16 import matmul_fp16
from ltxlite_kernels.matmul_int8 import matmul_int8
from ltxlite_kernels.rotate import Rotation
from ltxlite_kernels.rows import PLAIN, Epilogue, ScaledRows
from ltxlite_quant.formats import FORMATS

BF16 = 2.0**-8  # half a unit in the last place of 8 bits is 2^-9; twice that for the norm of many
FP8 = torch.float8_e4m3fn
INT8 = 0.02  # a step is absmax / 127; a 12th of its square over rows whose absmax is 4 to 7 rms
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison."""

    case: str
    error: float
    allowed: float

    @property
    def good(self) -> bool:
        """Whether the error is a number, and allowed."""
        return self.error <= self.allowed


Comparisons = Iterator[Finding]


def has_fp8(bench: Bench) -> bool:
    """Tell whether the card multiplies fp8; a CPU's twins do."""
    return not bench.cuda or torch.cuda.get_device_capability() >= (8, 9)


@dataclass(frozen=True, slots=True)
class Check:
    """A kernel and its comparisons."""

    family: str
    compare: Callable[[Bench], Comparisons]


def run(check: Check, bench: Bench) -> list[Finding]:
    """Return all findings of a check, on poisoned memory."""
    with poisoned():
        return findings(check, bench)


def findings(check: Check, bench: Bench) -> list[Finding]:
    """Return all findings of a check; an error of its kernel is one that nothing allows."""
    found: list[Finding] = []
    try:
        with torch.inference_mode():
            found.extend(check.compare(bench))
    except UNABLE as error:
        found.append(Finding(f"{check.family}: {said(error)}", float("nan"), 0.0))
    return found


def _dequant(bench: Bench) -> Comparisons:
    """Decoded values have the bits of the decoder: fusion of products and sums is off."""
    for name in DEQUANT:
        shape = (37, 3 * 256)
        blocks = random_blocks(bench, name, shape, seed=1)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            out = torch.full(shape, torch.nan, dtype=dtype, device=bench.device)
            dequant.dequantize(blocks, FORMATS[name], shape, dtype, out)
            wanted = exact(name, blocks, shape).to(dtype)
            wrong = (out != wanted).count_nonzero() / wanted.numel()
            yield Finding(f"{name} to {dtype}, 37x768", float(wrong), 0.0)


def _int8_weight(bench: Bench) -> Comparisons:
    for name in DEQUANT:
        for rotation in Rotation:
            shape = (67, 4 * 256)
            blocks = random_blocks(bench, name, shape, seed=2)
            rows = int8_weight.int8_rows(blocks, FORMATS[name], shape[1], rotation)
            values = rows.codes.double() * rows.scales.double()[:, None]
            wanted = turned(exact(name, blocks, shape), rotation)
            yield Finding(f"{name} {rotation.name} 67x1024", relative_error(values, wanted), INT8)


def _quantize(bench: Bench) -> Comparisons:
    for columns in (256, 2048, 4096, 16384):
        for rotation in Rotation:
            wide = bench.normal(33, columns + 64, seed=3)
            x = wide[:, :columns]  # rows lie apart
            rows = quantize.quantize_rows(x, rotation)
            values = rows.codes.double() * rows.scales.double()[:, None]
            error = relative_error(values, turned(x, rotation))
            yield Finding(f"rows {columns} {rotation.name}", error, INT8)


def _norm(bench: Bench) -> Comparisons:
    for columns in (2048, 4096):
        for rotation in Rotation:
            x = bench.normal(65, columns, seed=4)
            shift, scale = bench.normal(2, 3, columns, seed=5) * 0.5
            index = torch.arange(65, dtype=torch.int32, device=bench.device) % 3
            rows = quantize.norm_modulate_quantize(x, shift, scale, index, EPS, rotation)
            wide = x.double() * (x.double().square().mean(1, keepdim=True) + EPS).rsqrt()
            at = index.long()
            wanted = turned(wide * (1 + scale[at].double()) + shift[at].double(), rotation)
            values = rows.codes.double() * rows.scales.double()[:, None]
            yield Finding(f"norm {columns} {rotation.name}", relative_error(values, wanted), INT8)


def _values(rows: ScaledRows) -> Tensor:
    return rows.codes.double() * rows.scales.double()[:, None]


def _matmul(multiply: Callable[..., Tensor], coding: Coding, bench: Bench) -> Comparisons:
    """Compare products of codes: sums err by less than 5e-4 whatever the type, bf16 rounds once."""
    if coding.dtype == FP8 and not has_fp8(bench):
        return
    shapes: tuple[tuple[int, int, int], ...] = (
        (1, 64, 256),
        (63, 129, 1040),
        (300, 264, 512),
    )
    if not bench.small:
        shapes += ((1100, 2048, 4096), (2049, 4096, 16384), (4096, 512, 4096), (126, 2048, 8192))
    for m, n, k in shapes:
        a, w = (
            quantize.quantize_rows(bench.normal(count, k, seed=seed), coding)
            for count, seed in ((m, 6), (n, 7))
        )
        given: Tensor | ScaledRows = w
        if coding.dtype == torch.float16:  # a decoded weight as it is
            given = (bench.normal(n, k, seed=7) * k**-0.5).half()
        right = given.double() if isinstance(given, Tensor) else _values(given)
        for ending, epilogue, bias in _endings(bench, m, n):
            out = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=bench.device)
            multiply(a, given, bias, epilogue, out)
            wanted = _ended(_values(a) @ right.T, bias, epilogue)
            yield Finding(f"{m}x{n}x{k} {ending}", relative_error(out, wanted), BF16)


def _endings(bench: Bench, m: int, n: int) -> Iterator[tuple[str, Epilogue, Tensor | None]]:
    bias, gate = bench.normal(n, seed=8), bench.normal(2, n, seed=9)
    index = torch.arange(m, dtype=torch.int32, device=bench.device) % 2
    yield "plain", PLAIN, None
    yield "bias, GELU", Epilogue(gelu=True), bias
    yield "gate, residual", Epilogue(False, gate, index, bench.normal(m, n, seed=10)), bias


def _ended(y: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    if bias is not None:
        y = y + bias.double()
    if epilogue.gelu:
        y = F.gelu(y, approximate="tanh")
    if epilogue.gate is not None and epilogue.index is not None:
        y = y * epilogue.gate.double()[epilogue.index.long()]
    return y if epilogue.residual is None else y + epilogue.residual.double()


CHECKS: Sequence[Check] = (
    Check("dequant", _dequant),
    Check("int8_weight", _int8_weight),
    Check("quantize", _quantize),
    Check("quantize", _norm),
    Check("matmul_int8", partial(_matmul, matmul_int8, Coding())),
    Check("matmul_fp16", partial(_matmul, matmul_fp16, Coding(torch.float16))),
    Check("matmul_fp8", partial(_matmul, matmul_fp8, Coding(FP8))),
    Check("matmul_fp8", partial(_matmul, matmul_fp8_capped, Coding(FP8, limit=28.0))),
)
