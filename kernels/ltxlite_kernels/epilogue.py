"""Ends a matmul in registers: scales, bias, GELU, gate, residual, and one store of the result.

Device code, shared by all matmuls; what it means is `reference_matmul.finished`. A tile of 4096 x
4096 bf16 outputs that made its gate and residual in kernels of their own would move it four times.
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from ltxlite_kernels.rotate import HAVE_TRITON
from ltxlite_kernels.rows import INDEXED, SHARED

if HAVE_TRITON:
    import triton
    import triton.language as tl

    _SHARED, _INDEXED = tl.constexpr(SHARED), tl.constexpr(INDEXED)

    @triton.jit
    def gelu(x):
        """Return GELU, tanh form, by a sigmoid; below -80 that is 0 in fp32 anyway."""
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(tl.maximum(inner, -80.0))

    @triton.jit
    def finish(
        sums,
        offs_m,
        offs_n,
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
    ):
        """Turn a tile's sums at rows (BLOCK_M,) and columns (BLOCK_N,) into results; store them."""
        kept_m, kept_n = offs_m < M, offs_n < N
        mask = kept_m[:, None] & kept_n[None, :]
        y = sums.to(tl.float32) * tl.load(a_scales + offs_m, mask=kept_m, other=0.0)[:, None]
        if w_scales is not None:
            y = y * tl.load(w_scales + offs_n, mask=kept_n, other=0.0)[None, :]
        if bias is not None:
            y += tl.load(bias + offs_n, mask=kept_n, other=0.0).to(tl.float32)[None, :]
        if GELU:
            y = gelu(y)
        if gate is not None:
            if LOOKUP == _SHARED:
                y *= tl.load(gate + offs_n, mask=kept_n, other=0.0).to(tl.float32)[None, :]
            else:
                row = tl.minimum(offs_m, M - 1)
                at = tl.load(index + row) if LOOKUP == _INDEXED else row
                gate_at = gate + at[:, None].to(tl.int64) * gate_stride + offs_n[None, :]
                y *= tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
        row = offs_m.to(tl.int64)[:, None]
        if residual is not None:
            residual_at = residual + row * residual_stride + offs_n[None, :]
            y += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
        out_at = out + row * out_stride + offs_n[None, :]
        tl.store(out_at, y.to(out.dtype.element_ty), mask=mask)
