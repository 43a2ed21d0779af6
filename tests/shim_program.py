"""Run by test_triton_shim in a process of its own: prints "fine" if the shim does its work."""

import torch
import triton
import triton.language as tl
import triton_shim

triton_shim.install()


@triton.jit
def add(x, y, out, n, MASKED: tl.constexpr, STRIDE: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * STRIDE + tl.arange(0, 64)
    mask = at < n if MASKED else at >= 0
    a, b = tl.load(x + at, mask=mask), tl.load(y + at, mask=mask)
    tl.store(out + at, (a + b).to(out.dtype.element_ty), mask=mask)


def launch(dtype, out_dtype, masked=True, stride=64, n=100):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = torch.zeros(n, dtype=out_dtype)
    add[(2,)](x, y, out, n, MASKED=masked, STRIDE=stride)
    return out, x, y


def refused(text, **options):
    try:
        launch(torch.float32, torch.float32, **options)
    except Exception as error:
        assert text in str(error) + str(error.__cause__), repr(error)
    else:
        raise SystemExit(f"not found: {text}")


out, x, y = launch(torch.bfloat16, torch.bfloat16)
assert torch.equal(out, x + y), "bf16 sums"
out, x, y = launch(torch.float32, torch.bfloat16)
assert torch.equal(out, (x + y).bfloat16()), "rounding to bf16"
out, x, y = launch(torch.float32, torch.float8_e4m3fn)
assert torch.equal(out.float(), (x + y).to(torch.float8_e4m3fn).float()), "rounding to fp8"
refused("outside", masked=False)
refused("race", stride=32)
print("fine")
