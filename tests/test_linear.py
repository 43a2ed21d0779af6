"""Quantized and low-rank Linears against gguf-py, nn.Linear and the official fusion."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltxlite import linear
from ltxlite.errors import ShapeError
from ltxlite.linear import (
    LowRankLinear,
    LowRankTerm,
    QuantLinear,
    merged_weight,
    row_pieces,
    swap_linears,
)
from ltxlite_quant import FORMATS, QuantTensor
from ltxlite_quant.containers import open_container
from ltxlite_quant.encode import quantize
from ltxlite_quant.gguf import write_gguf

GOLDEN = Path(__file__).parent / "golden"
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quant_linear(rows: int, length: int, bias: bool = True) -> QuantLinear:
    weight = quantize(normal(rows, length), FORMATS["Q8_0"])
    return QuantLinear(weight, normal(rows, seed=1) if bias else None)


def term(rows: int, length: int, rank: int = 3, scale: float = 1.0, seed: int = 5) -> LowRankTerm:
    a, b = normal(rank, length, seed=seed), normal(rows, rank, seed=seed + 1)
    return LowRankTerm(a, b, scale, "style.safetensors")


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


@pytest.mark.parametrize("quantized", [False, True])
def test_low_rank_terms_add_to_the_base_and_follow_their_strengths(quantized):
    base: nn.Linear | QuantLinear = quant_linear(33, 64) if quantized else nn.Linear(64, 33)
    weight = base.decoded(torch.float32) if isinstance(base, QuantLinear) else base.weight
    terms = [term(33, 64, 3, 0.5), term(33, 64, 7, 2.0, seed=8)]
    layer = LowRankLinear(base, terms)
    assert (layer.in_features, layer.out_features) == (64, 33)
    x = normal(2, 5, 64, seed=2)
    for strengths in ([1.0, 1.0], [0.25, -0.5], [0.0, 0.0]):
        layer.strengths = strengths
        delta = sum(
            strength * one.scale * one.b.double() @ one.a.double()
            for strength, one in zip(strengths, terms, strict=True)
        )
        wanted = F.linear(x.double(), weight.double() + delta, base.bias.double())
        # fp32 sums of 64 products, of values up to about 100: 1e-6 relative to the largest.
        torch.testing.assert_close(
            layer(x).double(), wanted, rtol=0, atol=2e-6 * wanted.abs().max().item()
        )
    assert torch.equal(layer(x), base(x))  # strength 0 is exactly off


def test_the_golden_matrix_is_fused_bit_for_bit():
    name = "transformer_blocks.0.attn1.to_q"
    with open_container(GOLDEN / "models/tiny-2.3-distilled.safetensors") as file:
        weight = file.load(f"model.diffusion_model.{name}.weight")
    with open_container(GOLDEN / "models/tiny-distilled-lora-r4.safetensors") as file:
        a, b = (file.load(f"diffusion_model.{name}.lora_{side}.weight") for side in "AB")
    with open_container(GOLDEN / "golden/lora.safetensors") as file:
        wanted = file.load(f"bf16_fused.{name}.weight_strength0.8")
    official = merged_weight(weight, [LowRankTerm(a, b, 1.0, "lora")], torch.bfloat16, [0.8])
    assert torch.equal(official, wanted)


def test_merging_several_terms_in_fp32_is_the_sum_of_their_products():
    weight, terms = normal(33, 64), [term(33, 64, 3, 0.5), term(33, 64, 7, 2.0, seed=8)]
    wanted = weight.double() + sum(one.scale * one.b.double() @ one.a.double() for one in terms)
    merged = merged_weight(weight, terms, torch.float32)
    # A handful of fp32 roundings of values up to about 20.
    torch.testing.assert_close(merged.double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(merged_weight(weight, [], torch.bfloat16), weight.bfloat16())


def test_low_rank_terms_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"style\.safetensors: .*\(33, 64\) does not fit .*32"):
        LowRankLinear(nn.Linear(64, 32), [term(33, 64)])
    with pytest.raises(ShapeError, match="does not fit"):
        merged_weight(torch.zeros(33, 32), [term(33, 64)], torch.float32)
    with pytest.raises(ShapeError, match="must share r"):
        LowRankTerm(torch.zeros(3, 64), torch.zeros(33, 4), 1.0, "x")
    with pytest.raises(ShapeError, match="as many strengths"):
        merged_weight(torch.zeros(33, 64), [term(33, 64)], torch.float32, [])
