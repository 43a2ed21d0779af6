"""Quantized Linears against gguf-py and nn.Linear."""

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltxlite import linear
from ltxlite.errors import ShapeError
from ltxlite.linear import (
    QuantLinear,
    row_pieces,
    swap_linears,
)
from ltxlite_quant import FORMATS, QuantTensor
from ltxlite_quant.containers import open_container
from ltxlite_quant.encode import quantize
from ltxlite_quant.gguf import write_gguf

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quant_linear(rows: int, length: int, bias: bool = True) -> QuantLinear:
    weight = quantize(normal(rows, length), FORMATS["Q8_0"])
    return QuantLinear(weight, normal(rows, seed=1) if bias else None)


def test_a_gguf_of_gguf_py_runs_through_quant_linear(tmp_path):
    weight, bias = normal(65, 96).numpy(), normal(65, seed=1)
    stored = gguf.quants.quantize(weight, Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "ltxv")
    writer.add_tensor("to_q.weight", stored, raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_container(tmp_path / "m.gguf") as file:
        loaded = file.load("to_q.weight")
    assert isinstance(loaded, QuantTensor)
    x = normal(2, 7, 96, seed=2)
    wanted = F.linear(x, torch.from_numpy(gguf.quants.dequantize(stored, Q8_0)), bias)
    # Equal weights, the same product: equal bits.
    assert torch.equal(QuantLinear(loaded, bias)(x), wanted)


def test_a_gguf_of_ours_gives_gguf_py_the_same_product(tmp_path):
    layer = quant_linear(33, 64, bias=False)
    weight = QuantTensor(layer.blocks, layer.format, (33, 64))
    write_gguf(tmp_path / "m.gguf", {"w": weight}, {}, "ltxv")
    stored = gguf.GGUFReader(tmp_path / "m.gguf").tensors[0]
    values = np.ascontiguousarray(gguf.quants.dequantize(stored.data, stored.tensor_type))
    x = normal(5, 64, seed=2)
    assert torch.equal(layer(x), F.linear(x, torch.from_numpy(values)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_weight_is_decoded_to_the_dtype_of_the_input(dtype):
    layer = quant_linear(63, 96)
    x = normal(7, 96, seed=2).to(dtype)
    whole = QuantTensor(layer.blocks, layer.format, (63, 96)).dequantize(dtype)
    assert layer.bias is not None
    assert torch.equal(layer(x), F.linear(x, whole, layer.bias.to(dtype)))


@pytest.mark.parametrize("scratch", [1, 96 * 4 * 5, 96 * 4 * 300])
def test_decoding_in_pieces_changes_nothing(monkeypatch, scratch):
    # Small integers and scales that are powers of two: every partial sum is exact in fp32, so the
    # order in which a matmul library adds cannot show and the results must have equal bits.
    codes = torch.randint(-127, 128, (1027, 96), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = 127
    layer = QuantLinear(quantize(codes * 0.25, FORMATS["Q8_0"]), torch.arange(1027.0))
    x = torch.randint(-8, 9, (3, 5, 96), generator=torch.Generator().manual_seed(1)).float()
    whole = layer(x)
    assert torch.equal(whole, F.linear(x, codes * 0.25, layer.bias))
    monkeypatch.setattr(linear, "SCRATCH_BYTES", scratch)
    assert len(list(row_pieces(1027, 96 * 4))) > 1
    assert torch.equal(layer(x), whole)


def test_a_piece_of_the_weight_has_the_bits_of_the_whole():
    layer = quant_linear(37, 64)
    whole = layer.decoded(torch.bfloat16)
    pieces = [layer.decoded(torch.bfloat16, slice(i, i + 5)) for i in range(0, 37, 5)]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize(
    ("rows", "row_bytes"), [(16384, 8192), (4096, 32768), (4096, 376320), (3, 1 << 30), (1, 4)]
)
def test_pieces_cover_every_row_once_and_fit_the_scratch(rows, row_bytes):
    pieces = list(row_pieces(rows, row_bytes))
    assert [i for piece in pieces for i in range(rows)[piece]] == list(range(rows))
    largest = max(piece.stop - piece.start for piece in pieces)
    assert largest * row_bytes <= linear.SCRATCH_BYTES or largest == 1


def test_gradients_reach_the_input(monkeypatch):
    monkeypatch.setattr(linear, "SCRATCH_BYTES", 96 * 4 * 20)
    layer = quant_linear(63, 96)
    x = normal(7, 96, seed=2).requires_grad_()
    with torch.enable_grad():
        layer(x).sum().backward()
    # Sums of 63 products in another order: sqrt(63) fp32 roundings of values around 8.
    torch.testing.assert_close(
        x.grad, layer.decoded(torch.float32).sum(0).expand(7, 96), rtol=1e-5, atol=2e-5
    )


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 33, bias=False))
        self.norm = nn.LayerNorm(33)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x))


def test_linears_swapped_on_meta_and_assigned_compute_the_same():
    plain = Pair()
    quants = {
        name: quantize(plain.get_submodule(name).weight, FORMATS["Q8_0"])
        for name in ("inner.0", "inner.2")
    }
    for name, quant in quants.items():
        plain.get_submodule(name).weight.data = quant.dequantize()
    with torch.device("meta"):
        model = Pair()
    swap_linears(model, quants)
    rest = {k: v for k, v in plain.state_dict().items() if not k.startswith("inner.2")}
    del rest["inner.0.weight"]
    rest |= {f"{name}.blocks": quant.blocks for name, quant in quants.items()}
    model.load_state_dict(rest, strict=True, assign=True)
    x = normal(5, 64, seed=2)
    assert torch.equal(model(x), plain(x))
    assert "format=Q8_0" in repr(model)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("inner.0", (96, 32), r"inner\.0: the Q8_0 weight is \(96, 32\), .* \(96, 64\)"),
        ("inner.7", (96, 64), r"inner\.7: .* no module"),
        ("norm", (1, 64), "norm: .* a LayerNorm"),
    ],
)
def test_a_weight_that_does_not_fit_changes_nothing(name, shape, message):
    model = Pair()
    good = quantize(torch.zeros(33, 96), FORMATS["Q8_0"])
    bad = quantize(torch.zeros(shape), FORMATS["Q8_0"])
    with pytest.raises(ShapeError, match=message):
        swap_linears(model, {"inner.2": good, name: bad})
    assert isinstance(model.inner[2], nn.Linear)


def test_impossible_quantized_linears_are_refused():
    with pytest.raises(ShapeError, match="2 dimensions"):
        QuantLinear(quantize(torch.zeros(2, 3, 32), FORMATS["Q8_0"]))
    with pytest.raises(ShapeError, match="does not fit a weight"):
        QuantLinear(quantize(torch.zeros(3, 32), FORMATS["Q8_0"]), torch.zeros(4))
