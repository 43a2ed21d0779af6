"""What users really pass: damaged, wrong, mixed-up and impossible input gets one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltxlite.cli import main

GOLDEN = Path(__file__).parent / "golden" / "models"
MODEL = GOLDEN / "tiny-2.3-distilled.safetensors"
UPSCALER = GOLDEN / "tiny-2.3-spatial-upscaler-x2.safetensors"
GEMMA = GOLDEN / "gemma3_tiny"


def generate(tmp_path: Path, *more: str, model: Path = MODEL) -> list[str]:
    arguments = {
        "--model": str(model),
        "--upscaler": str(UPSCALER),
        "--text-encoder": str(GEMMA),
        "--prompt": "a train",
        "--size": "128x64",
        "--frames": "9",
        "-o": str(tmp_path / "clip.mp4"),
    }
    for flag, value in zip(more[::2], more[1::2], strict=True):
        arguments[flag] = value
    flat = [part for item in arguments.items() for part in item if part != "-"]
    return ["generate", *flat, "--quiet"]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> str:
    """Run, expect exit 1 and one message that holds all the words; returns it."""
    assert main(arguments) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("ltxlite: ")
    assert "Traceback" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    return message


def changed(tmp_path: Path, change: Callable[[dict, dict], None], source: Path = MODEL) -> Path:
    """Copy a checkpoint with its tensors and metadata changed; the name keeps its words."""
    with safe_open(source, "pt") as file:
        metadata = dict(file.metadata() or {})
    tensors = load_file(source)
    change(tensors, metadata)
    path = tmp_path / source.name
    save_file(tensors, path, metadata)
    return path


def test_a_truncated_checkpoint_is_named_with_its_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny-distilled.safetensors"
    path.write_bytes(MODEL.read_bytes()[:-1000])
    refused(capsys, generate(tmp_path, model=path), path.name, "download it again")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 46\n", "git-lfs"),
        (b"<!DOCTYPE html><html><body>Access denied</body></html>", "web page"),
        (b"", "empty"),
        (b"\xff" * 64, "safetensors"),
        (b"PK\x03\x04" + bytes(60), "zip"),
    ],
)
def test_files_that_are_no_models_are_called_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, word: str
) -> None:
    path = tmp_path / "model-distilled.safetensors"
    path.write_bytes(content)
    refused(capsys, generate(tmp_path, model=path), path.name, word)


@pytest.mark.parametrize(
    ("flag", "path"),
    [
        ("--text-encoder", MODEL),
        ("--vae", UPSCALER),
        ("--audio-vae", GOLDEN / "gemma3_tiny_single.safetensors"),
        ("--connectors", UPSCALER),
        ("--text-projection", UPSCALER),
        ("--upscaler", MODEL),
        ("--lora", UPSCALER),
    ],
)
def test_a_wrong_file_in_a_slot_is_told_by_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, path: Path
) -> None:
    refused(capsys, generate(tmp_path, flag, str(path)), path.name, "it holds")


def test_every_missing_part_is_named_with_its_repository_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def keep_transformer_only(tensors: dict, _: dict) -> None:
        for name in [n for n in tensors if not n.startswith("model.diffusion_model.")]:
            del tensors[name]

    path = changed(tmp_path, keep_transformer_only)
    arguments = generate(tmp_path, model=path)
    for flag in ("--upscaler", "--text-encoder"):
        at = arguments.index(flag)
        del arguments[at : at + 2]
    message = refused(capsys, arguments, "Kijai/LTX2.3_comfy", "google/gemma-3-12b-it")
    for flag in ("--text-projection", "--text-encoder", "--vae", "--audio-vae", "--upscaler"):
        assert flag in message


def test_a_2_0_text_projection_with_a_2_3_transformer_is_refused_and_the_reverse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    projection = tmp_path / "projection.safetensors"
    save_file(
        {"text_embedding_projection.aggregate_embed.weight": torch.zeros(64, 576)}, projection
    )
    arguments = generate(tmp_path, "--text-projection", str(projection))
    refused(capsys, arguments, "LTX-2.0", "LTX-2.3", projection.name)

    def make_2_0(tensors: dict, metadata: dict) -> None:
        config = json.loads(metadata["config"])
        config["transformer"] |= {
            "cross_attention_adaln": False,
            "caption_proj_before_connector": False,
        }
        metadata["config"] = json.dumps(config)

    older = changed(tmp_path, make_2_0)
    refused(capsys, generate(tmp_path, model=older), "LTX-2.3", "LTX-2.0")


def test_missing_and_left_over_tensors_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(tensors: dict, _: dict) -> None:
        del tensors["model.diffusion_model.transformer_blocks.2.attn1.to_k.weight"]
        tensors["model.diffusion_model.transformer_blocks.2.attn9.to_k.weight"] = torch.zeros(2)

    path = changed(tmp_path, damage)
    refused(capsys, generate(tmp_path, model=path), "missing", "blocks.2", "attn9", path.name)


def test_nan_in_a_matrix_is_found_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(tensors: dict, _: dict) -> None:
        tensors["model.diffusion_model.transformer_blocks.1.ff.net.2.weight"][3, 5] = torch.nan

    path = changed(tmp_path, poison)
    refused(capsys, generate(tmp_path, model=path), "NaN", "blocks.1.video.feed_forward.down")
    assert not (tmp_path / "clip.mp4").exists()


def test_nan_in_a_vector_is_found_on_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(tensors: dict, _: dict) -> None:
        tensors["vae.decoder.conv_in.conv.bias"][0] = torch.inf

    path = changed(tmp_path, poison)
    refused(capsys, generate(tmp_path, model=path), "conv_in.conv.bias", "NaN or infinity")


def test_sizes_and_lengths_off_the_grid_are_snapped_and_told_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = generate(tmp_path, "--size", "130x75", "--frames", "12")
    refused(capsys, [*odd, "--strict"], "130x75", "128x64", "64")
    arguments = [part for part in odd if part != "--quiet"]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert "using 128x64" in told
    assert "using 9" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--size", "giant"), ("giant", "WIDTHxHEIGHT")),
        (("--frames", "0"), ("0",)),
        (("--fps", "fast"), ("fps", "fast")),
        (("--seconds", "-3", "--frames", "-"), ()),
        (("--sigmas", "0.5,0.9,0"), ("0.5,0.9,0",)),
        (("--sampler", "magic"), ("magic", "euler")),
        (("--seed", "99999999999"), ("seed",)),
        (("--lora", "nowhere.safetensors:0.5"), ("nowhere.safetensors", "no such")),
        (("--model", "nowhere.safetensors"), ("nowhere.safetensors",)),
        (("--device", "abacus"), ("abacus",)),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: tuple[str, ...], words: tuple
) -> None:
    arguments = generate(tmp_path, *changes)
    if "--seconds" in changes:
        at = arguments.index("--frames")
        del arguments[at]
    refused(capsys, arguments, *words)


def test_an_unknown_variant_is_never_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(MODEL, path)
    refused(capsys, generate(tmp_path, model=path), "--variant dev", "--variant distilled")
    assert main([*generate(tmp_path, model=path), "--variant", "distilled"]) == 0


def test_a_dev_checkpoint_asks_for_its_distilled_lora(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny-dev.safetensors"
    shutil.copy(MODEL, path)
    refused(capsys, generate(tmp_path, model=path), "--distilled-lora", "Lightricks/LTX-2.3")


def test_an_output_that_cannot_be_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(capsys, generate(tmp_path, "-o", str(tmp_path / "file" / "clip.mp4")), "file")
    refused(capsys, generate(tmp_path, "-o", str(tmp_path / "clip.avi")), ".mp4")


def test_an_empty_prompt_runs_and_a_long_one_says_what_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [part for part in generate(tmp_path, "--prompt", "  ") if part != "--quiet"]
    assert main(arguments) == 0
    assert "prompt is empty" in capsys.readouterr().err
    arguments = generate(tmp_path, "--prompt", "rain " * 2000)
    assert main([part for part in arguments if part != "--quiet"]) == 0
    told = capsys.readouterr().err
    assert "only the first 1024 count" in told


def test_a_job_file_with_an_unknown_field_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.json"
    job.write_text('{"prompt": "x", "colour": "blue"}')
    refused(capsys, ["generate", "--job", str(job), "--quiet"], "colour", "job.json")
    job.write_text("not json")
    refused(capsys, ["generate", "--job", str(job), "--quiet"], "job.json")


def test_a_folder_with_two_transformers_is_ambiguous(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("a-dev.safetensors", "b-distilled.safetensors"):
        shutil.copy(MODEL, folder / name)
    refused(capsys, generate(tmp_path, model=folder), "a-dev", "b-distilled", "transformer")


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*generate(tmp_path, "--model", "nowhere.safetensors"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
