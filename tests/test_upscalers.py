"""Which upscaler serves a job: its kind, and the generation that it was made for."""

import shutil
from pathlib import Path

import pytest
from failure_files import GEMMA, GOLDEN, MODEL, changed, networks

from ltxlite.checkpoint.files import open_models
from ltxlite.checkpoint.generation import upscaler_generation
from ltxlite.errors import CheckpointError
from ltxlite.request import Stage
from ltxlite.stages import refuse_missing
from ltxlite.upscalers import find_upscaler

UPSCALER = GOLDEN / "tiny-2.3-spatial-upscaler-x2.safetensors"
STAGES = (Stage("1/2"), Stage(upscaler="x2"))


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("ltx-2-spatial-upscaler-x2-1.0", (2, 0)),
        ("ltx-2-19b-spatial-upscaler-x2", (2, 0)),
        ("LTX2_spatial_upscaler", (2, 0)),
        ("ltx-2.3-spatial-upscaler-x2-1.1", (2, 3)),
        ("ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0", (2, 5)),
        ("spatial-upscaler-x2", None),
    ],
)
def test_a_name_tells_the_generation(
    tmp_path: Path, name: str, version: tuple[int, ...] | None
) -> None:
    path = tmp_path / f"{name}.safetensors"
    shutil.copy(UPSCALER, path)
    (model,) = open_models(path)
    told = upscaler_generation(model)
    assert (told and told[0]) == version


def test_a_header_goes_before_the_name(tmp_path: Path) -> None:
    path = tmp_path / "ltx-2-spatial-upscaler.safetensors"
    config = {"model_version": "2.3.1"}
    changed(path, metadata=config, source=UPSCALER)
    (model,) = open_models(path)
    assert upscaler_generation(model) == ((2, 3, 1), "model_version in its header")


def test_an_upscaler_of_another_generation_is_refused_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "ltx-2-spatial-upscaler-x2-1.0.safetensors"
    shutil.copy(UPSCALER, old)
    only = networks(MODEL, GEMMA, old)
    with pytest.raises(CheckpointError) as caught:
        refuse_missing(STAGES, only)
    told = str(caught.value)
    assert "ltx-2.3-spatial-upscaler-x2-1.1.safetensors" in told  # what to take
    assert f"{old} is LTX-2.0's (its file name), the transformer LTX-2.3's" in told
    with pytest.raises(CheckpointError, match="no x2 upscaler"):
        find_upscaler(only, "x2")
    both = networks(MODEL, GEMMA, old, UPSCALER)
    refuse_missing(STAGES, both)
    monkeypatch.setattr(both, "upscaler_from", lambda model: model.path)
    assert find_upscaler(both, "x2") == UPSCALER
    refuse_missing((Stage(),), only)  # nobody needs it
