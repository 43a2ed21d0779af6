"""What the transformer computes once instead of often: shared passes, tabulated modulation."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_networks import stream_input
from golden_support import Case, read_manifest

from ltxlite.models.block import Block
from ltxlite.models.passes import Pass, Perturbation, Skip, Timesteps, Velocity
from ltxlite.models.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def case() -> Case:
    entry = next(item for item in read_manifest(GOLDEN) if item["name"] == "dit_basic")
    return Case.load(GOLDEN, entry)


@pytest.fixture
def transformer(case: Case) -> Transformer:
    return case.networks().transformer()


def guided_passes(case: Case, last: int) -> list[Pass]:
    """Conditional, perturbed in the last block, isolated in all: over the very same inputs."""
    cond = Pass(stream_input(case, "video"), stream_input(case, "audio"))
    late = Perturbation(((Skip.VIDEO_SELF, frozenset({last})),))
    apart = Perturbation(((Skip.AUDIO_TO_VIDEO, None), (Skip.VIDEO_TO_AUDIO, None)))
    batch = cond.video.latent.shape[0]
    return [replace(cond, perturbations=(item,) * batch) for item in (Perturbation(), late, apart)]


def bits(velocity: Velocity) -> list[bytes]:
    return [value.numpy().tobytes() for value in (velocity.video, velocity.audio)]


@torch.inference_mode()
def test_passes_that_share_blocks_have_the_bits_of_passes_alone(
    case: Case, transformer: Transformer
) -> None:
    passes = guided_passes(case, last=len(transformer.blocks) - 1)
    together = transformer.run(passes)
    alone = [transformer.run([given])[0] for given in passes]
    assert [bits(item) for item in together] == [bits(item) for item in alone]
    assert bits(together[0]) != bits(together[1]) != bits(together[2])


@torch.inference_mode()
def test_a_perturbed_pass_costs_only_the_blocks_from_its_first_perturbation(
    case: Case, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[int] = Counter()
    plain = Block.forward

    def counted(self: Block, state: object, number: int) -> None:
        calls[number] += 1
        plain(self, state, number)

    monkeypatch.setattr(Block, "forward", counted)
    last = len(transformer.blocks) - 1
    transformer.run(guided_passes(case, last))
    # Conditional and perturbed are one up to the last block; the isolated pass differs in all.
    assert calls == {number: 2 + (number == last) for number in range(last + 1)}


@torch.inference_mode()
def test_samples_of_one_batch_may_skip_differently(case: Case, transformer: Transformer) -> None:
    given = Pass(stream_input(case, "video"), stream_input(case, "audio"))
    batch = given.video.latent.shape[0]
    skip = Perturbation(((Skip.AUDIO_SELF, None),))
    mixed = replace(given, perturbations=(skip, *[Perturbation()] * (batch - 1)))
    plain = replace(given, perturbations=(Perturbation(),) * batch)
    together = transformer.run([plain, mixed])
    assert bits(together[1]) == bits(transformer.run([mixed])[0])
    assert bits(together[0]) == bits(transformer.run([plain])[0])


def levels_of(given: Pass) -> torch.Tensor:
    streams = (given.video, given.audio)
    values = [s.timesteps.values for s in streams] + [s.sigma.float() for s in streams]
    return torch.cat(values).unique()


@torch.inference_mode()
def test_tabulated_modulation_has_the_bits_of_the_layers(
    case: Case, transformer: Transformer
) -> None:
    given = Pass(stream_input(case, "video"), stream_input(case, "audio"))
    plain = transformer.run([given])[0]
    more = torch.cat([torch.linspace(0, 1, 9), levels_of(given)])  # a schedule's worth
    transformer.tabulate(more)
    for ends in (transformer.video, transformer.audio):
        for name in ("adaln", "prompt_adaln", "cross_adaln", "gate_adaln"):
            setattr(ends, name, getattr(ends, name).to("meta"))  # no weight is touched any more
    assert bits(transformer.run([given])[0]) == bits(plain)


@torch.inference_mode()
def test_a_level_that_was_not_tabulated_gives_nan_and_no_neighbour(
    case: Case, transformer: Transformer
) -> None:
    given = Pass(stream_input(case, "video"), stream_input(case, "audio"))
    transformer.tabulate(levels_of(given))
    other = Timesteps(given.video.timesteps.values * 0.999, given.video.timesteps.index)
    velocity = transformer.run([replace(given, video=replace(given.video, timesteps=other))])[0]
    assert velocity.video is not None and not velocity.video.isfinite().any()
    transformer.forget_tables()
    velocity = transformer.run([replace(given, video=replace(given.video, timesteps=other))])[0]
    assert velocity.video is not None and velocity.video.isfinite().all()


@torch.inference_mode()
def test_a_level_has_the_same_modulation_alone_and_among_others(transformer: Transformer) -> None:
    levels = torch.linspace(0, 1000, 13)
    together = transformer.video.adaln(levels, torch.float32)[0]
    alone = [transformer.video.adaln(level[None], torch.float32)[0] for level in levels]
    assert torch.equal(together, torch.cat(alone))
