"""Whole jobs under a plan: the clip of a streamed run is the clip of a plain one, byte for byte."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ltxlite import pipeline, planning
from ltxlite.cli import main
from ltxlite.memory import plan as plan_module
from ltxlite.memory.budget import Budget
from ltxlite.memory.plan import Need, Plan
from ltxlite.memory.stream import Placement, Streamer
from ltxlite.models.passes import Pass
from ltxlite.models.transformer import Transformer
from ltxlite.models.video_vae import VideoDecoder
from ltxlite.models.window import DecodeWindow
from ltxlite.networks import Networks

PROMPT = "a red circle moves left"
BUDGET = ("--vram", "4GiB")
Files = tuple[Path, Path, Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def generate(demo_files: Files, output: Path, *flags: str) -> int:
    model, upscaler, encoder = map(str, demo_files)
    files = ["--model", model, "--upscaler", upscaler, "--text-encoder", encoder]
    clip = ["--prompt", PROMPT, "--size", "128x128", "--frames", "9", "--steps", "2"]
    return main(["generate", *files, *clip, "-o", str(output), "--device", "cpu", *flags])


def clip_of(demo_files: Files, folder: Path, flags: Sequence[str] = ()) -> bytes:
    # The path is part of the job that travels inside the clip: another folder, of equal length.
    number = f"{len(list(folder.glob('run*'))):04}"
    output = folder / f"run{number}" / "clip.mp4"
    assert generate(demo_files, output, *flags) == 0
    return output.read_bytes().replace(f"run{number}".encode(), b"run")


PLACEMENTS = {
    "all streamed from RAM": Placement(slots=2, prefetch=1),
    "all from disk": Placement(slots=2, prefetch=1, pinned_bytes=0, ring=2),
    "one slot": Placement(slots=1, prefetch=0, pinned_bytes=0),
    "first resident": Placement(resident=frozenset({0}), slots=1, prefetch=2),
}


def force(placement: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every plan place blocks so: the demo's are so small that all would be resident."""

    def fit(needs: Sequence[Need], budget: Budget) -> Plan:
        plan = plan_module.fit(needs, budget)
        phases = []
        for phase in plan.phases:
            if phase.residence is not None:
                count = frozenset(range(phase.residence.count))
                chosen = replace(placement, resident=placement.resident & count)
                phase = replace(phase, residence=replace(phase.residence, placement=chosen))
            phases.append(phase)
        return replace(plan, phases=tuple(phases))

    monkeypatch.setattr(planning, "fit", fit)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_streamed_run_makes_the_bytes_of_a_plain_one(
    demo_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wanted = clip_of(demo_files, tmp_path, ["--no-cache"])
    force(PLACEMENTS[name], monkeypatch)
    assert clip_of(demo_files, tmp_path, ["--no-cache", *BUDGET]) == wanted
    assert not [t.name for t in threading.enumerate() if t.name.startswith("ltxlite")]


def test_a_planned_run_and_one_with_a_kept_context_make_the_bytes_of_a_plain_one(
    demo_files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = clip_of(demo_files, tmp_path, ["--no-cache"])
    assert clip_of(demo_files, tmp_path, BUDGET) == wanted
    assert clip_of(demo_files, tmp_path, BUDGET) == wanted
    told = capsys.readouterr().err
    assert "stage 2: peak" in told and "encoded in an earlier run" in told


def test_guided_and_two_step_samplers_run_streamed_too(
    demo_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided = ("--cfg", "3:7", "--stg", "1", "--modality", "3", "--sampler", "res_2s", "--no-cache")
    wanted = clip_of(demo_files, tmp_path, guided)
    force(PLACEMENTS["all from disk"], monkeypatch)
    assert clip_of(demo_files, tmp_path, (*guided, *BUDGET)) == wanted


@pytest.mark.parametrize("name", ["all streamed from RAM", "all from disk"])
def test_a_lora_that_one_stage_does_without_is_there_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    golden = Path(__file__).parent / "golden" / "models"
    files = (
        golden / "tiny-2.3-distilled.safetensors",
        golden / "tiny-2.3-spatial-upscaler-x2.safetensors",
        golden / "gemma3_tiny",
    )
    lora = str(golden / "tiny-distilled-lora-r4.safetensors")
    # With all blocks resident: a plain run holds the base in fp32, where beside costs less.
    wanted = clip_of(files, tmp_path, ["--no-cache", "--lora", f"{lora}:0,1", *BUDGET])
    without = clip_of(files, tmp_path, ["--no-cache", "--lora", f"{lora}:0,0", *BUDGET])
    assert wanted != without
    moved: list[int] = []
    plain = Streamer.walk

    def walk(self: Streamer) -> Iterator[nn.Module]:
        yield from plain(self)
        moved.append(self.report.moved)

    force(PLACEMENTS[name], monkeypatch)
    monkeypatch.setattr(Streamer, "walk", walk)
    found = clip_of(files, tmp_path, ["--no-cache", "--lora", f"{lora}:0,1", *BUDGET])
    assert found == wanted
    # The transformer's two steps without the factors, then three with them.
    first, second = moved[-5:-3], moved[-3:]
    assert len({*first}) == len({*second}) == 1 and first[0] < second[0]


def test_what_cannot_fit_is_refused_before_anything_loads(
    demo_files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(demo_files, tmp_path / "clip.mp4", "--vram", "1MiB") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("ltxlite: decode: ") and "make the picture smaller" in message
    assert not list(tmp_path.glob("*.mp4*"))


def test_a_run_out_of_memory_goes_on_with_a_smaller_plan_to_the_same_clip(
    demo_files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = clip_of(demo_files, tmp_path, ["--no-cache"])
    plain, calls = Transformer.run, []

    def failing(self: Transformer, passes: Sequence[Pass]) -> object:
        if passes[0].video.latent.is_meta:  # the plan counts with the same code
            return plain(self, passes)
        calls.append(len(calls))
        if len(calls) in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, passes)

    monkeypatch.setattr(Transformer, "run", failing)
    assert clip_of(demo_files, tmp_path, ["--no-cache", *BUDGET]) == wanted
    told = capsys.readouterr().err
    assert told.count("going on with a smaller plan") == 2
    # Two steps and three: five evaluations and the two that failed, so no step was done twice.
    assert len(calls) == 7


def test_a_decode_out_of_memory_begins_anew_with_a_smaller_window_and_its_very_bytes(
    demo_files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, windows = pipeline.decode_window, []

    def failing(decoder: VideoDecoder, latent: Tensor, window: DecodeWindow) -> Iterator[Tensor]:
        windows.append(window)
        for number, frames in enumerate(plain(decoder, latent, window)):
            yield frames
            if len(windows) < 3 and number == 0:  # frames of it are written already
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pipeline, "decode_window", failing)
    found = clip_of(demo_files, tmp_path, ["--no-cache", *BUDGET])
    told = capsys.readouterr().err
    assert told.count("decoding anew, with less") == 2
    assert all(window.is_whole for window in windows)
    first, second, third = (window.group_bytes for window in windows)
    # So small a picture has but one window that needs a tenth less: a frame at a time.
    assert first > second == third
    # The bits of a convolution depend on how many frames it sees, the clip on nothing else.
    monkeypatch.setattr(pipeline, "decode_window", plain)
    monkeypatch.setattr(pipeline, "window_of", lambda *_: windows[-1])
    assert clip_of(demo_files, tmp_path, ["--no-cache"]) == found
    assert len(list(tmp_path.glob("run*/*"))) == 2, "nothing else is left behind"


def test_a_sound_out_of_memory_is_decoded_again(
    demo_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = clip_of(demo_files, tmp_path, ["--no-cache"])
    plain, calls = pipeline.decode_sound, []

    def failing(networks: Networks, latent: Tensor) -> tuple[Tensor, int]:
        calls.append(networks.window)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(networks, latent)

    monkeypatch.setattr(pipeline, "decode_sound", failing)
    assert clip_of(demo_files, tmp_path, ["--no-cache"]) == wanted
    assert len(calls) == 2 and calls[0] == calls[1], "the picture's window is not the sound's fault"


def test_a_decode_that_never_fits_is_one_line_and_the_run_can_be_continued(
    demo_files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object) -> Iterator[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield  # a generator, as the real one

    monkeypatch.setattr(pipeline, "decode_window", failing)
    assert generate(demo_files, tmp_path / "clip.mp4", "--no-cache") == 1
    last = capsys.readouterr().err.strip().splitlines()
    assert "CUDA out of memory" in last[-2] and "continues at the decoding" in last[-1]
    assert [path.name for path in tmp_path.glob("clip*")] == ["clip.mp4.ltxlite-resume"]


def test_memory_that_never_suffices_ends_in_one_line(
    demo_files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = Transformer.run

    def failing(self: Transformer, passes: Sequence[Pass]) -> object:
        if passes[0].video.latent.is_meta:
            return plain(self, passes)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Transformer, "run", failing)
    monkeypatch.setattr(pipeline, "RUNGS", 2)
    assert generate(demo_files, tmp_path / "clip.mp4", "--vram", "4GiB") == 1
    assert "CUDA out of memory" in capsys.readouterr().err.strip().splitlines()[-1]


def test_plan_prints_the_phases_and_loads_nothing(
    demo_files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "LADDER", planning.LADDER[:1])  # each rung counts all anew
    monkeypatch.setattr(planning, "RUNGS", 1)
    monkeypatch.setattr(planning, "_SMALLER", planning._SMALLER[-1:])
    model, upscaler, encoder = map(str, demo_files)
    files = ["--model", model, "--upscaler", upscaler, "--text-encoder", encoder]
    assert main(["plan", *files, "--size", "256x256", "--vram", "4GiB", "--quiet"]) == 0
    text = capsys.readouterr().out
    for phase in ("encode prompt", "stage 1", "upscale for stage 2", "stage 2", "decode picture"):
        assert f"{phase}: peak" in text
    # Twice the decoder and its workspace is room for a small picture, not for the default one.
    assert main(["plan", *files, "--vram", "1.044GiB", "--quiet"]) == 1
    assert "would fit" in capsys.readouterr().err
    assert main(["plan", *files, "--quiet"]) == 1
    assert "--vram 8GiB" in capsys.readouterr().err
