"""Sound without a picture: the network's own half, what is read, planned, written and refused."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_networks import stream_input
from golden_support import Case, read_manifest
from resume_support import LORA, every_progress, request_of, tiny_networks, tiny_prompts

from benchmarks.vram_models import components
from ltxlite.account import Levers, job_of
from ltxlite.account.job import StageJob
from ltxlite.account.phase import Component
from ltxlite.account.stage import stage_phases
from ltxlite.checkpoint.files import ModelFiles
from ltxlite.cli import main
from ltxlite.conditions import Conditions, Guide, Image, Nag, Reference, Sound, Source
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.geometry import ClipShape
from ltxlite.media.audio import read_audio
from ltxlite.memory.blank import Weights
from ltxlite.memory.budget import Budget
from ltxlite.memory.machine import CpuMachine, Faults
from ltxlite.memory.place import Memory, StreamedList
from ltxlite.memory.stream import Placement
from ltxlite.models.passes import Pass, Perturbation, Skip
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.pipeline import attach_loras, check, run_stages
from ltxlite.planning import plan_job
from ltxlite.presets import Model, stages_for, without_picture
from ltxlite.progress import Clock, Report
from ltxlite.request import Files, Output, Request, Stage, Tiles
from ltxlite.sampling.settings import Guidance, Statistics
from ltxlite.saved_state import conditions, encode_state, read_state
from ltxlite.stage_shapes import stage_shape
from ltxlite.stages import token_sizes

GOLDEN = Path(__file__).parent / "golden"
DemoFiles = tuple[Path, Path, Path]
GUIDED = Guidance(cfg=3.0, stg=1.0, rescale=0.7, stg_blocks=(1,))


def case(name: str) -> Case:
    entry = next(item for item in read_manifest(GOLDEN) if item["name"] == name)
    return Case.load(GOLDEN, entry)


def alone(networks: Networks, memory: Memory | None = None) -> Networks:
    """Return the same files opened for sound alone."""
    found = Networks(networks.files, networks.device, networks.dtype, memory=memory)
    found.sound_alone = True
    return found


def sound_request(folder: Path, *stages: Stage, **changes: Any) -> Request:
    request = request_of(folder, *(stages or (Stage(sigmas="linq:3"),)), fps="25", frames=30)
    output = Output(str(folder / "sound.wav"))
    return replace(request, picture=False, output=output, **changes)


def test_sound_alone_equals_the_reference_and_the_isolated_pass_of_the_whole_network() -> None:
    single = case("dit_single_modality")
    video, audio = stream_input(single, "video"), stream_input(single, "audio")
    whole = single.networks().transformer()
    half = alone(single.networks()).transformer()
    found = half(Pass(None, audio)).audio
    isolated = Perturbation(((Skip.AUDIO_TO_VIDEO, None), (Skip.VIDEO_TO_AUDIO, None)))
    batch = audio.latent.shape[0]
    assert torch.equal(found, whole(Pass(video, audio, (isolated,) * batch)).audio)
    assert torch.equal(found, whole(Pass(None, audio)).audio)
    wanted = single.tensors["audio_alone.velocity"]
    # The manifest: a port with the same order of operations agrees to about 5e-7.
    assert (found - wanted).abs().max() <= 5e-6 * wanted.abs().max()


def test_closed_gates_between_the_streams_give_sound_alone() -> None:
    single = case("dit_single_modality")
    video, audio = stream_input(single, "video"), stream_input(single, "audio")
    whole = single.networks().transformer()
    closed = [block.audio.cross_table for block in whole.blocks]
    closed += [whole.audio.gate_adaln.linear.weight, whole.audio.gate_adaln.linear.bias]
    for parameter in closed:  # the first four rows of a table are not the gate's
        parameter.data = parameter.data.clone()  # what was loaded is the file's map
        parameter.data[4 if parameter.shape[0] == 5 else slice(None)] = 0
    half = alone(single.networks()).transformer()
    # An update of exact zeros changes no bit.
    assert torch.equal(half(Pass(None, audio)).audio, whole(Pass(video, audio)).audio)


def test_only_the_sounds_own_tensors_are_there_and_read() -> None:
    networks = alone(tiny_networks())
    network = networks.transformer()
    names = set(network.state_dict())
    assert all(name.startswith("audio.") or ".audio." in name for name in names)
    crossing = ("cross_table", "cross_adaln", "gate_adaln", "audio_to_video", "video_to_audio")
    assert not [name for name in names if any(part in name for part in crossing)]
    (loaded,) = networks.loaded
    stored = networks.need("transformer").named("transformer")
    marks = ("audio_attn1", "audio_attn2", "audio_ff", "audio_patchify", "audio_proj_out")
    marks += ("audio_adaln_single", "audio_prompt", "audio_scale_shift_table")
    own = {name for name in stored if any(mark in name for mark in marks)}
    assert set(loaded.report.ignored) == set(stored) - own  # features.md G4, the official list
    assert sum(loaded.report.nbytes.values()) == sum(stored[name].nbytes for name in own)


def test_streamed_sound_has_the_bits_of_resident_sound_and_moves_its_half_alone() -> None:
    single = case("dit_single_modality")
    audio = stream_input(single, "audio")
    memory = Memory(
        CpuMachine(Faults(poison=True)),
        {"transformer": Placement(slots=1, prefetch=0, pinned_bytes=0)},
    )
    streamed = alone(single.networks(), memory).transformer()
    resident = alone(single.networks()).transformer()
    assert torch.equal(streamed(Pass(None, audio)).audio, resident(Pass(None, audio)).audio)
    assert isinstance(streamed.blocks, StreamedList)
    whole = Networks(single.networks().files, torch.device("cpu"), torch.float32, memory=memory)
    moved = streamed.blocks.streamer.report.read
    blocks = whole.transformer().blocks
    assert isinstance(blocks, StreamedList)
    assert 0 < moved < blocks.streamer.report.read / 2


@pytest.mark.parametrize("sampler", ["euler", "res_2s", "euler_gradient"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, sampler: str) -> None:
    audio = replace(GUIDED, skip_step=1)
    request = sound_request(tmp_path, Stage(sigmas="linq:3", sampler=sampler, audio=audio))
    networks = alone(tiny_networks())
    prompts, path = tiny_prompts(tiny_networks()), tmp_path / "state"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a picture without tokens has no deviation
        saved = every_progress(request, networks, prompts)
    assert saved[-1].latents.video.shape[2:] == (0, 0, 0)
    assert saved[-1].latents.audio.shape[2] == 30
    for step in saved[:-1]:
        path.write_bytes(b"".join(encode_state(step, conditions(request, networks))))
        back = read_state(path, request, networks)
        *_, last = run_stages(request, networks, prompts, back, Clock(Report()))
        assert torch.equal(last.latents.audio, saved[-1].latents.audio)


def test_the_defaults_are_the_official_ones() -> None:
    (dev,) = map(without_picture, stages_for(Model("dev"), count=1))
    assert (dev.sigmas, dev.sampler, dev.video) == ("ltx:30", "euler", Guidance())
    assert dev.audio == Guidance(cfg=7.0, stg=1.0, rescale=0.7, modality=1.0, stg_blocks=(28,))
    (distilled,) = map(without_picture, stages_for(Model("distilled"), count=1))
    assert (distilled.sigmas, distilled.audio) == ("distilled", Guidance())


def test_a_plan_for_sound_alone_is_smaller_and_has_no_picture(tmp_path: Path) -> None:
    networks = tiny_networks()
    request = sound_request(tmp_path, Stage(sigmas="linq:3", audio=GUIDED))
    budget = Budget(vram=1 << 30, ram=1 << 30, reserve=0)
    check(request, networks)
    assert networks.sound_alone
    plan = plan_job(networks, request, budget)
    text = "\n".join(plan.lines())
    assert "picture" not in text and "frames" not in text
    assert plan.lines()[-1].endswith("tokens at a time")
    clip = request_of(tmp_path, Stage(sigmas="linq:3"), frames=33)
    check(clip, networks)
    assert not networks.sound_alone
    of_sound, of_clip = (
        next(item.need for item in each.plan.phases if item.need.phase == "stage 1")
        for each in (plan, plan_job(networks, clip, budget))
    )
    assert sum(of_sound.units) < sum(of_clip.units) / 2
    assert of_sound.fixed < of_clip.fixed and of_sound.activations < of_clip.activations


def test_a_full_size_block_of_sound_is_a_sixth_of_a_whole_one() -> None:
    given = components("bf16")
    config = replace(given["transformer"].config, sound_alone=True)
    half = Component(config, Weights(given["transformer"].weights.formats))
    shape = ClipShape(0, 0, 0, 250, 25.0)
    stage = StageJob(shape, audio=replace(GUIDED, cfg=7.0))
    found = stage_phases({"transformer": half}, 1, stage, Levers())[1]
    whole = stage_phases(given, 1, StageJob(ClipShape(16, 16, 24, 126, 24.0)), Levers())[1]
    assert len(found.units) == 48
    # Two attentions of 4 matrices of 2048 x 2048, feed-forward of 2 of 2048 x 8192, in bf16; 387 M
    # parameters has a whole block (model.md 1.3). Gates, biases, tables are a third of a percent.
    own = 2 * (2 * 4 * 2048**2 + 2 * 2048 * 8192)
    assert own < found.units[0] < 1.004 * own
    assert found.units[0] < whole.units[0] / 5.7
    # 250 tokens of 2048 channels; contexts of 1024 rows lead.
    assert found.activation_bytes < 64 << 20 < whole.activation_bytes


def test_sizes_of_a_job_without_a_picture(tmp_path: Path) -> None:
    request, networks = sound_request(tmp_path), tiny_networks()
    shape = stage_shape(request, request.stages[0], networks)
    assert shape == ClipShape(0, 0, 0, 30, 25.0)  # 30 / 25 s, 25 latents a second
    assert [size[1] for size in token_sizes(networks, shape)] == [0, 30]
    (stage,) = job_of(request, networks).stages
    assert not stage.has_picture and stage.tokens == 0


def arguments(demo: DemoFiles, *words: str | Path) -> list[str]:
    return [
        *("t2a", "rain on a roof", "--model", str(demo[0]), "--text-encoder", str(demo[2])),
        *("--sigmas", "1,0.4,0", *map(str, words)),
    ]


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".m4a", ".mp3"])
def test_a_prompt_becomes_a_sound_file_of_the_length_that_was_asked(
    demo_files: DemoFiles, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / f"sound{suffix}"
    assert main(arguments(demo_files, "--seconds", "1.24", "--out", target, "--json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["frames"] == 31
    waveform, rate = read_audio(target)
    # 31 latents of 40 ms; AAC comes in packets of 1024 samples.
    assert abs(waveform.shape[1] - 1.24 * rate) <= (1024 if suffix == ".m4a" else 0)
    assert waveform.shape[0] == 2 and waveform.abs().max() > 0
    if suffix == ".flac":
        again = tmp_path / "again.flac"
        assert main(["generate", "--job", str(target), "-o", str(again), "--quiet"]) == 0
        assert torch.equal(read_audio(again)[0], waveform)


def test_sound_is_made_without_a_video_vae(demo_files: DemoFiles) -> None:
    networks = open_networks(Files(str(demo_files[0]), str(demo_files[2])), "cpu", "float32")
    models = [
        replace(m, components=tuple(n for n in m.components if not n.startswith("video_")))
        for m in networks.files.models
    ]
    kept = [
        replace(m, components=(*m.components, "video_connector"))
        if "transformer" in m.components
        else m
        for m in models
    ]
    bare = Networks(ModelFiles(kept), networks.device, networks.dtype)
    clip = request_of(Path(), Stage(sigmas="linq:3"))
    with pytest.raises(CheckpointError, match="video"):
        check(clip, bare)
    check(sound_request(Path()), bare)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--stages", "2"), "without --stages"),
        (("--upscaler", "x.safetensors"), "without --upscaler"),
        (("--size", "720p"), "without --size"),
        (("--modality", "3"), "without --modality"),
        (("--frames", "9"), "without --frames"),
        (("--fps", "30"), "without --fps"),
        (("--sound", "keep"), "without --sound"),
        (("--image", "x.png"), "without --image"),
        (("--trim-head", "2"), "without --trim-head"),
        (("--nag", "cartoon"), r"without --nag \(--nag-audio"),
        (("--out", "x.mp4"), "written as .wav"),
        (("--seconds", "0"), "more than 0"),
        (("--job", "x.json"), "ltxlite generate --job"),
        (("--prompt", "again"), "given twice"),
    ],
)
def test_flags_that_are_about_pictures_are_refused_in_one_line(
    demo_files: DemoFiles,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    assert main(arguments(demo_files, *words, "--quiet")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(told, line), line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stages": (Stage(), Stage())}, "further stages"),
        ({"stages": (Stage(upscaler="x2"),)}, "an upscaler"),
        ({"stages": (Stage(video=Guidance(cfg=2.0)),)}, "guidance of the picture"),
        ({"stages": (Stage(audio=Guidance(modality=3.0)),)}, "compares with the picture"),
        ({"stages": (Stage(real_tokens=True),)}, "picture tokens"),
        ({"stages": (Stage(statistics=Statistics(statnorm=0.5)),)}, "statistics"),
        ({"conditions": Conditions(guides=(Guide("a"),))}, "--guide"),
        ({"conditions": Conditions(images=(Image("a"),))}, "--image"),
        ({"conditions": Conditions(references=(Reference("a"),))}, "--reference"),
        ({"conditions": Conditions(source=Source("a"))}, "source clip"),
        ({"conditions": Conditions(nag=Nag(video="x"))}, "--nag "),
        ({"conditions": Conditions(sound=Sound("a"))}, "--audio-denoise"),
        ({"conditions": Conditions(sound=Sound("a", denoise=0.5))}, "as output"),
        ({"encode_tiles": Tiles()}, "tiles"),
    ],
)
def test_jobs_that_contradict_themselves_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        replace(sound_request(Path()), **changes)
    assert "\n" not in str(caught.value)


def test_a_lora_applies_as_far_as_it_is_about_sound(tmp_path: Path) -> None:
    networks = alone(tiny_networks())
    files = replace(request_of(tmp_path, Stage()).files, loras=(str(LORA),))
    request = sound_request(tmp_path, files=files)
    notes: list[str] = []

    class Notes(Report):
        def note(self, text: str) -> None:
            notes.append(text)

    attach_loras(request, networks, networks.transformer(), Clock(Notes()))
    assert any("modules are those of the sound" in line for line in notes)
    assert not any("warning" in line for line in notes)
