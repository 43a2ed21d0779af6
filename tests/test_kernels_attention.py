"""Attention on prepared int8 keys, and in 16 bits: against float64, by kernel and by twin."""

import math

import pytest
import torch
from kernel_device import kernel_device, run_interpreted
from torch import Tensor

from ltxlite_kernels import configs, reference_attention
from ltxlite_kernels.attention import attend, attend_flash
from ltxlite_kernels.attention_inputs import KEYS_PER_SCALE, KeyBias, PreparedKeys
from ltxlite_kernels.attention_keys import parts_of, prepare
from ltxlite_quant.formats import FormatError

# Relative error of int8 scores. A query is off by its largest value / 127 / √12 in each of D
# channels; of D = 128 normal values the largest is 2.7 times their size, so .0061 of q k; a key by
# the largest of 64 D values, 4 times, so .0091. Scores of variance 1 are off by .011, weights and,
# as a mean of independent values, results by as much.  Values and weights in fp16 add .0004.
INT8 = 0.015
# Weights rounded to bf16, 2^-9 at most, and the result too: .0024 of a value if independent.
BF16 = 0.004
FP16 = BF16 / 8


@pytest.fixture
def device() -> str:
    return kernel_device()


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequences(
    batch: int, queries: int, keys: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, key and value as parts of wider rows: strides that are no width."""
    lengths = (queries, keys, keys)
    wide = (
        randoms(batch, n, width + 16, seed=1000 * i + n).to(dtype) for i, n in enumerate(lengths)
    )
    q, key, value = (x[..., :width] for x in wide)
    return q, key, value


def exact(q: Tensor, key: Tensor, value: Tensor, heads: int, added: Tensor | float = 0) -> Tensor:
    """Compute softmax(q kᵀ / √D + added) v in float64; added: (B, 1, t, S) or less."""
    parts = (x.cpu().double().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, key, value))
    q, key, value = parts
    scores = q @ key.mT / math.sqrt(q.shape[3]) + added
    return (scores.softmax(3) @ value).transpose(1, 2).flatten(2)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


def poisoned(q: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Return a result of NaN to write into, and all of the memory around it."""
    batch, queries, width = q.shape
    whole = torch.full((batch, queries + 3, width + 8), torch.nan, dtype=q.dtype, device=device)
    return whole[:, :queries, :width], whole


def untouched(whole: Tensor, out: Tensor) -> bool:
    """Tell whether only `out` was written."""
    return int(whole.isnan().sum()) == whole.numel() - out.numel()


def test_kernel_prepares_keys_by_blocks_and_values_by_channels(device):
    heads, keys, width = 3, 150, 3 * 64
    _, key, value = sequences(2, 1, keys, width)
    key = key + 30 * randoms(1, 1, width, seed=5).bfloat16()
    value[..., 5] *= 1e20
    value[..., 6] = 0
    found = prepare(key.to(device), value.to(device), heads)
    centred = key.double() - key.double().mean(1, keepdim=True)
    scales = found.scales.cpu().double().repeat_interleave(KEYS_PER_SCALE, 2)[..., :keys]
    steps = scales.transpose(1, 2).repeat_interleave(64, 2)
    # Half a step of rounding; the mean in fp32 is off by 1e-6 of a key of 30, or .005 steps.
    assert float(((found.codes.cpu() * steps - centred) / steps).abs().max()) <= 0.51
    assert found.codes.abs().amax() == 127  # no step is wasted
    factors = found.value_scales.cpu().double()[:, None]
    assert torch.equal(found.value.cpu().double() * factors, value.double())  # powers of two
    assert found.value.abs().amax() < 512
    wanted = reference(key, value, heads)
    assert torch.equal(found.value.cpu(), wanted.value)
    assert torch.equal(found.value_scales.cpu(), wanted.value_scales)
    # The twin's mean has another order, so a key near the middle may round to the other code.
    assert (found.codes.cpu().int() - wanted.codes).abs().max() <= 1
    assert torch.allclose(found.scales.cpu(), wanted.scales, rtol=1e-5, atol=0)


def reference(key: Tensor, value: Tensor, heads: int) -> PreparedKeys:
    """Prepare by the twin."""
    batch, keys, width = key.shape
    out = PreparedKeys(
        torch.empty(key.shape, dtype=torch.int8),
        torch.empty(batch, heads, -(-keys // KEYS_PER_SCALE)),
        torch.empty(key.shape, dtype=torch.float16),
        torch.empty(batch, width),
    )
    reference_attention.prepare_into(key.cpu(), value.cpu(), out)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_lays_prepared_values_over_plain_ones(device, dtype):
    _, key, value = (x.to(device) for x in sequences(2, 1, 131, 128, dtype))
    apart = prepare(key, value, 2)
    assert apart.value.data_ptr() != value.data_ptr()
    over = prepare(key, value, 2, reuse=True)
    assert over.value.data_ptr() == value.data_ptr()
    for one, other in zip(apart.tensors(), over.tensors(), strict=True):
        assert torch.equal(one, other)
    assert prepare(key.float(), key.float(), 2, reuse=True).value.shape == key.shape


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width"),
    [(1, 1, 1, 2, 64), (2, 70, 200, 2, 64), (1, 131, 130, 2, 128), (1, 37, 64, 3, 128)],
)
def test_kernel_attends_to_int8_keys(device, batch, queries, keys, heads, width):
    q, key, value = sequences(batch, queries, keys, heads * width)
    wanted = exact(q, key, value, heads)
    prepared = prepare(key.to(device), value.to(device), heads)
    out, whole = poisoned(q, device)
    assert attend(q.to(device), prepared, out=out) is out
    assert error(out, wanted) < INT8
    assert untouched(whole, out)
    # The twin rounds as the kernel does; only weights stay fp32, and the order of sums differs.
    # A code of a key that rounds otherwise, one of 1000, is a step of .02.
    assert error(out, attend_twin(q, prepared).double()) < BF16


def attend_twin(q: Tensor, keys: PreparedKeys, bias: KeyBias | None = None) -> Tensor:
    given = PreparedKeys(*(x.cpu() for x in keys.tensors()))
    return reference_attention.attend(q.cpu(), given, bias)


def test_kernel_writes_over_its_queries(device):
    q, key, value = (x.to(device) for x in sequences(1, 70, 65, 128))
    prepared = prepare(key, value, 2)
    wanted = attend(q, prepared)
    assert torch.equal(attend(q, prepared, out=q), wanted)


def offset_error(device: str, smoothed: bool) -> float:
    """Return the error with an offset of twenty times their size that all keys share."""
    heads, keys = 2, 140
    q, key, value = sequences(1, 66, keys, heads * 64)
    key = (key.float() + 20 * randoms(1, 1, heads * 64, seed=9)).bfloat16()
    prepared = prepare(key.to(device), value.to(device), heads)
    if not smoothed:
        blocks = key.float().unflatten(2, (heads, 64)).split(KEYS_PER_SCALE, 1)
        scales = torch.stack([one.abs().amax((1, 3)) / 127 for one in blocks], 2)
        steps = scales.repeat_interleave(KEYS_PER_SCALE, 2)[..., :keys].transpose(1, 2)
        codes = (key.float() / steps.repeat_interleave(64, 2)).round().to(torch.int8)
        rest = (prepared.value, prepared.value_scales)
        prepared = PreparedKeys(codes.to(device), scales.to(device), *rest)
    return error(attend(q.to(device), prepared), exact(q, key, value, heads))


def test_kernel_does_not_mind_an_offset_of_all_keys(device):
    # bf16 keys of size 20 carry an error of their own, but the oracle sees it too.
    assert offset_error(device, smoothed=True) < INT8
    assert offset_error(device, smoothed=False) > 4 * INT8


@pytest.mark.parametrize("size", [6e4, 1e-6, 3e30])
def test_kernel_sums_values_of_any_size(device, size):
    q, key, value = sequences(1, 5, 150, 2 * 64)
    # Like keys and values of one sign: all weights are 1, and sums as large as they can be.
    key, value = torch.zeros_like(key), (value.float().abs().clamp(0.9, 1) * size).bfloat16()
    found = attend(q.float().to(device), prepare(key.to(device), value.to(device), 2))
    assert found.dtype == torch.float32
    # On a card fp16 rounds a sum of 64 four times, 2^-11 at most.
    assert error(found, exact(q, key, value, 2)) < 4 * 2**-11


def biases(queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows with shifts, masked keys and a row of nothing else, and who takes which."""
    rows = randoms(4, keys, seed=3)
    rows[1, : keys // 2] = -torch.inf
    rows[2, keys // 3 :] = torch.finfo(torch.float32).min
    rows[3] = -torch.inf
    ids = torch.arange(queries, dtype=torch.int32) * 7 % 4
    return rows.to(dtype), ids


def added(rows: Tensor, ids: Tensor) -> Tensor:
    """Return the bias in full, (t, S) float64; masks are finite, as the references have them."""
    return rows.double().clamp(min=-1e30)[ids.long()]


def attended(kind: str, given: tuple[Tensor, ...], heads: int, bias: KeyBias | None) -> Tensor:
    """Attend by a kernel, into poisoned memory."""
    q, key, value = given
    out, whole = poisoned(q, q.device.type)
    if kind == "int8":
        attend(q, prepare(key, value, heads), bias, out)
    else:
        attend_flash(q, key, value, heads, bias, out)
    assert untouched(whole, out)
    return out


@pytest.mark.parametrize(
    ("kind", "dtype", "width"),
    [
        ("int8", torch.float32, 64),
        ("int8", torch.bfloat16, 128),
        ("flash", torch.bfloat16, 64),
        ("flash", torch.float32, 128),
    ],
)
def test_kernel_adds_a_bias_by_row_id(device, kind, dtype, width):
    heads, queries, keys = 2, 70, 99
    given = sequences(1, queries, keys, heads * width)
    rows, ids = biases(queries, keys, dtype)
    wanted = exact(*given, heads, added(rows, ids))
    bias = KeyBias(rows.to(device), ids.to(device))
    found = attended(kind, tuple(x.to(device) for x in given), heads, bias)
    # Half of the keys are masked and some biases shift weights: fewer independent errors.
    assert error(found, wanted) < (INT8 if kind == "int8" else BF16) * 1.2
    nothing = ids == 3
    mean = given[2].double().mean(1, keepdim=True).expand(-1, int(nothing.sum()), -1)
    assert error(found[:, nothing.to(device)], mean) < BF16  # all masked: all the same


@pytest.mark.parametrize("kind", ["int8", "flash"])
def test_kernel_shares_a_row_or_has_ids_for_each_sample(device, kind):
    heads, queries, keys = 2, 33, 130
    given = sequences(2, queries, keys, heads * 64)
    rows, ids = biases(queries, keys, torch.float32)
    both = torch.stack([ids, ids.flip(0)])
    on_device = tuple(x.to(device) for x in given)
    limit = (INT8 if kind == "int8" else BF16) * 1.2
    shared = attended(kind, on_device, heads, KeyBias(rows[1:].to(device)))
    assert error(shared, exact(*given, heads, added(rows, torch.ones(1)))) < limit
    apart = attended(kind, on_device, heads, KeyBias(rows.to(device), both.to(device)))
    assert error(apart, exact(*given, heads, added(rows, both)[:, None])) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(1, 1, 64), (70, 200, 64), (37, 128, 128), (131, 77, 128)]
)
def test_kernel_attends_in_16_bits(device, dtype, queries, keys, width):
    given = sequences(2, queries, keys, 2 * width, dtype)
    found = attended("flash", tuple(x.to(device) for x in given), 2, None)
    assert error(found, exact(*given, 2)) < (BF16 if dtype == torch.bfloat16 else FP16)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy, of a maximum
def test_kernel_passes_nan_on(device):
    q, key, value = (x.to(device) for x in sequences(1, 6, 70, 2 * 64))
    q[0, 2, 3] = torch.nan
    for found in (attend(q, prepare(key, value, 2)), attend_flash(q, key, value, 2)):
        assert found[0, 2, :64].isnan().all()  # that query, in that head, and nothing else
        assert int(found.isnan().sum()) == 64
    value[0, 9, 70] = torch.nan
    for found in (attend(q[:, :2], prepare(key, value, 2)), attend_flash(q[:, :2], key, value, 2)):
        assert found[..., 70].isnan().all()
        assert int(found.isnan().sum()) == 2
    key[0, 1, 1] = torch.nan
    assert attend(q[:, :2], prepare(key, value, 2))[..., :64].isnan().all()


def test_kernels_run_in_the_interpreter():
    assert "passed" in run_interpreted("test_kernels_attention.py")


@pytest.mark.parametrize("scores", [1 << 22, 500])
def test_twins_attend_some_queries_at_a_time(monkeypatch, scores):
    monkeypatch.setattr(reference_attention, "SCORES", scores)
    heads, queries, keys = 3, 70, 99
    given = sequences(2, queries, keys, heads * 40)  # a head dim without a kernel
    rows, ids = biases(queries, keys, torch.float32)
    bias = KeyBias(rows, torch.stack([ids, ids.flip(0)]))
    wanted = exact(*given, heads, added(rows, bias.row_ids)[:, None])
    q, key, value = given
    assert error(attend(q, prepare(key, value, heads), bias), wanted) < INT8 * 1.2
    assert error(attend_flash(q, key, value, heads, bias), wanted) < BF16 * 1.2
    wide = tuple(x.float() for x in given)
    # fp32: 2^-24 of each of 99 terms, and of scores.
    assert error(attend_flash(*wide, heads, bias), wanted) < 1e-6


def test_operators_say_what_they_return_on_the_meta_device():
    q, key, value = (torch.empty(2, n, 256, dtype=torch.bfloat16, device="meta") for n in (7, 9, 9))
    prepared = prepare(key, value, 2)
    assert prepared.heads == 2
    assert [(tuple(x.shape), x.dtype) for x in prepared.tensors()] == [
        ((2, 9, 256), torch.int8),
        ((2, 2, 1), torch.float32),
        ((2, 9, 256), torch.float16),
        ((2, 256), torch.float32),
    ]
    for found in (attend(q, prepared), attend_flash(q, key, value, 2)):
        assert (found.shape, found.dtype, found.device) == (q.shape, q.dtype, q.device)
    for name in ("prepare_keys", "attend_int8", "attend_flash"):
        assert name in dir(torch.ops.ltxlite)


def test_operators_compute_what_the_functions_return():
    q, key, value = sequences(1, 5, 9, 128)
    prepared = prepare(key, value, 2)
    out = torch.full_like(q, torch.nan)
    torch.ops.ltxlite.attend_int8(q, prepared.tensors(), [], out)
    assert torch.equal(out, attend(q, prepared))
    torch.ops.ltxlite.attend_flash([q, key, value], 2, [], out)
    assert torch.equal(out, attend_flash(q, key, value, 2))


def test_sums_are_made_of_sixteen_parts_of_whole_blocks():
    for keys in (1, 64, 65, 1023, 1025, 32640):
        rows, parts = parts_of(keys)
        assert rows % KEYS_PER_SCALE == 0
        assert 1 <= parts <= 16
        assert (parts - 1) * rows < keys <= parts * rows


def test_few_queries_get_small_tiles():
    card = configs.Card(86, 28)
    large = configs.attention_config("int8", card, 128, False, (14080, 32))
    assert (large.queries, large.half_sums) == (128, True)
    small = configs.attention_config("int8", configs.Card(89, 128), 64, False, (126, 32))
    assert small.queries == 64
    assert not configs.attention_config("int8", configs.Card(100, 148), 64, True, (9, 9)).half_sums
    for kind in configs.ATTENTION.values():
        for of in kind.values():
            for config in (one for some in of.values() for one in some):
                assert KEYS_PER_SCALE % config.keys == 0  # a tile of keys has one scale


def refusals() -> list[tuple[object, str]]:
    q, key = torch.zeros(2, 5, 128), torch.zeros(2, 9, 128)
    keys, rows = prepare(key, key, 2), torch.zeros(3, 9)
    ids = torch.zeros(5, dtype=torch.int32)
    return [
        (lambda: prepare(key[:, :0], key[:, :0], 2), "at least one token"),
        (lambda: prepare(key, key, 3), "3 heads x D"),
        (lambda: prepare(key, key[:, :8], 2), "do not belong"),
        (lambda: prepare(key.mT, key.mT, 3), "columns side by side"),
        (lambda: prepare(key.int(), key, 2), "fp32, fp16 or bf16"),
        (lambda: attend(q[:1], keys), "do not fit keys"),
        (lambda: attend(q, keys, out=q[:1]), "out is"),
        (lambda: attend(q, keys, KeyBias(rows[:, :8])), "does not fit 2 samples"),
        (lambda: attend(q, keys, KeyBias(rows, ids[:4])), "does not fit"),
        (lambda: attend_flash(q, key.half(), key.half(), 2), "one dtype"),
        (lambda: attend_flash(q, key, key[:, :8], 2), "one shape"),
        (lambda: KeyBias(rows.mT), "columns side by side"),
        (lambda: KeyBias(rows, ids.long()), "int32"),
        (lambda: PreparedKeys(keys.codes, keys.scales, key, keys.value_scales), "prepared keys"),
    ]


@pytest.mark.parametrize("number", range(14))
def test_what_does_not_fit_is_refused(number):
    call, message = refusals()[number]
    with pytest.raises(FormatError, match=message):
        call()
