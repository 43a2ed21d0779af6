"""Multiplies int8 rows on the int8 tensor cores, four times the rate of bf16 on a GeForce card.

The sum over K is exact in int32; scales, bias, GELU, gate and residual follow in fp32 before the
result is written once. cuBLAS returns the int32 sums: 8 bytes of traffic an output more.
Twin: `reference.matmul_int8`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import reference
from ltxlite_kernels.configs import MatmulConfig, matmul_int8_config
from ltxlite_kernels.quantize import FLOATS, runs_kernel
from ltxlite_kernels.rotate import HAVE_TRITON, Rotation
from ltxlite_kernels.rows import INDEXED, PLAIN, SHARED, Epilogue, ScaledRows, lookup
from ltxlite_quant.formats import FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl

LARGEST_SUM_COLUMNS = (1 << 31) // (127 * 127)  # of K: beyond, int32 might overflow
INTERPRETED = 86  # what the interpreter pretends to be


def matmul_int8(
    a: ScaledRows,
    w: ScaledRows,
    bias: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply token rows by the rows of a weight.

    a: (M, K).  w: (N, K), of the same rotation.  bias: (N,) floating.  out: (M, N) floating, any
    row stride, columns side by side, or None for a new one of `dtype`.
    Returns epilogue(a wᵀ + bias): with `a` and `w` exact, the error is that of fp32 and of the
    rounding to the output's dtype.  Raises FormatError if anything does not fit.
    """
    _check_rows(a, w)
    shape = (len(a.codes), len(w.codes))
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=a.codes.device)
    _check_outputs(shape, bias, epilogue, out)
    operands = [a.codes, a.scales, w.codes, w.scales]
    tail = [epilogue.gate, epilogue.index, epilogue.residual]
    torch.ops.ltxlite.matmul_int8.default(operands, bias, epilogue.gelu, tail, out)
    return out


def _check_rows(a: ScaledRows, w: ScaledRows) -> None:
    columns = a.codes.shape[1]
    if columns != w.codes.shape[1] or a.rotation is not w.rotation:
        raise FormatError(
            f"rows of K = {columns}, rotation {a.rotation.name}, cannot be multiplied by rows of "
            f"K = {w.codes.shape[1]}, rotation {w.rotation.name}"
        )
    if columns > LARGEST_SUM_COLUMNS:
        raise FormatError(f"K = {columns} may overflow int32; at most {LARGEST_SUM_COLUMNS}")
    for rows in (a, w):
        if not rows.codes.is_contiguous() or not rows.scales.is_contiguous():
            raise FormatError(f"int8 rows must be contiguous, got stride {rows.codes.stride()}")


def _check_outputs(
    shape: tuple[int, int], bias: Tensor | None, epilogue: Epilogue, out: Tensor
) -> None:
    if bias is not None and (bias.shape != shape[1:] or not bias.is_contiguous()):
        raise FormatError(f"a bias of {tuple(bias.shape)} does not fit {shape[1]} features")
    gate = epilogue.gate
    if gate is not None:
        _check_matrix("gate", gate, (len(gate), shape[1]))
        lookup(gate, epilogue.index, shape[0], "gate")
    elif epilogue.index is not None:
        raise FormatError("an epilogue has an index but no gate to look up")
    for name, matrix in (("residual", epilogue.residual), ("out", out)):
        if matrix is not None:
            _check_matrix(name, matrix, shape)


def _check_matrix(name: str, matrix: Tensor, shape: tuple[int, int]) -> None:
    fits = tuple(matrix.shape) == shape and matrix.dtype in FLOATS
    if not fits or (matrix.stride(1) != 1 and shape[1] > 1):
        raise FormatError(
            f"{name} is {shape} fp32, fp16 or bf16 with columns side by side, got "
            f"{tuple(matrix.shape)} {matrix.dtype}, stride {matrix.stride()}"
        )


def _multiply_into(
    operands: Sequence[Tensor],
    bias: Tensor | None,
    gelu: bool,
    tail: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    # operands: codes and scales of both sides.  tail: gate, index, residual.
    a, a_scales, w, w_scales = operands
    gate, index, residual = tail
    epilogue = Epilogue(gelu, gate, index, residual)
    if not runs_kernel(a):
        left, right = (ScaledRows(c, s, Rotation.NONE) for c, s in ((a, a_scales), (w, w_scales)))
        reference.matmul_int8(left, right, bias, epilogue, out)
        return
    rows, features = out.shape
    if not out.numel():
        return
    adds = gate is not None or residual is not None
    config = matmul_int8_config(_capability(a), rows, adds)
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(features, config.block_n),)
    gate_stride, residual_stride = (0 if t is None else t.stride(0) for t in (gate, residual))
    with torch.cuda.device_of(a):  # Triton launches on the current device
        _kernel[grid](
            a, a_scales, w, w_scales, bias, gate, index, residual, out,
            rows, features, a.shape[1], gate_stride, residual_stride, out.stride(0),
            **constants(config, a.shape[1], epilogue, rows),
        )  # fmt: skip


