"""Low-rank terms beside linears and merged into them, against fp64, and what either way costs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltxlite import linear
from ltxlite.errors import ShapeError
from ltxlite.linear import QuantLinear
from ltxlite.low_rank import LowRankDelta, LowRankLinear, LowRankTerm, merged_weight
from ltxlite.low_rank_cost import LowRankWork
from ltxlite_quant import FORMATS, QuantTensor
from ltxlite_quant.containers import open_container
from ltxlite_quant.encode import quantize

GOLDEN = Path(__file__).parent / "golden"
BASES = ("plain", "Q8_0", "Q4_0", "F8_E4M3", "BF16", "F32")
# Sums of at most 96 products in fp32, in another order than the oracle's.
CLOSE = 2e-6


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def term(rows: int, length: int, rank: int = 3, scale: float = 1.0, seed: int = 5) -> LowRankTerm:
    a, b = normal(rank, length, seed=seed), normal(rows, rank, seed=seed + 1)
    return LowRankTerm(a, b, scale, "style.safetensors")


def base_of(kind: str, rows: int, columns: int) -> nn.Linear | QuantLinear:
    weight, bias = normal(rows, columns), normal(rows, seed=1)
    if kind == "plain":
        made = nn.Linear(columns, rows)
        made.weight.data, made.bias.data = weight, bias
        return made
    if FORMATS[kind].dtype is None:
        return QuantLinear(quantize(weight, FORMATS[kind]), bias)
    stored = weight.to(FORMATS[kind].dtype).contiguous().view(torch.uint8).view(rows, -1)
    return QuantLinear(QuantTensor(stored, FORMATS[kind], (rows, columns)), bias)


def weight_of(base: nn.Linear | QuantLinear) -> torch.Tensor:
    return base.decoded(torch.float32) if isinstance(base, QuantLinear) else base.weight


def three_terms(rows: int = 33, columns: int = 96) -> list[LowRankTerm]:
    parameters = ((3, 0.5), (7, 2.0), (1, 1.0))
    return [term(rows, columns, rank, scale, 10 * i) for i, (rank, scale) in enumerate(parameters)]


@torch.inference_mode()
@pytest.mark.parametrize("method", ["beside", "merged"])
@pytest.mark.parametrize("kind", BASES)
def test_terms_add_to_a_base_of_any_format_and_follow_their_strengths(
    kind: str, method: str
) -> None:
    base, terms = base_of(kind, 33, 96), three_terms()
    layer = LowRankLinear(base, terms)
    layer.method = method  # type: ignore[assignment]
    assert (layer.in_features, layer.out_features) == (96, 33)
    before = weight_of(base).clone()
    x = normal(2, 7, 96, seed=2)
    for strengths in ([1.0, 1.0, 1.0], [0.25, -0.5, 0.0], [0.0, 0.0, 3.0], [2.0, 0.0, 1.0]):
        layer.strengths = strengths
        delta = sum(
            strength * one.scale * one.b.double() @ one.a.double()
            for strength, one in zip(strengths, terms, strict=True)
        )
        wanted = F.linear(x.double(), before.double() + delta, base.bias.double())
        worst = (layer(x).double() - wanted).abs().max()
        assert worst < CLOSE * wanted.abs().max()
    assert torch.equal(weight_of(base), before), "the base was rewritten"


@torch.inference_mode()
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", ["auto", "beside", "merged"])
def test_strength_zero_is_the_base_to_the_bit_and_touches_no_factor(kind: str, method: str) -> None:
    base = base_of(kind, 33, 96)
    damaged = term(33, 96)
    damaged.a.fill_(float("nan"))  # 0 * NaN would show
    layer = LowRankLinear(base, [damaged, damaged])
    layer.method = method  # type: ignore[assignment]
    layer.strengths = [0.0, 0.0]
    x = normal(2, 5, 96, seed=2)
    assert torch.equal(layer(x), base(x))
    assert layer.work(1 << 20, torch.float32).rank == 0


@torch.inference_mode()
@pytest.mark.parametrize("scratch", [96 * 4 * 5, 96 * 4 * 300])
def test_merging_in_pieces_of_rows_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, scratch: int
) -> None:
    # Small integers: every sum is exact in fp32, so equal values have equal bits.
    whole = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (1027, 96), generator=whole)
    codes[:, ::32] = 127
    base = QuantLinear(quantize(codes * 0.25, FORMATS["Q8_0"]), torch.arange(1027.0))
    a = torch.randint(-3, 4, (5, 96), generator=whole).float()
    b = torch.randint(-3, 4, (1027, 5), generator=whole).float()
    layer = LowRankLinear(base, [LowRankTerm(a, b, 0.5, "x")])
    layer.method = "merged"
    x = torch.randint(-8, 9, (3, 5, 96), generator=whole).float()
    wanted = F.linear(x, codes * 0.25 + 0.5 * b @ a, base.bias)
    assert torch.equal(layer(x), wanted)
    monkeypatch.setattr(linear, "SCRATCH_BYTES", scratch)
    assert torch.equal(layer(x), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("method", ["beside", "merged"])
def test_factors_of_another_dtype_serve_the_dtype_of_the_input(method: str) -> None:
    base = base_of("Q8_0", 33, 96)
    one = term(33, 96)
    stored = LowRankTerm(one.a.bfloat16(), one.b.half(), 1.0, "x")
    layer = LowRankLinear(base, [stored, one])
    layer.method = method  # type: ignore[assignment]
    x = normal(40, 96, seed=2)
    terms = [LowRankTerm(stored.a.float(), stored.b.float(), 1.0, "x"), one]
    wanted = F.linear(x, merged_weight(weight_of(base), terms, torch.float32), base.bias)
    assert (layer(x) - wanted).abs().max() < CLOSE * wanted.abs().max()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@torch.inference_mode()
def test_both_ways_agree_with_the_merged_weight_within_1e_5() -> None:
    base, terms = base_of("Q4_0", 257, 96), three_terms(257)
    layer = LowRankLinear(base, terms)
    layer.strengths = [0.8, 0.3, -1.0]
    oracle = merged_weight(weight_of(base), terms, torch.float32, layer.strengths)
    x = normal(63, 96, seed=2)
    wanted = F.linear(x, oracle, base.bias)
    for method in ("beside", "merged"):
        layer.method = method  # type: ignore[assignment]
        assert ((layer(x) - wanted).norm() / wanted.norm()) < 1e-5  # what the issue asks


def counted(method: str, strengths: list[float], tokens: int) -> int:
    """Return how many matrix products a call makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += "mm" in func.overloadpacket.__name__
            return func(*args, **(kwargs or {}))

    layer = LowRankLinear(base_of("plain", 33, 96), three_terms())
    layer.method = method  # type: ignore[assignment]
    layer.strengths = strengths
    x = normal(tokens, 96, seed=2)
    with torch.no_grad(), Counter() as counter:
        layer(x)
    return counter.products


