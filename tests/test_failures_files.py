"""What goes wrong with files and memory (formats.md 6, cases 17 to 21): our words for it."""

import re
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from failure_files import (
    DIT,
    MODEL,
    Stored,
    Tensors,
    changed,
    metadata_of,
    networks,
    only,
)
from flavour_files import row_scaled_fp8
from release_files import write_safetensors
from safetensors.torch import save_file
from torch import nn

from ltxlite.checkpoint.assemble import Naming, Rules, assemble
from ltxlite.checkpoint.files import open_models
from ltxlite.errors import CheckpointError
from ltxlite.linear import QuantLinear
from ltxlite.memory.meter import ActivationMeter
from ltxlite.opening import open_networks
from ltxlite.pipeline import decode_picture
from ltxlite.request import Files
from ltxlite_quant import FORMATS
from ltxlite_quant.containers import open_container
from ltxlite_quant.encode import quantize
from ltxlite_quant.formats import FormatError
from ltxlite_quant.gguf import write_gguf


def test_17_quantized_weights_stay_in_the_map_of_their_file(tmp_path: Path) -> None:
    weights = {f"{n}.weight": quantize(torch.randn(512, 512), FORMATS["Q8_0"]) for n in "abcd"}
    write_gguf(tmp_path / "m.gguf", weights, {}, "ltxv")
    container = open_container(tmp_path / "m.gguf")
    with torch.device("meta"):
        model = nn.ModuleDict({n: nn.Linear(512, 512, bias=False) for n in "abcd"})
    stored = {name: Stored(container, name) for name in weights}
    with ActivationMeter("cpu") as meter:
        assemble(model, stored, Rules(Naming(), torch.float32), "m.gguf")
    mapped = sum(item.nbytes for item in stored.values())
    # Beyond the map: one row of each, decoded to see that it is not zero.
    assert meter.peak_bytes < mapped + 4 * 512 * 4
    for name, module in model.items():
        assert isinstance(module, QuantLinear)
        assert module.blocks.data_ptr() == container.load(f"{name}.weight").blocks.data_ptr()


def test_18_a_picture_that_is_not_finite_is_no_black_clip(tmp_path: Path) -> None:
    def poison(tensors: Tensors) -> None:
        tensors["vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"][0, 0] = torch.inf

    found = networks(changed(tmp_path / "m-distilled.safetensors", poison))
    channels = found.video_config().latent_channels
    with pytest.raises(CheckpointError, match="picture holds NaN: the video VAE is damaged"):
        list(decode_picture(found, torch.randn(1, channels, 2, 2, 2)))


def test_19_planning_a_file_of_forty_gigabytes_reads_its_header_only(tmp_path: Path) -> None:
    shapes = {f"{DIT}transformer_blocks.{n}.ff.net.2.weight": (4096, 163840) for n in range(64)}
    shapes[f"{DIT}audio_adaln_single.emb.timestep_embedder.linear_1.weight"] = (2048, 256)
    tensors = {name: ("F8_E4M3", shape) for name, shape in shapes.items()}
    path = write_safetensors(tmp_path / "big.safetensors", tensors)
    assert path.stat().st_size > 42e9
    tracemalloc.start()
    (model,) = open_models(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.components == ("transformer",)
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<html><head></head></html>", "web page"),
        (struct.pack("<Q", 1 << 40) + bytes(64), "announce a header of 1099511627776 bytes"),
        (MODEL.read_bytes()[:-1], "cut short|got .* bytes, but"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 1), "announces .* tensors in a file of"),
    ],
)
def test_20_cut_short_and_mistaken_downloads_are_called_what_they_are(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        open_models(path)


def test_21_a_preview_autoencoder_is_no_vae(tmp_path: Path) -> None:
    path = tmp_path / "taeltx2_3.safetensors"
    save_file({"decoder.1.weight": torch.ones(4, 4, 3, 3)}, path)
    with pytest.raises(CheckpointError, match="tiny preview autoencoder"):
        open_networks(Files(str(MODEL), vae=str(path)), "cpu", "float32")


def test_21_a_file_called_connectors_that_holds_projections_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ltx-2.3-22b-distilled_embeddings_connectors.safetensors"
    changed(path, only("text_embedding_projection."), {})
    with pytest.raises(CheckpointError, match=r"--connectors, .* but it holds text_projection"):
        open_networks(Files(str(MODEL), connectors=str(path)), "cpu", "float32")


def test_every_load_prints_component_file_formats_and_config_source(tmp_path: Path) -> None:
    path = changed(tmp_path / "m-distilled.safetensors", lambda t: t.update(scaled(t)))
    found = networks(path)
    found.transformer()
    line = found.loaded[0].line()
    assert line.startswith(f"transformer: {path} (")
    assert re.search(r"F8_E4M3_SCALED: 1 tensors, .* GB", line)
    assert line.endswith("config: m-distilled.safetensors: config.transformer")


def scaled(tensors: Tensors) -> Tensors:
    layer = f"{DIT}transformer_blocks.0.attn1.to_q"
    return row_scaled_fp8(layer, tensors[f"{layer}.weight"].float())


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e400", "-1", "true"])
def test_numbers_that_are_none_are_refused_by_their_key(tmp_path: Path, value: str) -> None:
    config = metadata_of(MODEL)["config"].replace('"num_layers": 4', f'"num_layers": {value}')
    path = changed(tmp_path / "m-distilled.safetensors", metadata={"config": config})
    with pytest.raises(CheckpointError, match=r"transformer\.num_layers is "):
        networks(path).transformer_config()
