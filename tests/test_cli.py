"""The verbs that describe: inspect and doctor; usage and exit codes."""

import json
import shutil
from pathlib import Path

import pytest

from ltxlite.checkpoint.files import open_models
from ltxlite.checkpoint.variant import variant_of
from ltxlite.cli import main

GOLDEN = Path(__file__).parent / "golden" / "models"
MODEL = GOLDEN / "tiny-2.3-distilled.safetensors"


def inspect(capsys: pytest.CaptureFixture[str], *paths: Path) -> dict:
    assert main(["inspect", "--json", *map(str, paths)]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_tells_parts_family_dtypes_and_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = inspect(capsys, MODEL)
    (file,) = told["files"]
    assert file["components"] == [
        *("transformer", "video_connector", "audio_connector", "text_projection"),
        *("video_encoder", "video_decoder", "audio_encoder", "audio_decoder", "vocoder"),
    ]
    assert file["tensors"] == 1882
    assert file["dtypes"]["F32"][0] == 4 * 6 + 2  # the blocks' tables and the heads'
    assert sum(count for count, _ in file["dtypes"].values()) == 1882
    assert file["bytes"] < MODEL.stat().st_size
    assert file["variant"] == "distilled"
    assert file["model_version"] == "2.3.0"
    assert "LTX-2.3, 4 blocks" in file["networks"]["transformer"]
    assert "decoder zeros" in file["networks"]["video_decoder"]
    assert file["unclaimed"] == []
    assert len(told["missing"]) == 1
    assert "google/gemma-3-12b-it" in told["missing"][0]


def test_inspect_of_a_complete_set_misses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    single = GOLDEN / "gemma3_tiny_single.safetensors"
    for encoder in (GOLDEN / "gemma3_tiny", single):
        told = inspect(capsys, MODEL, encoder)
        assert told["missing"] == []
        assert told["files"][1]["components"] == ["text_encoder"]
        assert "8 layers, width 64" in told["files"][1]["networks"]["text_encoder"]
    assert main(["inspect", str(MODEL)]) == 0
    text = capsys.readouterr().out
    assert "missing to run them together" in text


def test_inspect_reads_upscalers_and_loras(capsys: pytest.CaptureFixture[str]) -> None:
    told = inspect(
        capsys,
        GOLDEN / "tiny-2.3-spatial-upscaler-x1.5.safetensors",
        GOLDEN / "tiny-distilled-lora-r4.safetensors",
    )
    assert [file["components"] for file in told["files"]] == [["upscaler"], ["lora"]]
    assert "x1.5, 8 channels" in told["files"][0]["networks"]["upscaler"]
    lora = told["files"][1]["networks"]["lora"]
    assert lora.startswith("LoRA for LTX-2.3 (it changes gates or prompt modulation), rank 4, ")
    assert "in 4 blocks, official names; changes video " in lora


def test_doctor_reports_the_machine_and_what_real_files_would_tell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert main(["doctor", "--json", str(MODEL), str(broken)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "torch" in told["machine"]["packages"]
    assert "GB/s" in told["machine"]["disk read"]
    (model,) = told["files"][0]["models"]
    assert model["vae_padding_keys"] == {"spatial_padding_mode": "zeros"}
    assert model["table_dtypes"] == ["F32"]
    assert "model.diffusion_model.transformer_blocks.N.attn1.to_q" in model["modules"]
    assert "git-lfs" in told["files"][1]["error"]
    assert main(["doctor", str(MODEL)]) == 0
    assert "scale_shift_table dtypes: F32" in capsys.readouterr().out


def test_a_folder_is_searched_for_all_parts(tmp_path: Path) -> None:
    (tmp_path / "encoders").mkdir()
    shutil.copy(MODEL, tmp_path / "model-distilled.safetensors")
    shutil.copytree(GOLDEN / "gemma3_tiny", tmp_path / "encoders" / "gemma")
    shutil.copy(GOLDEN / "tiny-2.3-spatial-upscaler-x2.safetensors", tmp_path / "up.safetensors")
    target = tmp_path / "clip.mp4"
    arguments = ["generate", "--model", str(tmp_path), "--prompt", "x", "--quiet"]
    assert main([*arguments, "--size", "128x64", "--frames", "9", "-o", str(target)]) == 0
    assert target.stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("ltx-2.3-22b-distilled-1.1.safetensors", "distilled"),
        ("ltx-2.3-22b-dev.safetensors", "dev"),
        ("LTX2.3_DISTILLED.gguf", "distilled"),
        ("developer-notes.safetensors", None),
        ("dev-and-distilled.safetensors", None),
    ],
)
def test_variants_are_read_from_words_not_from_parts_of_words(
    tmp_path: Path, name: str, variant: str | None
) -> None:
    path = tmp_path / name
    shutil.copy(MODEL, path)
    found = variant_of(open_models(path)[0])
    assert (found[0] if found else None) == variant


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["unknown"], ["generate", "--no-such-flag"], ["inspect"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    assert "generate" in capsys.readouterr().out


def test_the_help_lists_every_sampler() -> None:
    from ltxlite.cli.generate import SAMPLERS as LISTED
    from ltxlite.sampling.samplers import SAMPLERS

    assert sorted(LISTED.split(", ")) == sorted(SAMPLERS)
