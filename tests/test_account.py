"""The account of memory: against the code really run, the specification's sizes, and itself."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import release_files as made
import torch

from benchmarks.vram_models import components, transformer_config
from ltxlite.account import Component, Levers, Phase, StageJob, account
from ltxlite.account import phase as phase_module
from ltxlite.account.inputs import _weights
from ltxlite.account.media import image_phase, picture_phase, sound_phases, upscale_phase
from ltxlite.account.phase import CARD, META, blank, metered
from ltxlite.account.stage import make_denoiser, move_denoiser, sample_steps, stage_phases
from ltxlite.account.text import text_phases
from ltxlite.checkpoint.files import ModelFiles
from ltxlite.geometry import ClipShape
from ltxlite.memory.blank import Weights
from ltxlite.memory.meter import ActivationMeter
from ltxlite.models.rolling import decode_frames
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import StreamConfig, TransformerConfig
from ltxlite.models.video_vae import VideoDecoder
from ltxlite.networks import Networks
from ltxlite.presets import Model, stages_for
from ltxlite.request import Files, Output, Request
from ltxlite.sampling.settings import Guidance
from ltxlite_quant.formats import FORMATS

MIB = 1 << 20
SMALL = TransformerConfig(
    StreamConfig(12, 12, 4, 32, 128, (20, 64, 64)), StreamConfig(10, 10, 4, 16, 64, (20,)), 3, 64
)
SHAPE = ClipShape(3, 5, 7, 11, 24.0)
GUIDED = Guidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(28,))
FP32 = Levers(torch.float32, chunk=64)
JOBS = {
    "plain": StageJob(SHAPE),
    "guided": StageJob(SHAPE, GUIDED, GUIDED),
    "image": StageJob(SHAPE, images=1),
    "guides": StageJob(SHAPE, appended=((1, 5, 7), (2, 2, 3)), weighted=True, strengths=2),
    "res_2s": StageJob(SHAPE, sampler="res_2s"),
}


def activations(stage: StageJob, levers: Levers = FP32, config: TransformerConfig = SMALL) -> int:
    return stage_phases({"transformer": Component(config)}, 1, stage, levers)[1].activation_bytes


@pytest.mark.parametrize("name", JOBS)
def test_a_stage_is_accounted_as_it_runs_on_a_cpu(name: str) -> None:
    torch.manual_seed(0)
    stage, network = JOBS[name], Transformer(replace(SMALL, layers=1)).requires_grad_(False)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1)
    network.chunk = FP32.chunk
    with torch.inference_mode():
        denoiser = make_denoiser(network, stage, FP32.dtype)
        levels = torch.rand(stage.levels)
        with ActivationMeter("cpu") as tables:
            network.tabulate(levels)
        with ActivationMeter("cpu", CARD) as meter:
            sample_steps(denoiser, stage)
        with metered(FP32) as given:
            move_denoiser(denoiser)
    inputs = given.current_bytes + tables.current_bytes  # there before the CPU samples
    # Norms of a CPU hold a number a row elsewhere in time than those of a card.
    assert activations(stage) == pytest.approx(inputs + meter.peak_bytes, rel=0.01)


def test_more_layers_do_not_change_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    job = JOBS["guided"]  # with a pass that parts from the others in a block
    one = activations(job)

    def every_layer(component: Component, layers: str) -> tuple[list[int], Weights]:
        return list(range(component.config.layers)), component.weights

    monkeypatch.setattr(phase_module, "_one_of_each", every_layer)
    two, four = (activations(job, config=replace(SMALL, layers=n)) for n in (2, 4))
    assert one == two == four


def test_the_account_is_deterministic_and_tracing_changes_nothing() -> None:
    first, second = (activations(JOBS["guided"]) for _ in range(2))
    assert first == second == activations(JOBS["guided"], replace(FP32, trace=True))


def test_what_a_job_adds_costs_memory_and_smaller_chunks_save_it() -> None:
    plain, guided = activations(JOBS["plain"]), activations(JOBS["guided"])
    # Three more residual streams of both widths, and the negative prompt.
    hidden = 4 * (105 * 128 + 11 * 64)
    assert guided - plain >= 3 * hidden + 4 * 1024 * (128 + 64)
    assert activations(JOBS["plain"], replace(FP32, chunk=16)) < plain


@pytest.fixture(scope="module")
def full_hd() -> tuple[Phase, Phase]:
    shape = ClipShape(16, 34, 60, 126, 24.0)
    found = stage_phases(components("Q4_K_M"), 2, StageJob(shape, upscaler="x2"), Levers())
    return found[0], found[1]


def test_a_full_size_stage_holds_three_hidden_states_and_its_chunks(
    full_hd: tuple[Phase, Phase],
) -> None:
    levels, stage = full_hd
    hidden = 32640 * 4096 * 2
    # model.md 8: the residual stream, keys and values, and 64 to 128 MiB of chunk buffers; beside
    # them the latents in fp32, contexts, and a piece of a decoded weight.
    assert 3 * hidden < stage.activation_bytes < 3 * hidden + 208 * MIB
    assert [item.nbytes for item in stage.largest[:3]] == [hidden] * 3
    # 168 865 792 parameters of the largest AdaLN (model.md 1.3) are there while it is tabulated.
    assert levels.fixed_bytes - stage.fixed_bytes == 168_865_792 * 2
    assert levels.units == () and len(stage.units) == 48
    assert stage.walks == 8


def test_weights_are_counted_as_files_store_them() -> None:
    # model.md 1.4: elements of a block's linears, of its gates among them, tables, vectors.
    linears, gates, tables, vectors = 386_465_792, 589_824, 98_304, 131_264
    rest = 4 * tables + 2 * vectors
    wanted = {
        "bf16": 2 * linears + rest,
        "fp8": linears + 34 * 4 + rest,  # a scale for each of 34 linears
        "Q8_0": (linears - gates) * 34 // 32 + 2 * gates + rest,
        "Q6_K": (linears - gates) * 210 // 256 + 2 * gates + rest,
    }
    for weights, size in wanted.items():
        found = blank(
            "transformer", components(weights)["transformer"], Transformer, torch.bfloat16
        )
        assert set(found.units) == {size} and len(found.units) == 48
        # Ends: latents in and out, two rows of fp32 each (model.md 1.3); AdaLNs are on the host.
        ends = 528_384 + 264_192 + 524_416 + 262_272
        assert found.fixed_bytes == 2 * ends + 4 * (8_192 + 4_096)


def test_a_lora_lies_in_the_blocks() -> None:
    plain, lora = (
        blank("transformer", components("bf16", rank)["transformer"], Transformer, torch.bfloat16)
        for rank in (0, 384)
    )
    # model.md 6: 200 704 r parameters in 28 linears; six gates of 32 rows on 4096 or 2048 columns.
    gates = 6 * 32 + 3 * 4096 + 3 * 2048
    assert lora.units[0] - plain.units[0] == 2 * 384 * (200_704 + gates)


def test_layers_of_two_kinds_are_both_run() -> None:
    formats = {
        f"blocks.{number}.video.feed_forward.up.weight": FORMATS["Q8_0"] for number in (0, 2)
    }
    component = Component(SMALL, Weights(formats))
    found = blank("transformer", component, Transformer, torch.float32)
    assert len(found.network.blocks) == 2
    assert found.units[0] == found.units[2] < found.units[1]


def test_the_text_path_holds_the_rows_of_the_projection() -> None:
    bounds = dict.fromkeys(("text_encoder", "text_projection", "video_connector"), 0)
    encode, project, video, audio = text_phases(components("Q4_K_M"), (255, 63), Levers())
    rows = (255 + 63) * 49 * 3840 * 2 * 2  # bf16, for picture and for sound
    assert rows < encode.activation_bytes < rows + 255 * (15360 * 3 * 2 + 3840 * 16) + 64 * MIB
    assert rows < project.activation_bytes < encode.activation_bytes
    assert len(encode.units) == 48 and len(video.units) == len(audio.units) == 8
    # model.md 1.3: both projections, in pieces.
    assert sum(project.units) == 2 * (770_707_456 + 385_353_728)
    assert {encode.component, project.component, video.component} == bounds.keys()


def test_a_decode_stopped_early_has_its_peak_already() -> None:
    size = (3, 5)
    given, shape = components("bf16"), ClipShape(8, *size, 11, 24.0)
    network = blank("video_decoder", given["video_decoder"], VideoDecoder, torch.bfloat16).network
    levers = Levers(group_bytes=1 << 18)  # several groups at this size too
    with torch.inference_mode(), metered(levers) as meter:
        latent = torch.empty(1, 128, 8, *size, device=META)
        for _ in decode_frames(network, latent, levers.group_bytes):
            pass
    found = picture_phase(given, shape, levers)
    assert found.activation_bytes == pytest.approx(meter.peak_bytes, rel=0.02)


def test_every_other_phase_runs_at_full_size() -> None:
    given, shape = components("Q4_K_M"), ClipShape(16, 8, 12, 126, 24.0)
    upscale = upscale_phase(given, 2, shape, "x2", Levers())
    image = image_phase(given, 1, StageJob(shape, images=1), Levers())
    sound, vocoder = sound_phases(given, shape, Levers())
    tensor = 1024 * 16 * 16 * 24 * 2  # the upscaled clip inside the upscaler
    assert 2 * tensor < upscale.activation_bytes < 6 * tensor
    assert 0 < image.activation_bytes < 100 * 256 * 384  # vae-audio-media.md 2.6: 86 bytes a pixel
    assert sound.fixed_bytes < vocoder.fixed_bytes and not vocoder.units
    assert vocoder.library_bytes > 0


def test_a_phase_adds_up() -> None:
    phase = Phase("stage 1", "transformer", 5, (10, 30, 20), 100, 7, walks=8)
    assert phase.peak_bytes() == 5 + 2 * 30 + 100 + 7
    assert phase.peak_bytes(3) == 5 + 60 + 100 + 7  # three slots hold all blocks there are
    need = phase.need()
    assert (need.base, need.units, need.walks) == (112, (10, 30, 20), 8)
    assert replace(phase, units=()).peak_bytes() == 112


def networks(*paths: Path, dtype: torch.dtype = torch.bfloat16) -> Networks:
    return Networks(ModelFiles.open(paths), torch.device("cpu"), dtype)


def request(width: int, height: int, frames: int) -> Request:
    stages = stages_for(Model("distilled"))
    output, files = Output("clip.mp4"), Files("model")
    return Request("a cat", files, output, stages, width, height, frames)


def test_a_request_on_real_files_is_accounted_from_their_headers(
    demo_files: tuple[Path, Path, Path],
) -> None:
    found = account(networks(*demo_files, dtype=torch.float32), request(128, 64, 17))
    assert [item.name for item in found] == [
        "encode prompt",
        "project prompt",
        "video connector",
        "audio connector",
        "levels of stage 1",
        "stage 1",
        "upscale for stage 2",
        "levels of stage 2",
        "stage 2",
        "decode sound",
        "vocoder",
        "decode picture",
    ]
    assert all(item.activation_bytes > 0 for item in found)
    assert [item.walks for item in found if re.match("stage", item.name)] == [8, 3]


def test_formats_come_from_headers(tmp_path: Path) -> None:
    types = made.gguf_typed(made.dit("2.3"), "Q5_K", "BF16", None)
    path = made.write_gguf(tmp_path / "model.gguf", types)
    found = networks(path)
    config = found.transformer_config()
    assert config.layers == transformer_config().layers
    stored = found.files.find("transformer")
    assert stored is not None
    weights = _weights(found, "transformer", stored.named("transformer"))
    quantized = [name for name, item in weights.formats.items() if item.name == "Q5_K"]
    assert len(quantized) == 48 * 34
    units = blank("transformer", Component(config, weights), Transformer, torch.bfloat16).units
    linears, tables, vectors = 386_465_792, 98_304, 131_264
    assert set(units) == {linears * 176 // 256 + 4 * tables + 2 * vectors}
