"""Linears over every GGML format, against gguf-py's values and the ordinary product."""

import gguf
import pytest
import torch
import torch.nn.functional as F
from gguf.quants import dequantize as gguf_dequantize
from quant_blocks import random_blocks
from torch import nn

from ltxlite import linear
from ltxlite.linear import QuantLinear, swap_linears
from ltxlite_kernels import dequant
from ltxlite_quant import FORMATS, QuantTensor

GGML_QUANTS = [row for row in FORMATS.values() if row.is_quantized and row.ggml_type is not None]
every_format = pytest.mark.parametrize("row", GGML_QUANTS, ids=lambda row: row.name)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quant_weight(row, rows: int, length: int, seed: int = 0) -> QuantTensor:
    blocks = random_blocks(row.name, rows, length // row.block_size, seed)
    return QuantTensor(blocks, row, (rows, length))


def gguf_values(weight: QuantTensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[weight.format.name]
    return torch.from_numpy(gguf_dequantize(weight.blocks.numpy(), kind))


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quantized_linear_is_the_product_with_the_values_of_gguf_py(row, dtype):
    weight, bias = quant_weight(row, 63, 768), normal(63, seed=1)
    x = normal(2, 7, 768, seed=2).to(dtype)
    wanted = F.linear(x, gguf_values(weight).to(dtype), bias.to(dtype))
    # Equal weights, the same product: equal bits.
    assert torch.equal(QuantLinear(weight, bias)(x), wanted)
    assert wanted.isfinite().all()


@every_format
def test_pieces_of_a_weight_have_the_bits_of_the_whole(row):
    layer = QuantLinear(quant_weight(row, 37, 512))
    whole = layer.decoded(torch.bfloat16)
    pieces = [layer.decoded(torch.bfloat16, slice(i, i + 5)) for i in range(0, 37, 5)]
    assert torch.equal(torch.cat(pieces), whole)


@every_format
def test_the_pieces_of_a_product_are_the_product_of_the_pieces(row, monkeypatch):
    layer, x = QuantLinear(quant_weight(row, 301, 256)), normal(5, 256, seed=2)
    whole = layer(x)
    monkeypatch.setattr(linear, "SCRATCH_BYTES", 256 * 4 * 40)
    # The order of a sum of 256 products may differ: sqrt(256) fp32 roundings of the largest.
    torch.testing.assert_close(layer(x), whole, rtol=0, atol=2e-6 * whole.abs().max().item())


def stack() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(512, 768), nn.SiLU(), nn.Linear(768, 512, bias=False), nn.LayerNorm(512)
    )


@every_format
def test_a_stack_of_linears_swapped_on_meta_computes_the_same(row):
    plain = stack()
    quants = {"0": quant_weight(row, 768, 512), "2": quant_weight(row, 512, 768, seed=1)}
    for name, quant in quants.items():
        plain.get_submodule(name).weight.data = gguf_values(quant)
    with torch.device("meta"):
        model = stack()
    swap_linears(model, quants)
    state = {name: value for name, value in plain.state_dict().items() if "weight" not in name}
    state |= {f"{name}.blocks": quant.blocks for name, quant in quants.items()}
    state["3.weight"] = plain[3].weight
    model.load_state_dict(state, strict=True, assign=True)
    x = normal(2, 5, 512, seed=2)
    assert torch.equal(model(x), plain(x))


@every_format
def test_a_format_without_a_kernel_is_said_by_name(row):
    if row.name in dequant.KERNELS:
        pytest.skip(f"{row.name} has a kernel")

    class OnCuda:
        is_cuda = True

    with pytest.warns(RuntimeWarning, match=f"^{row.name} is decoded by plain torch"):
        dequant._warn_if_slow(row, OnCuda())