def _capability(a: Tensor) -> int:
    if not a.is_cuda:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(a.device)
    return 10 * major + minor


def constants(config: MatmulConfig, columns: int, epilogue: Epilogue, rows: int) -> dict[str, Any]:
    """Return what the kernel is compiled for."""
    gate, index = epilogue.gate, epilogue.index
    return {
        "GELU": epilogue.gelu,
        "LOOKUP": SHARED if gate is None else lookup(gate, index, rows, "gate"),
        "TAIL": columns % config.block_k != 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define(
    "matmul_int8(Tensor[] operands, Tensor? bias, bool gelu, Tensor?[] tail, Tensor(a!) out) -> ()"
)
_library.impl("matmul_int8", _multiply_into, "CompositeExplicitAutograd")
_library.impl("matmul_int8", lambda *_: None, "Meta")


if HAVE_TRITON:
    _SHARED, _INDEXED = tl.constexpr(SHARED), tl.constexpr(INDEXED)

    @triton.jit
    def gelu(x):
        """Return GELU, tanh form, by a sigmoid; below -80 that is 0 in fp32 anyway."""
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(tl.maximum(inner, -80.0))

    @triton.jit
    def tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):  # noqa: N803
        """Return this program's tile: GROUP tile rows go through all columns together."""
        program = tl.program_id(0)
        across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
        first = program // (GROUP * across) * GROUP
        high = tl.minimum(down - first, GROUP)
        within = program % (GROUP * across)
        return first + within % high, within // high

    @triton.jit
    def _kernel(
        a,
        a_scales,
        w,
        w_scales,
        bias,
        gate,
        index,
        residual,
        out,
        M,  # noqa: N803
        N,  # noqa: N803
        K,  # noqa: N803
        gate_stride,
        residual_stride,
        out_stride,
        GELU: tl.constexpr,  # noqa: N803
        LOOKUP: tl.constexpr,  # noqa: N803
        TAIL: tl.constexpr,  # noqa: N803
        BLOCK_M: tl.constexpr,  # noqa: N803
        BLOCK_N: tl.constexpr,  # noqa: N803
        BLOCK_K: tl.constexpr,  # noqa: N803
        GROUP: tl.constexpr,  # noqa: N803
    ):
        down, across = tile(M, N, BLOCK_M, BLOCK_N, GROUP)
        offs_m = down * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = across * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        # Rows beyond the last read the last one again: no masks in the loop, and none is stored.
        row, feature = tl.minimum(offs_m, M - 1), tl.minimum(offs_n, N - 1)
        a_at = a + row[:, None].to(tl.int64) * K + offs_k[None, :]
        w_at = w + feature[:, None].to(tl.int64) * K + offs_k[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for _ in range(0, K // BLOCK_K):
            # Weights as they lie, then turned: read as (k, n) triton 3.9 makes 336 byte shuffles
            # and 243 registers of this loop on sm_86, instead of 4 and 122.
            sums = tl.dot(tl.load(a_at), tl.trans(tl.load(w_at)), sums, out_dtype=tl.int32)
            a_at += BLOCK_K
            w_at += BLOCK_K
        if TAIL:
            # Not offs_k < K % BLOCK_K: of a remainder triton 3.6 does not know that 16 divides it,
            # and would read single bytes.
            inside = (K // BLOCK_K * BLOCK_K + offs_k < K)[None, :]
            left = tl.load(a_at, mask=inside, other=0)
            right = tl.load(w_at, mask=inside, other=0)
            sums = tl.dot(left, tl.trans(right), sums, out_dtype=tl.int32)
        # Masks instead of `feature`, which would hide from Triton that columns lie side by side.
        kept_m, kept_n = offs_m < M, offs_n < N
        y = sums.to(tl.float32) * tl.load(a_scales + offs_m, mask=kept_m, other=0.0)[:, None]
        y = y * tl.load(w_scales + offs_n, mask=kept_n, other=0.0)[None, :]
        if bias is not None:
            y += tl.load(bias + offs_n, mask=kept_n, other=0.0).to(tl.float32)[None, :]
        if GELU:
            y = gelu(y)
        mask = kept_m[:, None] & kept_n[None, :]
        if gate is not None:
            if LOOKUP == _SHARED:
                y *= tl.load(gate + offs_n, mask=kept_n, other=0.0).to(tl.float32)[None, :]
            else:
                at = tl.load(index + row) if LOOKUP == _INDEXED else row
                gate_at = gate + at[:, None].to(tl.int64) * gate_stride + offs_n[None, :]
                y *= tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
        offs_m = offs_m.to(tl.int64)[:, None]
        if residual is not None:
            residual_at = residual + offs_m * residual_stride + offs_n[None, :]
            y += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
        out_at = out + offs_m * out_stride + offs_n[None, :]
        tl.store(out_at, y.to(out.dtype.element_ty), mask=mask)