def test_several_files_are_two_products_more_and_those_that_are_off_none() -> None:
    assert counted("beside", [0.0, 0.0, 0.0], 40) == 1
    assert counted("beside", [1.0, 0.0, 0.0], 40) == 3
    assert counted("beside", [1.0, 0.5, 2.0], 40) == 3
    assert counted("beside", [1.0, 0.5, 2.0], 2) == 7  # copying factors would cost more
    assert counted("merged", [1.0, 0.0, 2.0], 40) == 3


def crossover(work: LowRankWork) -> int:
    """Return the tokens from which merging pays, by bisection."""
    low, high = 1, 1 << 24
    while low < high:
        middle = (low + high) // 2
        tried = LowRankWork(middle, work.columns, work.rows, work.rank, work.decodes)
        low, high = (low, middle) if tried.merging_pays() else (middle + 1, high)
    return low


@pytest.mark.parametrize(
    ("columns", "rows", "rank", "decodes", "tokens"),
    [
        # By operations alone 2048 (K N / (K + N)) and 3277; traffic moves that by 2 to 27 %, and
        # to 4.8 k where the weight has to be copied for a small rank.
        (4096, 4096, 384, True, 2202),
        (4096, 16384, 384, True, 3358),
        (16384, 4096, 384, True, 3770),
        (4096, 4096, 32, True, 2600),
        (4096, 4096, 384, False, 2955),
        (4096, 4096, 32, False, 4826),
        (2048, 2048, 384, True, 1082),
    ],
)
def test_merging_pays_from_a_number_of_tokens_on(
    columns: int, rows: int, rank: int, decodes: bool, tokens: int
) -> None:
    found = crossover(LowRankWork(1, columns, rows, rank, decodes))
    assert abs(found - tokens) <= 0.01 * tokens
    # The same by hand: operations and elements, 100 operations a byte, 2 bytes an element.
    token = 2 * rank * (columns + rows) + 200 * (columns + 2 * rank + 2 * rows)
    once = columns * rows * (2 * rank + 200 * (2 if decodes else 4))
    assert abs(found - once / token) <= 1


def test_over_a_whole_block_merging_at_rank_384_pays_from_about_3_7_thousand_tokens_on() -> None:
    # peers.md, move 9: "cheaper above about 3.7 k tokens at rank 384", one way for all layers.
    wide, narrow, text, sound = 4096, 2048, 1024, 126

    def layers(tokens: int) -> list[tuple[int, int, int]]:
        video = [(tokens, wide, wide)] * 6 + [(text, wide, wide)] * 2
        video += [(tokens, wide, 4 * wide), (tokens, 4 * wide, wide)]
        audio = [(sound, narrow, narrow)] * 6 + [(text, narrow, narrow)] * 2
        audio += [(sound, narrow, 4 * narrow), (sound, 4 * narrow, narrow)]
        cross = [(tokens, wide, narrow), (tokens, narrow, wide)] + [(sound, narrow, narrow)] * 2
        return video + audio + cross + [(sound, narrow, narrow)] * 2 + [(tokens, wide, narrow)] * 2

    def gain(tokens: int) -> float:
        works = [LowRankWork(t, k, n, 384, True) for t, k, n in layers(tokens)]
        return sum(work.merged() - work.beside() for work in works)

    assert len(layers(1)) == 28
    assert gain(2800) > 0 > gain(4000)


