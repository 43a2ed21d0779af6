"""Gates what attention mixed, head by head, and rounds it for the matmul that takes it.

2 sigmoid(logit) doubles or closes a head. A row of 4096 is read once (8 KB) and written once
(4 KB of int8), where a gated copy in between would take 16 KB more.
Twins: `reference.quantize_rows` of `reference_rows.gated`, and `reference_rows.gate_heads`.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltxlite_kernels import quantize, reference, reference_rows
from ltxlite_kernels.coding import Coding
from ltxlite_kernels.rotate import HAVE_TRITON, Rotation
from ltxlite_kernels.rows import ScaledRows
from ltxlite_quant.formats import FormatError

if HAVE_TRITON:
    import triton
    import triton.language as tl


def gate_heads_quantize(
    mixed: Tensor, logits: Tensor | None, coding: Coding | Rotation = Rotation.NONE
) -> ScaledRows:
    """Multiply the heads of rows by 2 sigmoid(logits) and round the rows to codes.

    mixed: (R, H D) fp32, fp16 or bf16; columns side by side, any row stride.  logits: (R, H)
    floating, likewise; None for no gate.  coding: as of `quantize.quantize_rows`.
    fp32 arithmetic.  A code may differ from the twin's by one: exp is not rounded alike.
    Raises FormatError if anything does not fit.
    """
    if logits is None:
        return quantize.quantize_rows(mixed, coding)
    coding = Coding.of(coding)
    quantize.check_rows(mixed, coding.rotation)
    _check_logits(mixed, logits)
    found = quantize.empty_rows(mixed, coding)
    torch.ops.ltxlite.gate_heads_quantize.default(
        mixed, logits, int(coding.rotation), coding.largest, [found.codes, found.scales]
    )
    return found


def gate_heads(mixed: Tensor, logits: Tensor) -> Tensor:
    """Multiply the heads of rows by 2 sigmoid(logits), in place; returns `mixed`.

    mixed: (R, H D) and logits: (R, H) as for `gate_heads_quantize`.  fp32 arithmetic, rounded once.
    """
    quantize.check_rows(mixed)
    _check_logits(mixed, logits)
    torch.ops.ltxlite.gate_heads.default(mixed, logits)
    return mixed


def _check_logits(mixed: Tensor, logits: Tensor) -> None:
    fits = logits.dim() == 2 and len(logits) == len(mixed) and logits.dtype in quantize.FLOATS
    if not fits or (logits.stride(1) != 1 and logits.shape[1] > 1):
        raise FormatError(
            f"gates of {len(mixed)} rows are (R, H) fp32, fp16 or bf16 with columns side by side, "
            f"got {tuple(logits.shape)} {logits.dtype}, stride {logits.stride()}"
        )
    if not logits.shape[1] or mixed.shape[1] % logits.shape[1]:
        raise FormatError(f"a row of {mixed.shape[1]} has not {logits.shape[1]} heads of one size")


def _quantize_into(
    mixed: Tensor, logits: Tensor, rotation: int, limit: float, out: Sequence[Tensor]
) -> None:
    # out: codes, scales.
    codes, scales = out
    coding = Coding(codes.dtype, Rotation(rotation), limit)
    if not quantize.runs_kernel(mixed):
        found = reference.quantize_rows(reference_rows.gated(mixed, logits), coding)
        codes.copy_(found.codes)
        scales.copy_(found.scales)
    elif len(mixed):
        columns, heads = mixed.shape[1], logits.shape[1]
        given = quantize.row_constants(columns, coding) | {"HEAD": columns // heads}
        with torch.cuda.device_of(mixed):
            _gated_rows[(len(mixed),)](
                mixed, logits, codes, scales, columns, mixed.stride(0), logits.stride(0), **given
            )


def _gate_into(mixed: Tensor, logits: Tensor) -> None:
    if not quantize.runs_kernel(mixed):
        reference_rows.gate_heads(mixed, logits)
    elif len(mixed):
        columns, heads = mixed.shape[1], logits.shape[1]
        with torch.cuda.device_of(mixed):
            _gated_values[(len(mixed),)](
                mixed, logits, columns, mixed.stride(0), logits.stride(0),
                **constants(columns, heads),
            )  # fmt: skip


def constants(columns: int, heads: int) -> dict[str, Any]:
    """Return what the kernel without codes is compiled for."""
    given = quantize.row_constants(columns, Coding())
    kept = ("GROUPS", "WIDTH", "num_warps", "enable_fp_fusion")
    return {key: given[key] for key in kept} | {"HEAD": columns // heads}


_library = torch.library.Library("ltxlite", "FRAGMENT")
_library.define(
    "gate_heads_quantize(Tensor mixed, Tensor logits, int rotation, float limit, "
    "Tensor(a!)[] out) -> ()"
)
_library.define("gate_heads(Tensor(a!) mixed, Tensor logits) -> ()")
_library.impl("gate_heads_quantize", _quantize_into, "CompositeExplicitAutograd")
_library.impl("gate_heads", _gate_into, "CompositeExplicitAutograd")
for _name in ("gate_heads_quantize", "gate_heads"):
    _library.impl(_name, lambda *_: None, "Meta")


if HAVE_TRITON:

    @triton.jit
    def _gated(mixed, gates, columns, K, HEAD: tl.constexpr):  # noqa: N803
        """Read a row (G, WIDTH) and multiply it by its gates, whose logits start at `gates`."""
        GROUPS: tl.constexpr = columns.shape[0]  # noqa: N806
        WIDTH: tl.constexpr = columns.shape[1]  # noqa: N806
        mask = columns < K
        values = tl.load(mixed + columns, mask=mask, other=0.0).to(tl.float32)
        if HEAD <= WIDTH and WIDTH % HEAD == 0:
            # One load a head, where the general form has one a value.
            heads = tl.arange(0, GROUPS * (WIDTH // HEAD))
            logit = tl.load(gates + heads, mask=heads * HEAD < K, other=0.0).to(tl.float32)
            gate = tl.reshape(2.0 * tl.sigmoid(logit), (GROUPS, WIDTH // HEAD, 1))
            values = tl.reshape(values, (GROUPS, WIDTH // HEAD, HEAD)) * gate
            values = tl.reshape(values, (GROUPS, WIDTH))
        else:
            logit = tl.load(gates + columns // HEAD, mask=mask, other=0.0).to(tl.float32)
            values = values * (2.0 * tl.sigmoid(logit))
        return values

    @triton.jit
    def _gated_rows(
        mixed,
        logits,
        codes,
        scales,
        K,  # noqa: N803
        mixed_stride,
        logits_stride,
        ROTATION: tl.constexpr,  # noqa: N803
        STEP: tl.constexpr,  # noqa: N803
        GROUPS: tl.constexpr,  # noqa: N803
        WIDTH: tl.constexpr,  # noqa: N803
        HEAD: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        at, gates = mixed + row * mixed_stride, logits + row * logits_stride
        values = _gated(at, gates, columns, K, HEAD)
        quantize.store_codes(values, columns, row, codes, scales, K, ROTATION, STEP)

    @triton.jit
    def _gated_values(
        mixed,
        logits,
        K,  # noqa: N803
        mixed_stride,
        logits_stride,
        GROUPS: tl.constexpr,  # noqa: N803
        WIDTH: tl.constexpr,  # noqa: N803
        HEAD: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        at, gates = mixed + row * mixed_stride, logits + row * logits_stride
        values = _gated(at, gates, columns, K, HEAD)
        tl.store(at + columns, values.to(mixed.dtype.element_ty), mask=columns < K)
