"""`--quantize`: what is quantized while it loads equals a file that was quantized before."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flavour_files import bnb_4bit, fp8_scaled, int8, mxfp8, nvfp4
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxlite.checkpoint import at_load
from ltxlite.checkpoint.at_load import AtLoad, choices
from ltxlite.cli import main
from ltxlite.errors import RequestError
from ltxlite.linear import QuantLinear
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.request import Files, Output, Request, Stage
from ltxlite_quant import FORMATS
from ltxlite_quant.encode import quantize
from ltxlite_quant.gguf import write_gguf

GOLDEN = Path(__file__).parent / "golden" / "models"
MODEL = GOLDEN / "tiny-2.3-distilled.safetensors"
UPSCALER = GOLDEN / "tiny-2.3-spatial-upscaler-x2.safetensors"
GEMMA = GOLDEN / "gemma3_tiny_single.safetensors"
BLOCKS = "model.diffusion_model.transformer_blocks."
CPU = torch.device("cpu")

WRITERS = {
    "fp8": lambda layer, w: fp8_scaled(layer, w, "F8_E4M3", "weight_scale", {}),
    "int8": int8,
    "nf4": lambda layer, w: bnb_4bit(layer, w, "nf4"),
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
}


def opened(model: Path, kind: str | None = None) -> Networks:
    return open_networks(Files(str(model), text_encoder=str(GEMMA)), "cpu", "float32", kind)


def rewritten(path: Path, kind: str) -> Path:
    """Write the tiny checkpoint with the matrices of its blocks quantized."""
    with safe_open(MODEL, "pt") as file:
        metadata = file.metadata()
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(MODEL).items():
        if name.startswith(BLOCKS) and name.endswith(".weight") and value.dim() == 2:
            tensors |= WRITERS[kind](name.removesuffix(".weight"), value.float())
        else:
            tensors[name] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def rewritten_as_gguf(path: Path, kind: str) -> Path:
    tensors = {}
    for name, value in load_file(MODEL).items():
        if name.startswith("model.diffusion_model."):
            short = name.removeprefix("model.diffusion_model.")
            matrix = name.startswith(BLOCKS) and name.endswith(".weight") and value.dim() == 2
            matrix = matrix and value.shape[1] % 32 == 0
            tensors[short] = quantize(value.float(), FORMATS[kind]) if matrix else value.float()
    write_gguf(path, tensors, {}, "ltxv")
    return path


def assert_equal_weights(ours: torch.nn.Module, other: torch.nn.Module) -> int:
    """Compare every parameter and buffer; return how many matrices are quantized."""
    a, b = ours.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    pairs = zip(ours.modules(), other.modules(), strict=True)
    kinds = [
        (type(x), getattr(x, "format", None)) == (type(y), getattr(y, "format", None))
        for x, y in pairs
    ]
    assert all(kinds)
    return sum(isinstance(module, QuantLinear) for module in ours.modules())


@pytest.mark.parametrize("kind", list(WRITERS))
def test_loading_quantizes_as_a_quantized_safetensors_file_does(tmp_path: Path, kind: str) -> None:
    path = rewritten(tmp_path / "m-distilled.safetensors", kind)
    count = assert_equal_weights(opened(MODEL, kind).transformer(), opened(path).transformer())
    assert count == 4 * 34


@pytest.mark.parametrize("kind", ["Q8_0", "q4_0", "Q5_1"])
def test_loading_quantizes_as_a_gguf_file_does(tmp_path: Path, kind: str) -> None:
    path = rewritten_as_gguf(tmp_path / "m-distilled.gguf", kind.upper())
    ours = opened(MODEL, kind).transformer()
    other = open_networks(Files(str(path)), "cpu", "float32").transformer()
    assert assert_equal_weights(ours, other) > 100


def test_only_matrices_of_blocks_change_and_the_load_report_says_so() -> None:
    networks = opened(MODEL, "Q8_0")
    for part in (networks.transformer(), networks.gemma()):
        names = {n for n, m in part.named_modules() if isinstance(m, QuantLinear)}
        assert names
        assert all(name.startswith(("blocks.", "layers.")) for name in names)
    networks.video_connector()
    transformer, gemma, connector = (loaded.line() for loaded in networks.loaded)
    assert "quantized to Q8_0 on loading" in transformer
    assert "56 quantized to Q8_0 on loading" in gemma
    assert "quantized" not in connector


def test_what_is_quantized_already_stays_as_it_is(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "m-distilled.safetensors", "int8")
    loaded = opened(path, "Q8_0")
    assert assert_equal_weights(loaded.transformer(), opened(path).transformer()) == 4 * 34
    assert loaded.loaded[0].report.quantized == 0


def test_an_unknown_type_lists_the_choices() -> None:
    with pytest.raises(RequestError, match=r"--quantize Q9: choose one of .*Q8_0.*fp8.*nf4"):
        AtLoad.named("Q9", CPU)
    for name in choices():
        assert AtLoad.named(name, CPU).format.name in FORMATS


def test_nf4_without_kernels_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(at_load, "_nf4", missing)
    with pytest.raises(RequestError, match=r"no 4-bit kernels for cpu here \(no kernel image\)"):
        AtLoad.named("nf4", CPU)


def test_a_job_keeps_the_type(tmp_path: Path) -> None:
    job = Request("x", Files("m"), Output("o.mp4"), (Stage(),), quantize="Q8_0")
    assert Request.from_json(job.to_json(), "job") == job
    older = job.to_json().replace('"quantize": "Q8_0",\n', "")
    assert Request.from_json(older, "job") == replace(job, quantize=None)


def test_generate_takes_the_flag_and_the_saved_job_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "job.json"
    files = ["--model", str(MODEL), "--text-encoder", str(GEMMA), "--upscaler", str(UPSCALER)]
    clip = ["--size", "128x64", "--frames", "9", "--prompt", "x", "-o", str(tmp_path / "a.mp4")]
    assert main(["generate", *files, *clip, "--quantize", "Q8_0", "--save-job", str(saved)]) == 0
    told = capsys.readouterr().err
    assert told.replace("\n", " ").count("quantized to Q8_0 on loading") == 2
    assert '"quantize": "Q8_0"' in saved.read_text(encoding="utf-8")
    assert main(["generate", "--job", str(saved), "-o", str(tmp_path / "b.mp4")]) == 0
    assert "quantized to Q8_0" in capsys.readouterr().err.replace("\n", " ")
    assert main(["generate", *files, *clip, "--quantize", "Q9"]) == 1
    assert "--quantize Q9: choose one of" in capsys.readouterr().err
