"""The wrong uses that the issue lists, at the command line: one line each, nothing written."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clip_files import steady, tone, write_clip, write_sound
from PIL import Image
from safetensors.torch import save_file

from ltxlite.cli import main

DemoFiles = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    Image.new("RGB", (64, 64), (200, 30, 90)).save(folder / "a.png")
    Image.new("L", (48, 64), 255).save(folder / "mask.png")
    (folder / "text.jpg").write_bytes(b"\xff\xd8\xffnot a photograph")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    write_clip(folder / "long.mp4", steady(25, Fraction(24)), (64, 64))
    write_clip(folder / "clip.mp4", steady(9, Fraction(30000, 1001)), (64, 64))
    write_sound(folder / "short.wav", "pcm_s16le", (tone(1, 0.2, 44_100), 44_100), "mono")
    names = ("other_model.blocks.0.q.lora_A.weight", "other_model.blocks.0.q.lora_B.weight")
    pair = (torch.zeros(2, 8), torch.zeros(8, 2))
    save_file(dict(zip(names, pair, strict=True)), folder / "alien.safetensors")
    return folder


CASES = {
    "an image beyond the clip": (("--image", "a.png@17"), "0 to 16"),
    "an image before the clip": (("--image", "a.png@-18"), "outside the clip"),
    "an image at a second beyond it": (("--image", "a.png@1s"), "outside the clip"),
    "a guide longer than the clip": (("--guide", "long.mp4"), "at most 17 fit"),
    "a guide longer than what is left": (("--guide", "long.mp4@16"), "at most 1 fit"),
    "a mask of another size": (
        ("--init-video", "clip.mp4", "--mask", "mask.png"),
        "is 48x64, the clip 64x64",
    ),
    "an attention mask of another size": (
        ("--reference", "clip.mp4", "--reference-mask", "mask.png"),
        "is 48x64, its reference 64x64",
    ),
    "a LoRA without matches": (("--lora", "alien.safetensors"), "alien.safetensors"),
    "an image that is no image": (("--image", "text.jpg"), "text.jpg"),
    "an image that is cut off": (("--image", "cut.png"), "damaged or cut off"),
    "an image that is a sound": (("--image", "short.wav"), "no picture that can be read"),
    "a sound that is an image": (("--audio", "a.png"), "a.png"),
    "a sound that ends before it begins": (
        ("--audio", "short.wav", "--audio-start", "9"),
        "second 9",
    ),
    "a reference that is not there": (("--reference", "none.mp4"), "no such file"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_use_is_one_line(
    name: str,
    demo_files: DemoFiles,
    media: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags, said = CASES[name]
    monkeypatch.chdir(media)
    model, upscaler, encoder = map(str, demo_files)
    words = ("--prompt", "rain", "--size", "64x64", "--frames", "17", "--stages", "1", "--quiet")
    target = tmp_path / "clip.mp4"
    files = ("--model", model, "--upscaler", upscaler, "--text-encoder", encoder)
    assert main(["generate", *files, *words, *flags, "-o", str(target)]) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert said in told[-1], told
    assert told[-1].startswith("ltxlite: ")
    assert not any("Traceback" in line for line in told)
    assert not target.exists()


def test_a_sound_shorter_than_the_clip_is_told_and_the_clip_has_its_length(
    demo_files: DemoFiles, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, upscaler, encoder = map(str, demo_files)
    words = ("--prompt", "rain", "--size", "64x64", "--frames", "9", "--stages", "1")
    files = ("--model", model, "--upscaler", upscaler, "--text-encoder", encoder)
    sound = ("--audio", str(media / "short.wav"), "--sigmas", "1,0.4,0")
    assert main(["generate", *files, *words, *sound, "-o", str(tmp_path / "a.mp4")]) == 0
    assert "lasts 0.20 s from second 0 on, the clip 0.38 s" in capsys.readouterr().err
