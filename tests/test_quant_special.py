"""Blocks that no smooth distribution gives: never worse than llama.cpp's, one by one."""

import hashlib

import ggml_oracle
import numpy as np
import pytest
import torch
from test_quant_decode import lcg_values
from test_quant_search import GOLDEN
from weight_samples import weight_samples

from ltxlite_quant import search, search_torch, special
from ltxlite_quant.decode import DECODERS
from ltxlite_quant.formats import FORMATS
from ltxlite_quant.search import Target, quantize
from ltxlite_quant.search_constant import constant_affine, constant_scaled
from ltxlite_quant.search_plan import PLANS, AffinePlan

needs_oracle = pytest.mark.skipif(
    ggml_oracle.library_path() is None, reason="llama.cpp's quantizer: pip install pywhispercpp"
)
# Bytes of a block that hold d, dmin, scales and minimums.  Source: formats.md 2.2 and 2.3.
SCALE_BYTES = {
    "Q2_K": (slice(0, 16), slice(80, 84)),
    "Q3_K": (slice(96, 110),),
    "Q4_K": (slice(0, 16),),
    "Q5_K": (slice(0, 16),),
    "Q6_K": (slice(192, 210),),
    "IQ4_NL": (slice(0, 2),),
    "IQ4_XS": (slice(0, 8),),
}


def _signed(rng: np.random.Generator, low: float, high: float, count: int) -> np.ndarray:
    # (count, 1): powers of ten between these, of both signs
    return 10.0 ** rng.uniform(low, high, (count, 1)) * rng.choice([-1, 1], (count, 1))


