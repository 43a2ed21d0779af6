"""The activation account against peaks added up by hand; exact, because bytes are integers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltxlite.memory.meter import ActivationMeter, Footprints

KIB = 1024
ROW = 4 * KIB  # one row of 1024 fp32


@pytest.fixture(params=["no_grad", "inference_mode"], autouse=True)
def _mode(request: pytest.FixtureRequest):
    """Under inference mode composite operations reach the meter whole; it must see the same."""
    with getattr(torch, request.param)():
        yield


def test_only_what_is_made_inside_counts():
    before = torch.zeros(8, 1024)
    with ActivationMeter() as meter:
        before.add_(1)
        before[3:].mul_(2)
        before.t().view(-1, 8)
        assert meter.peak_bytes == 0
        made = before + 1
    assert (meter.current_bytes, meter.peak_bytes) == (8 * ROW, 8 * ROW)
    assert made.shape == before.shape


def test_views_and_in_place_results_count_once_and_keep_their_storage_alive():
    with ActivationMeter() as meter:
        whole = torch.zeros(7, 1024)
        part = whole[2:3].view(32, 32).t()
        again = whole.add_(1)
        assert meter.current_bytes == 7 * ROW
        del whole, again
        assert meter.current_bytes == 7 * ROW, "one row still shows all seven"
        del part
        assert meter.current_bytes == 0
    assert meter.peak_bytes == 7 * ROW


def test_freed_temporaries_lower_the_account_but_not_the_peak():
    x = torch.ones(5, 1024)
    with ActivationMeter() as meter:
        y = x + 1  # 5 rows
        y = y * 2  # the old 5 and the new 5, then 5
        z = y[:1] + y[1:2]  # 6
    assert (meter.current_bytes, meter.peak_bytes) == (6 * ROW, 10 * ROW)
    assert z.shape == (1, 1024)


def test_parts_of_composite_operations_are_seen():
    # linear on three dimensions is a view, addmm and a view: one new storage of (2*3, 512) fp32.
    x, weight, bias = torch.ones(2, 3, 1024), torch.ones(512, 1024), torch.ones(512)
    with ActivationMeter() as meter:
        out = F.linear(x, weight, bias)
    assert meter.peak_bytes == meter.current_bytes == out.numel() * 4
    low = torch.ones(4, 1024, dtype=torch.bfloat16)
    with ActivationMeter() as meter:
        cast = low.to(torch.float32).reshape(2, -1)  # reshape of a contiguous tensor is a view
    assert meter.peak_bytes == 4 * ROW and cast.shape == (2, 2048)
    with ActivationMeter() as meter:
        moved = torch.ones(4, 1024).t().reshape(-1)  # this one must copy: 4 rows beside 4
    assert (meter.current_bytes, meter.peak_bytes) == (4 * ROW, 8 * ROW)
    assert moved.shape == (4096,)


def test_a_copy_inside_an_operation_counts_while_it_lives():
    # Two fp32 casts live while they are joined and die with the expression.
    low = torch.ones(3, 1024, dtype=torch.bfloat16)
    with ActivationMeter() as meter:
        joined = torch.cat([low.float(), low.float()])
        assert meter.current_bytes == 6 * ROW
    assert meter.peak_bytes == (3 + 3 + 6) * ROW
    assert joined.shape == (6, 1024)


def test_results_with_several_tensors_and_out_arguments_are_counted():
    x = torch.randn(3, 1024)
    with ActivationMeter() as meter:
        values, index = x.max(dim=1, keepdim=True)  # fp32 and int64
        assert meter.current_bytes == 3 * 4 + 3 * 8
        target = torch.empty(3, 1024)
        torch.mul(x, 2, out=target)
        assert meter.current_bytes == 3 * 12 + 3 * ROW
    assert values.shape == index.shape


def test_a_storage_that_grows_is_counted_at_its_new_size():
    with ActivationMeter() as meter:
        grown = torch.empty(0)
        grown.resize_(9, 1024)
        assert meter.current_bytes == 9 * ROW
        del grown
    assert (meter.current_bytes, meter.peak_bytes) == (0, 9 * ROW)


def test_constants_made_from_python_values_count():
    with ActivationMeter() as meter:
        values = torch.tensor([1.0, 2.0, 3.0])
    assert meter.current_bytes == values.numel() * 4


def test_only_the_named_device_counts():
    with ActivationMeter("cuda") as elsewhere, ActivationMeter("cpu") as here:
        x = torch.zeros(2, 1024) + 1
    assert (elsewhere.peak_bytes, here.peak_bytes) == (0, 4 * ROW)
    assert x.shape == (2, 1024)


def test_what_outlives_the_meter_still_leaves_its_account():
    with ActivationMeter() as meter:
        x = torch.zeros(2, 1024)
    assert meter.current_bytes == 2 * ROW
    del x
    assert meter.current_bytes == 0


def test_a_restart_begins_with_what_is_alive():
    with ActivationMeter() as meter:
        kept = torch.zeros(3, 1024)
        torch.zeros(9, 1024)
        assert meter.restart() == 12 * ROW
        assert (meter.peak_bytes, meter.current_bytes) == (3 * ROW, 3 * ROW)
        torch.zeros(2, 1024)
    assert meter.peak_bytes == 5 * ROW and kept.shape == (3, 1024)


def test_the_largest_holders_are_those_of_the_peak_not_those_of_the_end():
    with ActivationMeter(trace=True) as meter:
        first = torch.zeros(4, 1024)
        second = first + 1
        assert [item.shape for item in meter.largest()] == [(4, 1024)] * 2
        del first
        third = second[:1] * 2
    found = meter.largest(1)[0]
    assert len(meter.largest()) == 2 and third.shape == (1, 1024)
    assert (found.nbytes, found.shape) == (4 * ROW, (4, 1024))
    assert "test_the_largest_holders" in found.where
    assert found.line().split()[:3] == ["0.0", "MiB", "4x1024"]


def test_footprints_raise_the_peak_while_an_operation_runs_and_libraries_stand_apart():
    given = torch.ones(4, 1024)
    product = torch.ops.aten.mm.default
    footprints = Footprints({product: lambda out, a, b: out.nbytes}, {product: lambda *_: 77})
    with ActivationMeter(footprints=footprints) as meter:
        out = given @ given.t()  # 64 bytes, and as many of workspace
        assert (meter.peak_bytes, meter.current_bytes) == (2 * out.nbytes, out.nbytes)
        assert meter.library_bytes == 77
        assert meter.largest(9)[-1].operation == "workspace of aten.mm.default"
        assert meter.restart() == 2 * out.nbytes
    assert meter.library_bytes == 0


class Everything(nn.Module):
    """Views, in-place steps, chunks, casts, several results: what networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        for start in range(0, x.shape[1], 7):  # the last chunk is shorter
            rows = slice(start, start + 7)
            hidden = F.gelu(self.up(F.layer_norm(x[:, rows], (32,))))
            out[:, rows] = self.down(hidden.mul_(2)).to(torch.bfloat16).to(x.dtype)
        values, places = out.max(dim=-1)
        out.add_(values[..., None]).addcmul_(out, out, value=0.5)
        image = self.conv(out[:, :9].reshape(1, 3, 12, -1).contiguous())
        halves = torch.cat([part.clone() for part in image.chunk(2, dim=2)], dim=0)
        return torch.stack([halves.flatten().sum(), places.sum()])


