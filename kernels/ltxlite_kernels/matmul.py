"""Multiplies rows of codes: one kernel for int8, fp16 and fp8, which the wrappers launch.

Each kind of `configs.MATMUL` is an operator, `ltxlite::matmul_<kind>`. What wrappers promise
stands in `matmul_int8`, `matmul_fp16` and `matmul_fp8`. Twin: `reference_matmul.matmul`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import reference_matmul
from ltxlite_kernels.card import Card, card_of
from ltxlite_kernels.configs import MATMUL, MatmulConfig, matmul_config, matmul_parts
from ltxlite_kernels.quantize import FLOATS, runs_kernel
from ltxlite_kernels.rotate import HAVE_TRITON, Rotation
from ltxlite_kernels.rows import SHARED, Epilogue, ScaledRows, lookup
from ltxlite_quant.formats import FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from ltxlite_kernels.epilogue import finish

LARGE = Card(90, 132)  # an H200
# The tile of a program that adds up partial sums, and its warps: 16 results a thread.
REDUCE_M, REDUCE_N, REDUCE_WARPS = 16, 128, 4


def output_of(
    a: ScaledRows,
    w: ScaledRows | Tensor,
    codes: torch.dtype,
    out: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return `out`, or a new tensor of `dtype`, for a wᵀ; FormatError if the sides do not fit.

    codes: what both sides must consist of.  w: as a Tensor it has neither scales nor rotation.
    """
    turned = w.rotation if isinstance(w, ScaledRows) else Rotation.NONE
    right = w.codes if isinstance(w, ScaledRows) else w
    columns = a.codes.shape[1]
    if right.dim() != 2 or columns != right.shape[1] or a.rotation is not turned:
        raise FormatError(
            f"rows of K = {columns}, rotation {a.rotation.name}, cannot be multiplied by a weight "
            f"of {tuple(right.shape)}, rotation {turned.name}"
        )
    for tensor in operands_of(a, w):
        wanted = codes if tensor.dim() == 2 else torch.float32
        if tensor.dtype != wanted or not tensor.is_contiguous():
            raise FormatError(
                f"a product of contiguous {codes} rows, got {tensor.dtype}, stride "
                f"{tensor.stride()}"
            )
    shape = (len(a.codes), len(right))
    if out is None:
        return torch.empty(shape, dtype=dtype, device=right.device)
    _check_matrix("out", out, shape)
    return out


def operands_of(a: ScaledRows, w: ScaledRows | Tensor) -> list[Tensor]:
    """Return what an operator takes: codes and scales of a, codes of w, and its scales if any."""
    right = [w.codes, w.scales] if isinstance(w, ScaledRows) else [w]
    return [a.codes, a.scales, *right]


def multiply(
    kind: str, operands: Sequence[Tensor], bias: Tensor | None, epilogue: Epilogue, out: Tensor
) -> Tensor:
    """Write epilogue(a wᵀ + bias) into `out` and return it; FormatError if the end does not fit.

    kind: of `configs.MATMUL`.  operands: of `operands_of`, checked by `output_of`.
    """
    _check_end(tuple(out.shape), bias, epilogue)
    tail = [epilogue.gate, epilogue.index, epilogue.residual]
    operator = getattr(torch.ops.ltxlite, f"matmul_{kind}")
    operator.default(list(operands), bias, epilogue.gelu, tail, out)
    return out


def _check_end(shape: tuple[int, ...], bias: Tensor | None, epilogue: Epilogue) -> None:
    if bias is not None and (tuple(bias.shape) != shape[1:] or not bias.is_contiguous()):
        raise FormatError(f"a bias of {tuple(bias.shape)} does not fit {shape[1]} features")
    gate = epilogue.gate
    if gate is not None:
        _check_matrix("gate", gate, (len(gate), shape[1]))
        lookup(gate, epilogue.index, shape[0], "gate")
    elif epilogue.index is not None:
        raise FormatError("an epilogue has an index but no gate to look up")
    if epilogue.residual is not None:
        _check_matrix("residual", epilogue.residual, shape)


def _check_matrix(name: str, matrix: Tensor, shape: tuple[int, ...]) -> None:
    fits = tuple(matrix.shape) == shape and matrix.dtype in FLOATS
    if not fits or (matrix.stride(1) != 1 and shape[1] > 1):
        raise FormatError(
            f"{name} is {shape} fp32, fp16 or bf16 with columns side by side, got "
            f"{tuple(matrix.shape)} {matrix.dtype}, stride {matrix.stride()}"
        )