def test_the_layer_takes_the_way_that_the_model_of_cost_names() -> None:
    layer = LowRankLinear(base_of("Q8_0", 64, 64), [term(64, 64, 4)])
    x = normal(2000, 64)
    with torch.inference_mode():
        assert not layer.work(2, torch.float32).merging_pays()
        assert layer.work(2000, torch.float32).merging_pays()
        auto = layer(x)
        layer.method = "merged"
        assert torch.equal(auto, layer(x))
        layer.method = "auto"
        few = layer(x[:2])
        layer.method = "beside"
        assert torch.equal(few, layer(x[:2]))
    layer.method = "auto"
    x.requires_grad_()
    with torch.enable_grad():
        layer(x).sum().backward()  # beside: a merged weight would be kept for it
    with torch.no_grad():
        wanted = merged_weight(weight_of(layer.base), [term(64, 64, 4)], torch.float32).sum(0)
    # fp32 sums of 64 products of values up to 10.
    torch.testing.assert_close(x.grad, wanted.expand(2000, 64), rtol=1e-4, atol=1e-4)


def test_a_layer_holds_nothing_but_buffers_and_runs_on_meta() -> None:
    # Blocks are streamed as one piece of memory to which all tensors are rebound.
    base, terms = base_of("Q8_0", 33, 96), three_terms()
    layer = LowRankLinear(base, terms)
    names = {name for name, _ in layer.named_buffers()}
    assert names == {"a0", "b0", "a1", "b1", "a2", "b2", "base.blocks", "base.bias"}
    kept = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert not kept
    assert layer.a0.data_ptr() == terms[0].a.data_ptr(), "the file's map is copied"
    x = normal(40, 96)
    with torch.inference_mode():
        wanted = layer(x)
        for name, buffer in list(layer.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            layer.get_submodule(owner)._buffers[leaf] = buffer.clone()
            buffer.zero_()
        assert torch.equal(layer(x), wanted)
        layer.to("meta")
        for method in ("beside", "merged"):
            layer.method = method  # type: ignore[assignment]
            assert layer(x.to("meta")).shape == (40, 33)


def test_the_golden_matrix_is_fused_bit_for_bit() -> None:
    name = "transformer_blocks.0.attn1.to_q"
    with open_container(GOLDEN / "models/tiny-2.3-distilled.safetensors") as file:
        weight = file.load(f"model.diffusion_model.{name}.weight")
    with open_container(GOLDEN / "models/tiny-distilled-lora-r4.safetensors") as file:
        a, b = (file.load(f"diffusion_model.{name}.lora_{side}.weight") for side in "AB")
    with open_container(GOLDEN / "golden/lora.safetensors") as file:
        wanted = file.load(f"bf16_fused.{name}.weight_strength0.8")
    official = merged_weight(weight, [LowRankTerm(a, b, 1.0, "lora")], torch.bfloat16, [0.8])
    assert torch.equal(official, wanted)


def test_merging_several_terms_in_fp32_is_the_sum_of_their_products() -> None:
    weight, terms = normal(33, 64), [term(33, 64, 3, 0.5), term(33, 64, 7, 2.0, seed=8)]
    wanted = weight.double() + sum(one.scale * one.b.double() @ one.a.double() for one in terms)
    merged = merged_weight(weight, terms, torch.float32)
    # A handful of fp32 roundings of values up to about 20.
    torch.testing.assert_close(merged.double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(merged_weight(weight, [], torch.bfloat16), weight.bfloat16())


def test_a_delta_adds_to_any_rows_and_leaves_its_input_alone() -> None:
    weight, terms = normal(33, 96), three_terms()
    delta = LowRankDelta(tuple(terms), (0.5, -1.0, 2.0))
    wanted = merged_weight(weight, terms, torch.float32, [0.5, -1.0, 2.0])
    before = weight.clone()
    pieces = [delta.added(weight[i : i + 7], slice(i, i + 7)) for i in range(0, 33, 7)]
    assert (torch.cat(pieces) - wanted).abs().max() < CLOSE * wanted.abs().max()
    assert torch.equal(weight, before)


def test_terms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"style\.safetensors: .*\(33, 64\) does not fit .*32"):
        LowRankLinear(nn.Linear(64, 32), [term(33, 64)])
    with pytest.raises(ShapeError, match="does not fit"):
        merged_weight(torch.zeros(33, 32), [term(33, 64)], torch.float32)
    with pytest.raises(ShapeError, match=r"x: to_q: low-rank factors .* must share r"):
        LowRankTerm(torch.zeros(3, 64), torch.zeros(33, 4), 1.0, "x", "to_q")
    with pytest.raises(ShapeError, match="as many strengths"):
        merged_weight(torch.zeros(33, 64), [term(33, 64)], torch.float32, [])
