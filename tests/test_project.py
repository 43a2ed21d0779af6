"""Projections are arithmetic: terms against formulas by hand, the whole against kernels.md 5."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import project, project_time, project_work
from benchmarks.__main__ import main as benchmarks
from benchmarks.project_cards import (
    ASSUMED,
    RATES,
    Measurement,
    efficiency,
    read_cards,
    read_measurements,
)
from benchmarks.project_issue import Bound, Speed, bound_of, resident_warps
from benchmarks.project_time import MODES, Machine, Step, forward
from benchmarks.project_work import Tokens, Traffic, mixings, products
from ltxlite.geometry import ClipShape

CARDS = read_cards()
COMFYUI, BF16, FP16, INT8, FP8 = MODES
LINE = {
    "registers": 122,
    "shared": 32 << 10,
    "loop": [83, 32],
    "tensor": {"IMMA": 32},
    "ptx": ["mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"],
}


def speed(card: str, kind: str) -> Speed:
    one = CARDS[card]
    return Speed(one.peak(RATES[kind]) / 2, one.multiprocessors, one.boost_ghz * 1e9)


def test_linears_are_those_of_the_published_shapes():
    m, a, t = 1537, 126, 1024
    wide, narrow = 4096, 2048
    video = m * (4 + 2 + 8) * wide**2 + m * 4 * wide * narrow  # own, text q and o, FF, both cross
    audio = a * (4 + 2 + 8 + 2 + 2) * narrow**2
    text = t * 2 * (wide**2 + narrow**2)
    gates = 32 * (3 * m * wide + 3 * a * narrow)
    wanted = 48 * 2 * (video + audio + text + gates)
    assert sum(one.flops for one in products(Tokens(m, a, t))) == wanted
    # peers.md 5.1 counts 385.9 M a block without the gates' 0.6 M.
    assert sum(one.elements for one in products(Tokens(m, a))) / 48 == pytest.approx(
        386.5e6, rel=1e-3
    )


def test_attention_is_four_operations_for_each_pair_and_channel():
    m, a, t = 1537, 126, 1024
    pairs = (m * m + m * t) * 4096 + (a * a + a * t + 2 * m * a) * 2048
    assert sum(one.flops for one in mixings(Tokens(m, a, t))) == 48 * 4 * pairs


def test_a_step_takes_as_long_as_the_slowest_of_device_bus_and_host():
    step = Step({"linear": 1.0, "attention": 0.5}, bus=1.2, host=0.3)
    assert (step.seconds, step.limit) == (1.5, "device")
    assert (replace(step, bus=2.0).seconds, replace(step, bus=2.0).limit) == (2.0, "bus")
    assert replace(step, host=3.0).limit == "host"


# Seconds per forward of kernels.md 5, without elementwise code and a weight decoded once: columns A
# (one-pass decoding, cuBLAS bf16, SDPA) and C (int8 linears and scores).
PUBLISHED = {
    ("rtx3060", 6144): (9.3, 3.5),
    ("rtx3060", 14080): (25.6, 10.0),
    ("rtx4090", 6144): (1.5, 0.56),
    ("rtx4090", 14080): (4.0, 1.6),
    ("rtx4070", 6144): (4.1, 1.6),
    ("rtx5070", 14080): (10.6, 4.1),
}


@pytest.mark.parametrize(("key", "seconds"), PUBLISHED.items())
def test_the_table_of_the_laboratory_notes_comes_out_again(key, seconds):
    machine = Machine(CARDS[key[0]], compiled={}, resident=1.0)
    for mode, wanted in zip((BF16, INT8), seconds, strict=True):
        step = forward(machine, replace(mode, chunk=0), Tokens(key[1], 126))
        counted = sum(step.terms[name] for name in ("linear", "attention", "dequantize"))
        # The notes leave out audio (1 %) and the prompt's keys (2 %), and round to two digits.
        assert counted == pytest.approx(wanted, rel=0.1)


def test_decoding_by_torch_costs_what_was_counted_with_the_original():
    # kernels.md 0: 15.3 bytes a weight for Q4_K, 23 to 39 for Q5_K and Q5_0.
    assert project_work.torch_decoding("Q4_K").bytes_per_element == pytest.approx(15.3, abs=0.1)
    assert 23 <= project_work.torch_decoding("Q5_K").bytes_per_element <= 39
    assert 23 <= project_work.torch_decoding("Q5_0").bytes_per_element <= 39


def test_weights_are_decoded_once_for_each_chunk_of_tokens():
    machine = Machine(CARDS["rtx3060"], compiled={})
    once, often = (
        forward(machine, replace(BF16, chunk=chunk), Tokens(4096, 126)).terms["dequantize"]
        for chunk in (0, 1024)
    )
    # Of 18.55 B elements 12.9 B multiply picture tokens, four chunks of them; the rest once.
    video = sum(one.elements for one in products(Tokens(4096, 126)) if one.rows == 4096)
    whole = sum(one.elements for one in products(Tokens(4096, 126)))
    assert often / once == pytest.approx((whole + 3 * video) / whole)


def test_traffic_counts_each_tensor_of_a_kernel_once():
    x = torch.empty(3, 5, device="meta")
    row = torch.empty(5, device="meta")
    with torch.inference_mode(), Traffic() as traffic:
        y = x.t().contiguous()  # 60 bytes read, 60 written; the transposition is a view
        x + row  # 60 + 20 + 60
        x.mul_(2)  # in place: one tensor
        y @ x  # 60 + 60 + 100, 5 x 3 by 3 x 5
    assert (traffic.kernels, traffic.nbytes) == (4, 120 + 140 + 60 + 220)
    assert (traffic.flops, traffic.product_bytes) == (2 * 5 * 3 * 5, 220)


def test_convolutions_are_counted_by_places_and_weights():
    with torch.device("meta"):
        layer = torch.nn.Conv3d(4, 6, 3, padding=1, bias=False)
    with torch.inference_mode(), Traffic() as traffic:
        layer(torch.empty(1, 4, 2, 5, 7, device="meta"))
    assert traffic.flops == 2 * (2 * 5 * 7) * 6 * (4 * 27)


def test_the_picture_costs_20_gflop_a_latent_place_behind_the_first_frame():
    one, two = (
        project_work.picture(ClipShape(frames, 11, 13, 126, 24.0)).flops for frames in (7, 8)
    )
    assert (two - one) / (11 * 13) == pytest.approx(20.1e9, rel=0.01)  # peers.md 5.2


def test_issue_slots_and_warps_bound_a_kernel():
    compiled = {"matmul_int8 1024+ plain sm_86": LINE}
    bound = bound_of(compiled, "matmul_int8 1024+ plain sm_86", 8, speed("rtx3060", "matmul int8"))
    assert bound is not None
    # 32 products of 4096 multiply-adds, 256 a clock: 512 clocks for 83 instructions (kernels.md 2).
    assert bound.issue_ratio == pytest.approx(83 / 512, rel=0.01)
    assert bound.warps == 16  # two blocks: 8 warps x 32 x 128 registers are half of a processor's
    assert bound.efficiency == pytest.approx(1 / (1 + bound.issue_ratio))
    assert (
        bound_of(compiled, "matmul_int8 1+ plain sm_86", 8, speed("rtx3060", "matmul int8")) is None
    )


def test_a_loop_of_two_types_is_weighed_by_their_numbers():
    line = LINE | {
        "loop": [400, 96],
        "tensor": {"IMMA": 32, "HMMA": 64},
        "ptx": [
            "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
            "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
        ],
    }
    given = speed("rtx3060", "attention int8")
    bound = bound_of({"attend sm_86": line}, "attend sm_86", 8, given)
    assert bound is not None
    # Both take 16 clocks: 4096 at 256 a clock, 2048 at 128.
    assert bound.issue_ratio == pytest.approx(400 / (96 * 16), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "warps"),
    [({}, 16), ({"registers": 255}, 8), ({"shared": 60 << 10}, 8), ({"registers": 24}, 24)],
)
def test_registers_shared_memory_and_warps_each_limit_what_a_processor_holds(changes, warps):
    # Of 24 registers ten blocks would fit, of 48 warps six, of 33 KiB three into 100.
    assert resident_warps(LINE | changes, 8, 86) == warps


def test_a_bound_lowers_an_assumed_efficiency_and_never_raises_it():
    card = CARDS["rtx3060"]
    slow, fast = Bound("k", 0.9, 16), Bound("k", 0.1, 16)
    assert efficiency(card, "matmul int8", (), slow).value == pytest.approx(1 / 1.9)
    assert efficiency(card, "matmul int8", (), fast).value == ASSUMED["matmul int8"]
    assert Bound("k", 0.0, 4).efficiency == 0.5, "one warp a scheduler hides no latency"


def test_measured_efficiencies_replace_assumed_ones_and_say_so(tmp_path):
    document = {
        "conditions": {"machine": CARDS["rtx3060"].name},
        "achieved": {"matmul int8": 51.0, "memory": 324.0},
    }
    folder = tmp_path / "rtx"
    folder.mkdir()
    (folder / "2026-11-21-abc-kernels.json").write_text(json.dumps(document))
    (folder / "2026-11-21-abc-step.json").write_text("not read")
    found = read_measurements(CARDS, tmp_path)
    own = efficiency(CARDS["rtx3060"], "matmul int8", found)
    assert (own.value, own.origin) == (0.5, "measured, 2026-11-21-abc-kernels.json")
    near = efficiency(CARDS["rtx4070"], "matmul int8", found)
    assert near.value == 0.5 and "measured on NVIDIA GeForce RTX 3060" in near.origin
    # An H200 multiplies with other instructions: only bandwidth is carried over.
    assert (
        efficiency(replace(CARDS["h200"], efficiency={}), "matmul int8", found).origin == "assumed"
    )
    assert efficiency(replace(CARDS["h200"], efficiency={}), "memory", found).value == 0.9
    assert efficiency(CARDS["rtx3060"], "attention int8", found).origin == "assumed"


def test_the_nearest_architecture_is_preferred():
    cards = (CARDS["rtx3060"], CARDS["rtx4090"])
    found = [
        Measurement(one, {"memory": one.memory_gbs / 2 + i}, one.key) for i, one in enumerate(cards)
    ]
    assert "4090" in efficiency(CARDS["rtx5070"], "memory", found).origin
    assert "3060" in efficiency(CARDS["rtx3090"], "memory", found).origin


def test_more_work_and_slower_cards_take_longer():
    machine = Machine(CARDS["rtx3060"], compiled={})
    for mode in (COMFYUI, BF16, FP16, INT8):
        seconds = [forward(machine, mode, Tokens(m, 126)).seconds for m in (1000, 6144, 14080)]
        assert seconds == sorted(set(seconds))
        for field in ("memory_gbs", "multiprocessors"):
            card = replace(machine.card, **{field: getattr(machine.card, field) * 2})
            other = forward(Machine(card, compiled={}), mode, Tokens(6144, 126))
            assert other.seconds <= seconds[1]
    for key, card in CARDS.items():
        step = forward(Machine(card, compiled={}), INT8, Tokens(6144, 126))
        plain = forward(Machine(card, compiled={}), COMFYUI, Tokens(6144, 126))
        assert step.seconds < plain.seconds, key


def test_what_is_resident_does_not_cross_the_bus():
    card = CARDS["rtx4060"]
    steps = [
        forward(Machine(card, compiled={}, resident=part), INT8, Tokens(1024, 126))
        for part in (0.0, 0.5, 1.0)
    ]
    whole = sum(one.elements for one in products(Tokens(1024, 126))) * 0.5625 / 12e9
    assert [step.bus for step in steps] == pytest.approx([whole, whole / 2, 0.0])
    assert steps[0].limit == "bus", "few tokens hide no streaming over eight lanes (peers.md 5.5)"


def test_every_number_of_a_card_names_its_source():
    for card in CARDS.values():
        assert {"tflops", "memory_gbs", "bus_gbs", "clock"} <= set(card.source)
        # Peaks, processors and clocks agree: 512 bf16 operations a clock, 4096 on Hopper.
        per_clock = 4096 if card.architecture == 90 else 512
        peak = card.multiprocessors * card.boost_ghz * per_clock / 1e3
        assert card.tflops["bf16"] == pytest.approx(peak, rel=0.02), card.key


def test_the_command_prints_a_labelled_projection(capsys):
    arguments = ["--gpu", "rtx4060", "--size", "128x64", "--frames", "9"]
    assert project.main(arguments) == 0
    captured = capsys.readouterr()
    assert "Projection, not a measurement" in captured.err and "assumed" in captured.err
    document = json.loads(captured.out.splitlines()[-1])
    assert document["label"] == "projection"
    job = document["cards"][0]["jobs"][0]
    assert set(job["modes"]) == {"comfyui-gguf", "bf16", "fp16", "int8", "fp8"}
    clip = job["modes"]["int8"]
    assert [stage["steps"] for stage in clip["stages"]] == [8, 3]
    assert [stage["video_tokens"] for stage in clip["stages"]] == [4, 16]
    assert clip["seconds"] == pytest.approx(sum(clip["parts"].values()), abs=0.02)


def test_json_alone_prints_no_table_and_cards_without_fp8_have_no_such_mode(capsys):
    arguments = ["--gpu", "rtx3060", "--size", "128x64", "--frames", "9", "--json"]
    assert benchmarks(["project", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "fp8" not in json.loads(captured.out)["cards"][0]["jobs"][0]["modes"]


@pytest.mark.parametrize("wrong", [["--size", "100x64"], ["--frames", "10"], ["--resident", "2"]])
def test_sizes_off_the_grid_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        project.main(wrong)
    assert stopped.value.code == 2
    assert wrong[0].strip("-") in capsys.readouterr().err or wrong[0] != "--resident"


def test_assumptions_are_part_of_the_result():
    found = project.assumptions()
    assert found["gap_seconds"] == project_time.GAP_SECONDS
    ours, theirs = found["elementwise"]["int8"], found["elementwise"]["eager"]
    assert "traffic" in ours["source"] and ours["token_bytes"] < theirs["token_bytes"] / 4