def _multiply_into(
    kind: str,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    gelu: bool,
    tail: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    # operands: codes and scales of both sides, or none of w.  tail: gate, index, residual.
    epilogue = Epilogue(gelu, *tail)
    if not runs_kernel(out):
        a = ScaledRows(operands[0], operands[1], Rotation.NONE)
        scaled = len(operands) > 3
        w = ScaledRows(operands[2], operands[3], Rotation.NONE) if scaled else operands[2]
        reference_matmul.matmul(a, w, bias, epilogue, out)
    elif out.numel():
        with torch.cuda.device_of(out):  # Triton launches on the current device
            _launch(kind, operands, bias, epilogue, out)


def _launch(
    kind: str, operands: Sequence[Tensor], bias: Tensor | None, epilogue: Epilogue, out: Tensor
) -> None:
    a, w = operands[0], operands[2]
    rows, features = out.shape
    columns = a.shape[1]
    card, adds = card_of(out), epilogue.gate is not None or epilogue.residual is not None
    config = matmul_config(kind, card, rows, features, adds)
    parts = matmul_parts(config, card, (rows, features), columns)
    sums = partial_sums(a, (parts, rows, features)) if parts > 1 else None
    end = _end(operands, bias, epilogue, out)
    grid = (config.tiles(rows, features), parts)
    _kernel[grid](a, w, sums, columns, **end, **constants(config, columns, parts))
    if sums is not None:
        grid = (triton.cdiv(rows, REDUCE_M), triton.cdiv(features, REDUCE_N))
        _reduce[grid](sums, **end, **reduce_constants(parts))


def _end(
    operands: Sequence[Tensor], bias: Tensor | None, epilogue: Epilogue, out: Tensor
) -> dict[str, Any]:
    gate, index, residual = epilogue.gate, epilogue.index, epilogue.residual
    return {
        **{"a_scales": operands[1], "w_scales": operands[3] if len(operands) > 3 else None},
        **{"bias": bias, "gate": gate, "index": index, "residual": residual, "out": out},
        **{"M": out.shape[0], "N": out.shape[1], "out_stride": out.stride(0)},
        "gate_stride": 0 if gate is None else gate.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        **end_constants(epilogue, len(out)),
    }


def partial_sums(a: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the scratch for sums over parts of K, (parts, M, N): at most 4.3 MB on an H200."""
    wide = torch.int32 if a.dtype == torch.int8 else torch.float32
    return torch.empty(shape, dtype=wide, device=a.device)


def workspace_bytes(
    _: None,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    gelu: bool,
    tail: Sequence[Tensor | None],
    out: Tensor,
) -> int:
    """Return the memory that an operator takes while it runs: partial sums, on a H200 most."""
    (rows, features), columns = out.shape, operands[0].shape[1]
    config = matmul_config("int8", LARGE, rows, features)
    parts = matmul_parts(config, LARGE, (rows, features), columns)
    return parts * rows * features * torch.int32.itemsize if parts > 1 else 0


def constants(config: MatmulConfig, columns: int, parts: int) -> dict[str, Any]:
    """Return what the kernel is compiled for, without the end."""
    return {
        "HALF": config.half,
        "PARTS": parts,
        "TAIL": columns % config.block_k != 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def reduce_constants(parts: int) -> dict[str, Any]:
    """Return what the kernel that adds up parts is compiled for, without the end."""
    shape = {"BLOCK_M": REDUCE_M, "BLOCK_N": REDUCE_N}
    return {"PARTS": parts, **shape, "num_warps": REDUCE_WARPS}


def end_constants(epilogue: Epilogue, rows: int) -> dict[str, Any]:
    """Return what the end of both kernels is compiled for."""
    gate, index = epilogue.gate, epilogue.index
    return {
        "GELU": epilogue.gelu,
        "LOOKUP": SHARED if gate is None else lookup(gate, index, rows, "gate"),
        "enable_fp_fusion": True,
    }


_library = torch.library.Library("ltxlite", "FRAGMENT")
for _kind in MATMUL:
    _library.define(
        f"matmul_{_kind}(Tensor[] operands, Tensor? bias, bool gelu, Tensor?[] tail, "
        "Tensor(a!) out) -> ()"
    )
    _library.impl(f"matmul_{_kind}", partial(_multiply_into, _kind), "CompositeExplicitAutograd")
    _library.impl(f"matmul_{_kind}", lambda *_: None, "Meta")


if HAVE_TRITON:

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
    def step(left, right, sums, HALF: tl.constexpr):  # noqa: N803
        """Add the products of left (BLOCK_M, BLOCK_K) and right (BLOCK_N, BLOCK_K) to sums."""
        # Weights as they lie, then turned: read as (k, n) triton 3.9 makes 336 byte shuffles and
        # 243 registers of the int8 loop on sm_86, instead of 4 and 122.
        right = tl.trans(right)
        if HALF:
            return sums + tl.dot(left, right, out_dtype=tl.float16).to(tl.float32)
        if left.dtype == tl.float8e4nv:
            # Tensor cores keep 13 bits of a sum of fp8, so they add up one step and fp32 the steps.
            # Without the limit Triton would take this addition into the product.
            limit: tl.constexpr = left.shape[1]
            product = tl.dot(left, right, out_dtype=tl.float32, max_num_imprecise_acc=limit)
            return sums + product
        return tl.dot(left, right, sums, out_dtype=sums.dtype)

    @triton.jit
    def _kernel(
        a,
        w,
        parts,
        K,  # noqa: N803
        a_scales,
        w_scales,
        bias,
        gate,
        index,
        residual,
        out,
        M,  # noqa: N803
        N,  # noqa: N803
        gate_stride,
        residual_stride,
        out_stride,
        GELU: tl.constexpr,  # noqa: N803
        LOOKUP: tl.constexpr,  # noqa: N803
        HALF: tl.constexpr,  # noqa: N803
        PARTS: tl.constexpr,  # noqa: N803
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
        part = tl.program_id(1)
        steps = K // BLOCK_K
        if PARTS > 1:
            first = steps * part // PARTS
            steps = steps * (part + 1) // PARTS - first
            offs_k += first * BLOCK_K
        # Rows beyond the last read the last one again: no masks in the loop, and none is stored.
        row, feature = tl.minimum(offs_m, M - 1), tl.minimum(offs_n, N - 1)
        a_at = a + row[:, None].to(tl.int64) * K + offs_k[None, :]
        w_at = w + feature[:, None].to(tl.int64) * K + offs_k[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if a.dtype.element_ty == tl.int8:
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for _ in range(0, steps):
            sums = step(tl.load(a_at), tl.load(w_at), sums, HALF)
            a_at += BLOCK_K
            w_at += BLOCK_K
        if TAIL:
            # Not offs_k < K % BLOCK_K: of a remainder triton 3.6 does not know that 16 divides it,
            # and would read single bytes.
            end = K
            if PARTS > 1:
                end = tl.where(part == PARTS - 1, K, 0)  # the last part has the tail
            inside = (K // BLOCK_K * BLOCK_K + tl.arange(0, BLOCK_K) < end)[None, :]
            left = tl.load(a_at, mask=inside, other=0.0)
            sums = step(left, tl.load(w_at, mask=inside, other=0.0), sums, HALF)
        # offs_m and masks instead of `row`, which would hide that columns lie side by side.
        if PARTS > 1:
            at = (part.to(tl.int64) * M + offs_m[:, None]) * N + offs_n[None, :]
            tl.store(parts + at, sums, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
        else:
            finish(
                sums, offs_m, offs_n, a_scales, w_scales, bias, gate, index, residual, out,
                M, N, gate_stride, residual_stride, out_stride, GELU, LOOKUP,
            )  # fmt: skip

    @triton.jit
    def _reduce(
        parts,
        a_scales,
        w_scales,
        bias,
        gate,
        index,
        residual,
        out,
        M,  # noqa: N803
        N,  # noqa: N803
        gate_stride,
        residual_stride,
        out_stride,
        GELU: tl.constexpr,  # noqa: N803
        LOOKUP: tl.constexpr,  # noqa: N803
        PARTS: tl.constexpr,  # noqa: N803
        BLOCK_M: tl.constexpr,  # noqa: N803
        BLOCK_N: tl.constexpr,  # noqa: N803
    ):
        offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        at = parts + offs_n[None, :]
        row = offs_m[:, None].to(tl.int64)
        sums = tl.load(at + row * N, mask=mask, other=0.0)
        for part in tl.static_range(1, PARTS):  # in order: the same bits each time
            sums += tl.load(at + (part * M + row) * N, mask=mask, other=0.0)
        finish(
            sums, offs_m, offs_n, a_scales, w_scales, bias, gate, index, residual, out,
            M, N, gate_stride, residual_stride, out_stride, GELU, LOOKUP,
        )  # fmt: skip