def test_results_that_are_recalled_on_meta_are_counted_as_if_computed():
    torch.manual_seed(0)
    real = Everything()
    with torch.device("meta"):
        blank = Everything()
    peaks = []
    for network, x in ((real, torch.randn(1, 33, 32)), (blank, torch.empty(1, 33, 32).to("meta"))):
        with ActivationMeter(x.device.type) as meter:
            network(x)
            network(x)  # all of it known by now
        peaks.append((meter.peak_bytes, meter.current_bytes))
    assert peaks[0] == peaks[1]


def test_recall_keeps_shapes_dtypes_and_strides_apart():
    def shapes(x: torch.Tensor) -> list[object]:
        made = [x + 1, x.float() * 2, x.t() + 1, torch.cat([x, x]), x[1:] + x[:-1]]
        return [(item.shape, item.dtype, item.stride()) for item in made]

    for dtype in (torch.float32, torch.bfloat16):
        for size in ((3, 5), (5, 3)):
            wanted = shapes(torch.zeros(size, dtype=dtype))
            with ActivationMeter("meta"):
                x = torch.empty(size, dtype=dtype, device="meta")
                assert shapes(x) == wanted and shapes(x) == wanted


def test_recall_answers_nothing_that_values_decide_and_leaves_the_cpu_alone():
    with ActivationMeter("meta") as meter:
        for value in (1.0, 2.0):
            host = torch.full((3,), value)
            assert (host + 1).tolist() == [value + 1] * 3
            card = torch.empty(3, device="meta")
            card.resize_(4)
            card.add_(1)
            assert card.shape == (4,)
            del card
    assert meter.peak_bytes == 16
