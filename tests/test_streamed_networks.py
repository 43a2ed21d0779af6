"""Networks whose blocks are streamed give the bits of networks that are loaded whole."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_networks import stream_input
from golden_support import Case, read_manifest
from torch import Tensor

from ltxlite.checkpoint.assemble import nonfinite_parameters
from ltxlite.encode import encode_prompts
from ltxlite.memory import place
from ltxlite.memory.machine import CpuMachine, Faults
from ltxlite.memory.place import Memory
from ltxlite.memory.stream import Placement
from ltxlite.models.passes import Pass
from ltxlite.models.transformer import Transformer
from ltxlite.networks import ANATOMY, Networks
from ltxlite.opening import open_networks
from ltxlite.request import Files

GOLDEN = Path(__file__).parent / "golden"
PLACEMENTS = {
    "all streamed from RAM": Placement(slots=2, prefetch=1),
    "all from disk": Placement(slots=2, prefetch=1, pinned_bytes=0, ring=2),
    "no prefetch": Placement(slots=1, prefetch=0, pinned_bytes=0),
    "first resident": Placement(resident=frozenset({0}), slots=1, prefetch=2),
    "all resident": Placement(resident=frozenset(range(64)), slots=0),
}


def case(name: str) -> Case:
    entry = next(item for item in read_manifest(GOLDEN) if item["name"] == name)
    return Case.load(GOLDEN, entry)


def memory(placement: Placement, counts: dict[str, int]) -> Memory:
    """A poisoned CPU machine: a block that is used too early, or too late, holds NaN."""
    placements = {
        component: replace(placement, resident=placement.resident & frozenset(range(count)))
        for component, count in counts.items()
    }
    return Memory(CpuMachine(Faults(poison=True)), placements)


def streamed(shared: Networks, name: str) -> Networks:
    counts = {"transformer": shared.transformer_config().layers}
    given = memory(PLACEMENTS[name], counts)
    return Networks(shared.files, shared.device, shared.dtype, memory=given)


def velocities(transformer: Transformer, given: Pass) -> list[bytes]:
    velocity = transformer.run([given, given])[1]
    return [value.numpy().tobytes() for value in (velocity.video, velocity.audio)]


@pytest.fixture(scope="module")
def dit() -> Case:
    return case("dit_basic")


@pytest.fixture(scope="module")
def plain(dit: Case) -> list[bytes]:
    with torch.inference_mode():
        given = Pass(stream_input(dit, "video"), stream_input(dit, "audio"))
        return velocities(dit.networks().transformer(), given)


@pytest.mark.parametrize("name", PLACEMENTS)
@torch.inference_mode()
def test_a_streamed_transformer_has_the_bits_of_a_resident_one(
    dit: Case, plain: list[bytes], name: str
) -> None:
    transformer = streamed(dit.networks(), name).transformer()
    given = Pass(stream_input(dit, "video"), stream_input(dit, "audio"))
    for _ in range(3):  # the walk goes on across evaluations
        assert velocities(transformer, given) == plain
    place.close(transformer)


def demo_networks(demo_files: tuple[Path, Path, Path]) -> Networks:
    model, upscaler, encoder = (str(path) for path in demo_files)
    return open_networks(Files(model, encoder, upscalers=(upscaler,)), "cpu", "float32")


def contexts(networks: Networks) -> list[Tensor]:
    texts = ["a red circle moves left", "", "a train crosses a bridge, whistle blowing"]
    found = encode_prompts(networks, texts, lambda _: None)
    return [tensor for item in found for tensor in (item.video, item.audio)]


@pytest.mark.parametrize("name", PLACEMENTS)
@torch.inference_mode()
def test_streamed_text_networks_have_the_bits_of_resident_ones(
    demo_files: tuple[Path, Path, Path], name: str
) -> None:
    wanted = contexts(demo_networks(demo_files))
    networks = demo_networks(demo_files)
    counts = {
        "text_encoder": networks.gemma_config().layers,
        "video_connector": networks.connector_config(sound=False).layers,
        "audio_connector": networks.connector_config(sound=True).layers,
        "text_projection": 1,
    }
    networks.memory = memory(PLACEMENTS[name], counts)
    assert all(torch.equal(a, b) for a, b in zip(contexts(networks), wanted, strict=True))


@torch.inference_mode()
def test_what_stays_on_the_host_is_never_moved_and_blocks_never_stay(dit: Case) -> None:
    transformer = streamed(dit.networks(), "all from disk").transformer()
    levels = torch.tensor([0.0, 0.5, 1.0])
    transformer.tabulate(levels)
    assert not any(parameter.is_meta for parameter in transformer.video.adaln.parameters()), (
        "AdaLNs are on the host and have values"
    )
    for block in torch.nn.ModuleList.__iter__(transformer.blocks):
        assert all(value.is_meta for value in block.parameters())
    place.close(transformer)


@torch.inference_mode()
def test_dropping_a_network_stops_its_threads(dit: Case) -> None:
    before = threading.active_count()
    networks = streamed(dit.networks(), "all from disk")
    transformer = networks.transformer()
    given = Pass(stream_input(dit, "video"), stream_input(dit, "audio"))
    transformer.run([given])
    del transformer
    networks.memory.machine.close()
    assert threading.active_count() <= before


def test_every_anatomy_names_parts_that_exist(demo_files: tuple[Path, Path, Path]) -> None:
    networks = demo_networks(demo_files)
    builders = {
        "transformer": networks.transformer,
        "text_encoder": networks.gemma,
        "video_connector": networks.video_connector,
        "audio_connector": networks.audio_connector,
    }
    assert builders.keys() == ANATOMY.keys()
    for component, build in builders.items():
        network = build()
        for part in (*ANATOMY[component].streamed, *ANATOMY[component].host):
            network.get_submodule(part)


@torch.inference_mode()
def test_damaged_weights_are_named_wherever_they_are(dit: Case) -> None:
    plain = dit.networks().transformer()
    assert nonfinite_parameters(plain) == []

    def damage(network: Transformer) -> None:
        norm = network.blocks[1].video.self_attention.q_norm
        norm.weight = torch.nn.Parameter(norm.weight * torch.nan, requires_grad=False)

    networks = streamed(dit.networks(), "all from disk")
    transformer = networks.transformer(damage)
    assert nonfinite_parameters(transformer) == ["blocks.1.video.self_attention.q_norm.weight"]
    place.close(transformer)