def _one_of_each(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.permutation(256)[:count]


def _sparse_kinds(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    rows, noise = np.arange(count), rng.standard_normal((count, 256))
    constant = _signed(rng, -9, 4, count).repeat(256, 1)
    outlier = _signed(rng, -5, 2, count).repeat(256, 1)
    outlier[rows, _one_of_each(rng, count)] *= _signed(rng, 0.3, 3.5, count)[:, 0]
    alone = np.zeros((count, 256))
    alone[rows, _one_of_each(rng, count)] = _signed(rng, -7, 4, count)[:, 0]
    buried = noise * 1e-3
    buried[rows, _one_of_each(rng, count)] = _signed(rng, -1.4, 3, count)[:, 0]
    group = noise.reshape(count, 8, 32) * 0.02
    group[rows, rows % 8] = _signed(rng, -3, 0, count)
    return {
        "constant": constant,
        "outlier of a constant": outlier,
        "outlier of zeros": alone,
        "outlier of noise": buried,
        "constant group": group.reshape(count, 256),
    }


def special_kinds(count: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw (count, 256) fp32 blocks of every kind but zero."""
    rng = np.random.default_rng(seed)
    shape = (count, 256)
    share = rng.uniform(0.02, 0.98, (count, 1))
    first, last = _signed(rng, -4, 2, count), _signed(rng, -4, 2, count)
    noise = rng.standard_normal(shape)
    limit = np.where(noise > 0, 65504.0, -65504.0)
    limit[::2] = 65504 * rng.uniform(0.5, 1, (len(limit[::2]), 1))
    kinds = _sparse_kinds(rng, count) | {
        "plus and minus": _signed(rng, -5, 3, count) * rng.choice([-1, 1], shape),
        "plus and minus 0.3": 0.3 * rng.choice([-1, 1], shape),
        "plus, zero and minus": _signed(rng, -4, 3, count) * rng.choice([-1, 0, 1], shape),
        "two values": np.where(
            rng.random(shape) < share, _signed(rng, -3, 2, count), _signed(rng, -3, 2, count)
        ),
        "in turns": _signed(rng, -4, 3, count) * np.where(np.arange(256) % 2, 1, -1),
        "ramp": first + (last - first) * np.arange(256) / 255,
        "fp16 limit": limit,
        "subnormal scale": noise * 10.0 ** rng.uniform(-9, -5, (count, 1)),
        "small": noise * 10.0 ** rng.uniform(-7, -3, (count, 1)),
        "subnormal fp32": noise * 10.0 ** rng.uniform(-44, -38, (count, 1)),
    }
    return {kind: torch.from_numpy(values).float() for kind, values in kinds.items()}


KINDS = list(special_kinds(1))


@pytest.fixture(params=["torch", "numba"])
def engine(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(search, "_compiled", lambda: None)
    else:
        pytest.importorskip("numba", reason="the compiled search: pip install ltxlite[convert]")


def importance_of(name: str | None) -> torch.Tensor | None:
    random = torch.Generator().manual_seed(5)
    drawn = torch.randn(256, generator=random).exp()
    return {None: None, "drawn": drawn, "zero for some": drawn * (drawn > 0.5)}[name]


def errors(blocks: torch.Tensor, values: torch.Tensor, name: str, importance) -> torch.Tensor:
    """Return the weighted squared error of every block, fp64."""
    row = FORMATS[name]
    decoded = DECODERS[name](blocks.view(-1, row.block_bytes)).double().view(values.shape)
    weights = 1 if importance is None else importance.double()
    squares = (decoded - values.double()).square() * weights
    return squares.view(-1, row.block_size).sum(1)


def _size(name: str) -> int:
    return FORMATS[name].block_size


def llama(values: torch.Tensor, name: str, importance=None) -> torch.Tensor:
    given = None if importance is None else importance.numpy()
    return torch.from_numpy(ggml_oracle.quantize(values.numpy(), name, given))


def lost(blocks: torch.Tensor, values: torch.Tensor, name: str, given: str | None) -> np.ndarray:
    """Name the kinds, repeated, of blocks that lost more than llama.cpp's."""
    importance = importance_of(given)
    ours = errors(blocks, values, name, importance)
    theirs = errors(llama(values, name, importance), values, name, importance)
    energy = errors(torch.zeros_like(blocks), values, name, importance)
    # The decoder rounds a value to 2^-24 of itself, so that below 2^-48 of a block's energy there
    # is nothing to compare.  1e-6: in IQ4 a value halfway between two levels may take either.
    worse = ours > theirs * (1 + 1e-6) + energy * 2.0**-48
    kinds = np.array(KINDS).repeat(len(worse) // len(KINDS))[worse.numpy()]
    # Of blocks of 32, those beside a constant group are noise.
    return kinds if name != "IQ4_NL" else kinds[kinds != "constant group"]


@needs_oracle
@pytest.mark.parametrize("given", [None, "drawn", "zero for some"])
@pytest.mark.parametrize("name", list(PLANS))
def test_no_special_block_loses_more_than_in_llama_cpp(name, given, engine):
    values = torch.cat(list(special_kinds().values()))
    made = quantize(values, FORMATS[name], importance=importance_of(given))
    assert not set(lost(made.blocks, values, name, given))


@needs_oracle
@pytest.mark.parametrize("given", [None, "drawn"])
@pytest.mark.parametrize("name", list(PLANS))
def test_high_effort_keeps_that_promise(name, given):
    values = torch.cat(list(special_kinds(4, 1).values()))
    made = quantize(values, FORMATS[name], "high", importance_of(given))
    assert not set(lost(made.blocks, values, name, given))


@needs_oracle
@pytest.mark.parametrize("given", [None, "drawn"])
@pytest.mark.parametrize("name", list(PLANS))
def test_the_reference_has_the_scales_of_llama_cpp_to_the_last_bit(name, given):
    kinds = special_kinds() | weight_samples(9, 256)
    kinds.pop("subnormal fp32")  # d is 0, and the integers mean nothing
    values, importance, size = torch.cat(list(kinds.values())), importance_of(given), _size(name)
    x = values.view(-1, size)
    w = None if importance is None else importance.expand_as(values).reshape(-1, size)
    theirs = llama(values, name, importance).view(len(x), -1)
    for count in (1, 2, len(x)):  # sums of one block go another way
        weights = None if w is None else w[:count]
        ours = search._reference(x[:count], weights, Target(name, PLANS[name]["default"]))
        for part in SCALE_BYTES[name]:
            assert torch.equal(ours[:, part], theirs[:count, part])


@pytest.mark.parametrize("name", [name for name in PLANS if name != "IQ4_NL"])
def test_the_reference_makes_the_golden_blocks(name):
    # But for IQ4_NL, whose codes llama.cpp chooses before it rounds d to fp16.
    x = torch.from_numpy(lcg_values())[None]
    made = search._reference(x, None, Target(name, PLANS[name]["default"]))
    assert hashlib.sha256(made.numpy().tobytes()).hexdigest()[:16] == GOLDEN[name][1]


@pytest.mark.parametrize("given", [None, "drawn"])
@pytest.mark.parametrize("name", list(PLANS))
def test_both_engines_give_special_blocks_the_same_bytes(name, given, monkeypatch):
    pytest.importorskip("numba", reason="the compiled search: pip install ltxlite[convert]")
    values, importance = torch.cat(list(special_kinds(5, 2).values())), importance_of(given)
    size = _size(name)
    compiled = quantize(values, FORMATS[name], importance=importance).blocks
    monkeypatch.setattr(search, "_compiled", lambda: None)
    plain = quantize(values, FORMATS[name], importance=importance).blocks
    x = values.view(-1, size)
    again = special.find_special(x, x.abs().amax(1))
    assert again.float().mean() > (0.8 if name == "IQ4_NL" else 0.99)
    assert torch.equal(compiled.view(len(x), -1)[again], plain.view(len(x), -1)[again])


@pytest.mark.parametrize("name", list(PLANS))
def test_the_bytes_of_a_block_do_not_depend_on_other_blocks(name, engine):
    values = torch.cat([*special_kinds(2, 9).values(), weight_samples(3, 256)["gaussian"]])
    whole = quantize(values, FORMATS[name]).blocks
    for count in (1, 7):
        parts = [quantize(part, FORMATS[name]).blocks for part in values.split(count)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("size", [32, 256])
def test_special_blocks_are_told_from_ordinary_ones_by_both_engines(size):
    engines = [special]
    if search._compiled():
        engines.append(search._compiled())
    for kind, values in (special_kinds() | weight_samples(64, 256)).items():
        x = values.reshape(-1, size)
        found = [engine.find_special(x, x.abs().amax(1)) for engine in engines]
        assert torch.equal(found[0], found[-1]), kind
        share = float(found[0].float().mean())
        if kind in ("gaussian", "laplace", "t4", "channels"):
            # One value in 256 is beyond 24 standard deviations in one block of 500 of t(4), and
            # where channels differ by powers of e, in one of 200.
            assert share <= 0.02, kind
        elif size == 256 or kind not in ("outlier of zeros", "constant group", "outlier of noise"):
            assert share >= 0.95, kind  # short blocks may hold nothing but zeros or noise
    nothing = torch.zeros(3, size)
    assert not special.find_special(nothing, nothing[:, 0]).any()


@pytest.mark.parametrize("name", list(PLANS))
def test_zeros_stay_zeros(name, engine):
    row = FORMATS[name]
    for importance in (None, importance_of("drawn")):
        assert not quantize(torch.zeros(3, 256), row, importance=importance).dequantize().any()


@pytest.mark.parametrize("name", list(PLANS))
def test_constants_that_a_format_holds_are_kept_exactly(name, engine):
    # d = 1.5 * 2^-9 times an integer that is a product of a scale and a level.
    factor = {"Q2_K": 13 * 3, "IQ4_NL": -83, "IQ4_XS": -29 * 25, "Q3_K": 31 * -3}.get(name, 61 * 13)
    values = torch.full((2, 256), 1.5 * 2.0**-9 * factor)
    assert torch.equal(quantize(values, FORMATS[name]).dequantize(), values)


@pytest.mark.parametrize("name", list(PLANS))
def test_no_scale_and_level_come_nearer_to_a_constant(name):
    # One loop over all of them, in fp64, beside the vectorised one.
    values = torch.tensor([0.3, -0.3, 7e-8, -1.7e-6, 1234.5, -3e5])
    plan, size = PLANS[name]["default"], _size(name)
    x = values[:, None].repeat(1, size)
    if isinstance(plan, AffinePlan):
        found = constant_affine(values, plan)
        levels, scales = np.arange(1, plan.highest_code + 1), np.arange(1, plan.highest_scale + 1)
    else:
        found = constant_scaled(values, plan, size)
        levels = np.array(plan.levels)
        scales = np.arange(plan.lowest_scale, plan.highest_scale + 1)
    blocks = search._packed(x, found, Target(name, plan))
    misses = (DECODERS[name](blocks).double() - x.double()).abs()
    for miss, value in zip(misses, values.tolist(), strict=True):
        codes = np.ones(1) if isinstance(plan, AffinePlan) and value < 0 else levels
        products = np.outer(scales, codes).ravel()
        products = products[products != 0]
        with np.errstate(over="ignore"):
            units = (value / products).astype(np.float16).astype(float)
        least = np.abs(np.where(np.isinf(units), 0, units) * products - value).min()
        # decoded in fp32: half an ULP of the value
        assert miss.max().item() <= least + abs(value) * 2.0**-24


def test_powers_of_two_of_importance_change_nothing(engine):
    values, importance = torch.cat(list(special_kinds(3, 3).values())), importance_of("drawn")
    for name in ("Q2_K", "Q3_K", "IQ4_XS"):
        blocks = [
            quantize(values, FORMATS[name], importance=importance * factor).blocks
            for factor in (1, 2.0**40, 2.0**-40)
        ]
        assert torch.equal(blocks[0], blocks[1]) and torch.equal(blocks[0], blocks[2])


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_levels_are_looked_up_as_they_are_searched(name):
    levels = PLANS[name]["default"].levels
    table = torch.tensor(levels)
    numbers = torch.cat([torch.arange(-300, 300) / 2, torch.tensor([1e30, -1e30])])
    numbers = torch.cat([numbers, numbers.nextafter(torch.tensor(torch.inf)), -numbers * 0.99])
    distance = (numbers[:, None].double().clamp(-200, 200) - table).abs()
    # Of equally near ones the upper: searched from above.
    wanted = len(levels) - 1 - distance.flip(1).argmin(1)
    assert torch.equal(search_torch.nearest_levels(numbers.clone(), levels), table[wanted])
