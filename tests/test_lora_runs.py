"""Whole jobs whose LoRA files act in some steps, or at some times, of the clip."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resume_support import LORA, MODEL, every_progress, request_of, tiny_networks, tiny_prompts
from safetensors.torch import load_file, save_file

from ltxlite.cli import main
from ltxlite.memory.budget import Budget
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.pipeline import Means, make_plan, run_stages
from ltxlite.progress import Clock, Report
from ltxlite.request import Request, Stage
from ltxlite.saved_state import conditions, encode_state, read_state
from ltxlite.stages import Progress, Prompts
from ltxlite.strength import Strength

FRAMES = 25  # four latent frames, a second at 25 fps


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file that changes blocks, ends and the modulation by noise level."""
    tensors = load_file(LORA)
    random = torch.Generator().manual_seed(1)
    weights = load_file(MODEL)
    for layer in ("adaln_single.linear", "patchify_proj", "audio_proj_out"):
        rows, columns = weights[f"model.diffusion_model.{layer}.weight"].shape
        for side, shape in (("A", (2, columns)), ("B", (rows, 2))):
            made = torch.randn(*shape, generator=random) / 8
            tensors[f"diffusion_model.{layer}.lora_{side}.weight"] = made
    path = tmp_path_factory.mktemp("lora") / "all.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return tiny_prompts(tiny_networks())


def job(folder: Path, lora: Path, strength: str) -> tuple[Request, Networks]:
    stage = Stage(sigmas="linq:3", loras=(Strength.parse(strength),))
    request = request_of(folder, stage, frames=FRAMES, fps="25")
    request = replace(request, files=replace(request.files, loras=(str(lora),)))
    return request, open_networks(request.files, "cpu", "float32")


def steps_of(folder: Path, lora: Path, strength: str, prompts: Prompts) -> list[Progress]:
    return every_progress(*job(folder, lora, strength), prompts)


def pictures(saved: list[Progress]) -> list[torch.Tensor]:
    return [step.position.carry["x"][0] for step in saved[:-1]]


def test_steps_are_as_with_or_without_the_file(
    tmp_path: Path, lora: Path, prompts: Prompts
) -> None:
    off, on, first, late = (
        pictures(steps_of(tmp_path, lora, text, prompts))
        for text in ("0", "0.9", "0.9,steps=0", "0.9,steps=2")
    )
    assert torch.equal(first[0], on[0])
    assert not torch.equal(first[1], on[1])
    assert torch.equal(late[1], off[1])
    assert not torch.equal(late[2], off[2])
    assert not torch.equal(on[0], off[0])


def test_a_window_of_the_whole_clip_is_no_window(
    tmp_path: Path, lora: Path, prompts: Prompts
) -> None:
    on, window = (
        steps_of(tmp_path, lora, text, prompts)[-1].latents for text in ("0.9", "0.9,seconds=0-")
    )
    # The terms are added one by one, not joined: fp32, amplified by three steps.
    torch.testing.assert_close(window.video, on.video, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(window.audio, on.audio, rtol=1e-4, atol=1e-4)
    half = steps_of(tmp_path, lora, "0.9,seconds=0-0.5,fade=0.2", prompts)[-1].latents
    assert float((half.video - on.video).abs().max()) > 1e-2


@pytest.mark.parametrize("strength", ["0.9,steps=1-2:0.5", "0.9,seconds=0.3-0.8,fade=0.1"])
def test_stopped_and_streamed_runs_give_the_same_clip(
    tmp_path: Path, lora: Path, prompts: Prompts, strength: str
) -> None:
    request, networks = job(tmp_path, lora, strength)
    saved = every_progress(request, networks, prompts)
    path = tmp_path / "state"
    for step in saved[:-1]:
        path.write_bytes(b"".join(encode_state(step, conditions(request, networks))))
        back = read_state(path, request, networks)
        *_, last = run_stages(request, networks, prompts, back, Clock(Report()))
        assert torch.equal(last.latents.video, saved[-1].latents.video)
        assert torch.equal(last.latents.audio, saved[-1].latents.audio)
    means = Means(Budget(vram=64 << 20, ram=1 << 30, reserve=0))
    make_plan(request, networks, means, Clock(Report()))
    streamed = every_progress(request, networks, prompts)[-1].latents
    networks.close()
    # Modulation comes from tables, made anew where a step changes what makes them.
    torch.testing.assert_close(streamed.video, saved[-1].latents.video, rtol=1e-3, atol=1e-3)


def arguments(target: Path, *more: str) -> list[str]:
    files = request_of(target, Stage()).files
    return [
        *("generate", "--model", files.model, "--upscaler", files.upscalers[0]),
        *("--text-encoder", str(files.text_encoder), "--prompt", "rain", "--size", "64x64"),
        *("--frames", "9", "--stages", "1", "--steps", "3", "-o", str(target / "clip.mp4")),
        *("--quiet", *more),
    ]


def test_strengths_travel_with_their_job(tmp_path: Path, lora: Path) -> None:
    saved = tmp_path / "job.json"
    text = f"{lora}:video=0.8,steps=0-1,segments=2:0.5,fade=0.1"
    more = ("--segments", "a | b", "--save-job", str(saved), "--cfg", "3x2,1:2")
    assert main(arguments(tmp_path, "--lora", text, *more)) == 0
    request = Request.from_json(saved.read_text(), "job")
    assert request.stages[0].loras == (Strength.parse(text.split(":", 1)[1]),)
    assert request.stages[0].video.cfg == (3.0, 3.0, 1.0)
    assert request.stages[0].audio.cfg == 2.0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--lora", "{}:steps=3-5"), "steps 3-5 of stages with 3"),
        (("--lora", "{}:seconds=7-"), "from 7 s on: the clip ends at 0.375 s"),
        (("--lora", "{}:segments=1"), "the prompt has none; see --segments"),
        (("--lora", "{}:seconds=a"), "no range of seconds"),
        (("--cfg", "3xa"), "--cfg '3xa'"),
    ],
)
def test_wrong_strengths_are_refused_in_one_line(
    more: tuple[str, str],
    told: str,
    lora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(tmp_path, more[0], more[1].format(lora))) == 1
    error = capsys.readouterr().err.strip()
    assert told in error
    assert len(error.splitlines()) == 1


def test_what_changes_over_time_cannot_be_baked(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "baked.gguf"
    for text in ("steps=0-3", "seconds=0-1"):
        given = ("convert", str(MODEL), str(target), "--type", "Q8_0", "--lora", f"{lora}:{text}")
        assert main([*given]) == 1
        assert "cannot be baked" in capsys.readouterr().err
