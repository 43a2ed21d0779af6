"""The transformer in each arithmetic: how far from fp32, and which layers take it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_networks import stream_input
from golden_support import Case, read_manifest
from torch import Tensor, nn

from ltxlite.errors import RequestError
from ltxlite.linear import QuantLinear
from ltxlite.math_mode import ARITHMETICS, set_math
from ltxlite.memory.machine import CpuMachine, Faults
from ltxlite.memory.place import Memory
from ltxlite.memory.stream import Placement
from ltxlite.models.passes import Pass, Perturbation, Skip
from ltxlite.models.transformer import Transformer
from ltxlite.networks import Networks
from ltxlite_kernels.dispatch import (
    AUTOMATIC,
    INT8_ATTENTION_FROM,
    Math,
    Stored,
    linear_math,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def case() -> Case:
    entry = next(item for item in read_manifest(GOLDEN) if item["name"] == "dit_basic")
    return Case.load(GOLDEN, entry)


@pytest.fixture(scope="module")
def given(case: Case) -> Pass:
    return Pass(stream_input(case, "video"), stream_input(case, "audio"))


def outputs(transformer: Transformer, given: Pass) -> list[Tensor]:
    with torch.inference_mode():
        velocity = transformer.run([given])[0]
    assert velocity.video is not None and velocity.audio is not None
    return [velocity.video, velocity.audio]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_int8_is_close_to_fp32(case: Case, given: Pass) -> None:
    transformer = case.networks().transformer()
    exact = outputs(transformer, given)
    counts = set_math(transformer, "int8", None)
    assert set(counts) == {Math.INT8}
    linears = [m for m in transformer.blocks.modules() if isinstance(m, nn.Linear | QuantLinear)]
    assert counts[Math.INT8] == len(linears)
    for found, wanted in zip(outputs(transformer, given), exact, strict=True):
        # Rows of 64 and 32 are too short to turn: 1.1 and 0.6 % measured, four blocks.
        assert 1e-4 < error(found, wanted) < 0.02
    assert set_math(transformer, "bf16", None) == {Math.BF16: len(linears)}
    for found, wanted in zip(outputs(transformer, given), exact, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("mode", "limit"), [("fp16", 1e-3), ("fp8", 1e-6)])
def test_other_modes_are_close_to_fp32(case: Case, given: Pass, mode: str, limit: float) -> None:
    transformer = case.networks().transformer()
    exact = outputs(transformer, given)
    counts = set_math(transformer, mode, None)
    # Weights of this file are plain: fp8 is for those that are stored in it.
    assert set(counts) == {Math.FP16 if mode == "fp16" else Math.BF16}
    for found, wanted in zip(outputs(transformer, given), exact, strict=True):
        assert error(found, wanted) < limit


def test_chunked_and_streamed_int8_has_the_bits_of_the_plain_one(case: Case, given: Pass) -> None:
    shared = case.networks()
    memory = Memory(
        CpuMachine(Faults(poison=True)),
        {"transformer": Placement(slots=2, prefetch=1, pinned_bytes=0, ring=2)},
    )
    resident = Networks(shared.files, shared.device, shared.dtype)
    streamed = Networks(shared.files, shared.device, shared.dtype, memory=memory)
    resident.math = streamed.math = "int8"
    transformer = resident.transformer()
    whole = outputs(transformer, given)
    transformer.chunk = 5
    for found, wanted in zip(outputs(transformer, given), whole, strict=True):
        # Attention's sums depend on the number of queries in torch; the products do not.
        assert error(found, wanted) < 1e-3
    transformer = streamed.transformer()
    for _ in range(2):  # with row scales computed on the way, then with kept ones
        for found, wanted in zip(outputs(transformer, given), whole, strict=True):
            assert torch.equal(found, wanted)
    streamed.close()


def test_layers_on_the_list_stay_as_they_are(case: Case) -> None:
    transformer = case.networks().transformer()
    counts = set_math(
        transformer, "int8", None, exact=["blocks.0", "blocks.1.video.self_attention.to_q"]
    )
    coded = {
        name for name, m in transformer.named_modules() if isinstance(m, QuantLinear) and m.codes
    }
    assert counts[Math.INT8] == len(coded) and counts[Math.BF16] > 0
    assert not [name for name in coded if name.startswith("blocks.0.")]
    first = {name for name in coded if name.startswith("blocks.1.video.self_attention.to_")}
    assert {name.rpartition("_")[2] for name in first} == {"k", "v", "out", "logits"}


def test_every_choice_of_the_table_exists() -> None:
    for capability, choices in AUTOMATIC.items():
        assert set(choices) == set(Stored)
        for kind in Stored:
            for mode in Math:
                assert linear_math(mode, capability, kind) in ARITHMETICS
    assert linear_math(Math.AUTO, 75, Stored.BLOCKS) is AUTOMATIC[80][Stored.BLOCKS]
    assert linear_math(Math.AUTO, 87, Stored.PLAIN) is AUTOMATIC[86][Stored.PLAIN]
    assert linear_math(Math.AUTO, None, Stored.BLOCKS) is Math.BF16
    assert linear_math(Math.FP8, 89, Stored.FP8) is Math.FP8


def test_fp8_on_a_card_without_it_is_refused(case: Case) -> None:
    transformer = case.networks().transformer()
    with pytest.raises(RequestError, match=r"compute capability 8\.6 multiplies no fp8.*--math"):
        set_math(transformer, "fp8", 86)


def test_long_attention_has_int8_scores(case: Case, given: Pass) -> None:
    transformer = case.networks().transformer()
    exact = outputs(transformer, given)
    set_math(transformer, "int8", None, exact=["blocks"])  # attention alone
    attentions = [block.video.self_attention for block in transformer.blocks]
    assert all(module.int8_from == INT8_ATTENTION_FROM for module in attentions)
    assert torch.equal(outputs(transformer, given)[0], exact[0])  # too few keys
    for module in attentions:
        module.int8_from = 1
    found = outputs(transformer, given)[0]
    assert 1e-5 < error(found, exact[0]) < 0.01
    transformer.chunk = 5  # queries of a chunk see all prepared keys
    assert error(outputs(transformer, given)[0], found) < 1e-5
    set_math(transformer, "bf16", None)
    assert error(outputs(transformer, given)[0], exact[0]) < 1e-6


@pytest.mark.parametrize("mixed", [False, True])
def test_skipped_attention_passes_values_through_prepared_keys(
    case: Case, given: Pass, mixed: bool
) -> None:
    assert given.video is not None
    skips = Perturbation(((Skip.VIDEO_SELF, None),))
    batch = len(given.video.latent)
    perturbed = replace(given, perturbations=(skips,) * batch)
    if mixed and batch > 1:
        perturbed = replace(given, perturbations=(skips, *(Perturbation(),) * (batch - 1)))
    transformer = case.networks().transformer()
    exact = outputs(transformer, perturbed)
    set_math(transformer, "int8", None, exact=["blocks"])
    for block in transformer.blocks:
        block.video.self_attention.int8_from = 1
    for found, wanted in zip(outputs(transformer, perturbed), exact, strict=True):
        assert error(found, wanted) < 0.01  # values are kept to 2^-11
