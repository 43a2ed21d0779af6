"""The operators: the same bits as the code they stand for, and footprints that can be checked."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from ltxlite.account.phase import CARD
from ltxlite.memory.meter import ActivationMeter
from ltxlite_kernels import dequant, ops
from ltxlite_kernels.configs import DEQUANT
from ltxlite_quant import FORMATS, decode


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "plain": ((2, 3, 63, 16), (2, 3, 41, 16), {}),
    "bias": ((2, 3, 63, 16), (2, 3, 41, 16), {"bias": randn(1, 1, 1, 41)}),
    "causal": ((1, 4, 37, 8), (1, 4, 37, 8), {"causal": True, "scale": 0.3}),
    "shared heads": ((1, 6, 37, 8), (1, 2, 37, 8), {"causal": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_has_the_bits_of_torch_and_its_shape_on_meta(case: str) -> None:
    queries, keys, named = CASES[case]
    q, k, v = randn(*queries), randn(*keys, seed=1), randn(*keys, seed=2)
    wanted = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=named.get("bias"),
        is_causal=named.get("causal", False),
        scale=named.get("scale"),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    assert torch.equal(ops.attention(q, k, v, **named), wanted)
    blank = {name: x.to("meta") if name == "bias" else x for name, x in named.items()}
    result = ops.attention(q.to("meta"), k.to("meta"), v.to("meta"), **blank)
    assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)


def test_attention_as_the_layers_shape_it_needs_no_copy_on_meta() -> None:
    # (B, T, H, D) in memory, seen as (B, H, T, D): what the flash kernels read and write.
    q = torch.empty(1, 63, 4, 16, device="meta").transpose(1, 2)
    out = ops.attention(q, q, q).transpose(1, 2)
    assert out.is_contiguous()


def test_attention_is_differentiable_where_gradients_are_recorded() -> None:
    q, k, v = (randn(1, 2, 7, 8, seed=seed).requires_grad_() for seed in range(3))
    with torch.enable_grad():
        ops.attention(q, k, v).sum().backward()
    # Rows of attention sum to 1, so the sum's gradient in v is the sum of each key's weights.
    weights = torch.softmax(q @ k.mT / 8**0.5, dim=-1).sum(dim=-2)[..., None].expand_as(v)
    assert v.grad is not None
    assert torch.allclose(v.grad, weights, atol=1e-6)  # a few fp32 roundings of values near 1


def test_dequantize_on_meta_gives_the_shape_and_runs_nothing() -> None:
    blocks = torch.empty(5, 3 * 144, dtype=torch.uint8, device="meta")
    with torch.inference_mode(), ActivationMeter("meta") as meter:
        out = dequant.dequantize(blocks, FORMATS["Q4_K"], (5, 768), torch.bfloat16)
    assert out.is_meta and out.shape == (5, 768)
    assert meter.peak_bytes == out.nbytes


class OnCard:
    """Looks like blocks on a GPU."""

    is_cuda = True

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows


@pytest.mark.parametrize(("rows", "columns"), [(16384, 4096), (1001, 16384), (3, 1 << 23), (0, 32)])
def test_on_a_card_plain_torch_decodes_bounded_pieces(rows: int, columns: int) -> None:
    out = torch.empty(rows, columns, device="meta")
    pieces = list(dequant._pieces(OnCard(rows), out))
    covered = [row for piece in pieces for row in range(rows)[piece]]
    assert covered == list(range(rows))
    for piece in pieces:
        count = len(range(rows)[piece])
        assert count == 1 or count * columns <= dequant.PIECE_ELEMENTS


@pytest.mark.parametrize("name", sorted(decode.DECODERS))
def test_no_decoder_needs_more_temporaries_than_is_stated(name: str) -> None:
    row, count = FORMATS[name], 1 << 16
    blocks = torch.zeros(count // row.block_size, row.block_bytes, dtype=torch.uint8)
    with ActivationMeter("cpu") as meter:
        decode.decoder_of(row)(blocks)
    # Codebooks of a few dozen numbers do not grow with the weight.
    assert meter.peak_bytes <= dequant.PIECE_BYTES_PER_ELEMENT * count + 1024


def test_a_kernel_needs_nothing_besides_and_plain_torch_a_piece() -> None:
    workspace = ops.WORKSPACES[torch.ops.ltxlite.dequantize.default]
    out = torch.empty(4096, 4096, device="meta")
    kernels = [workspace(None, out, name, out) for name in DEQUANT]
    assert set(kernels) == {0}
    whole = dequant.PIECE_ELEMENTS * dequant.PIECE_BYTES_PER_ELEMENT
    assert workspace(None, out, "no kernel yet", out) == whole
    assert workspace(None, out, "no kernel yet", out[:1]) == 4096 * 9


@pytest.mark.parametrize(
    ("queries", "keys", "wanted"),
    [
        # 1024 tiles of 64 queries fill any card: a log-sum-exp a query and head, nothing else.
        ((1, 32, 2048, 128), 32640, 4 * 32 * 2048),
        # 64 tiles on 132 multiprocessors: four splits, each with a partial sum and its own scale.
        ((1, 32, 126, 64), 32640, 4 * 32 * 126 + 4 * 32 * 126 * 4 * 65),
        # 63 keys are one tile of keys, which cannot be split.
        ((1, 32, 126, 64), 63, 4 * 32 * 126),
    ],
)
def test_attention_is_stated_to_need_what_flash_attention_allocates(
    queries: tuple[int, ...], keys: int, wanted: int
) -> None:
    q = torch.empty(queries, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, queries[1], keys, queries[3], dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), ActivationMeter("meta", CARD) as meter:
        out = ops.attention(q, k, k)
    assert meter.peak_bytes == out.nbytes + wanted


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.usefixtures("inference")
def test_other_peoples_attention_is_counted_like_ours() -> None:
    q = torch.empty(1, 8, 4096, 64, dtype=torch.bfloat16, device="meta")
    with ActivationMeter("meta", CARD) as theirs:
        F.scaled_dot_product_attention(q, q, q)
    with ActivationMeter("meta", CARD) as ours:
        ops.attention(q, q, q)
    assert theirs.peak_bytes == ours.peak_bytes < 8 * 4096**2  # bytes of a T x T per head


@pytest.mark.usefixtures("inference")
def test_an_rms_norm_is_counted_as_one_kernel() -> None:
    x = torch.empty(1, 63, 128, dtype=torch.bfloat16, device="meta")
    with ActivationMeter("meta", CARD) as meter:
        F.rms_norm(x, (128,), None, 1e-6)
    assert meter.peak_bytes == x.nbytes + 63 * 4
