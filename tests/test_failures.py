"""What goes wrong for users of other programs (formats.md 6): weights, variants, parts, LoRA."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from failure_files import (
    DIT,
    GEMMA,
    LORA,
    MODEL,
    Stored,
    Tensors,
    changed,
    metadata_of,
    networks,
    only,
)
from flavour_files import bnb_4bit, nvfp4
from safetensors.torch import load_file
from test_flavours import rewritten
from torch import Tensor, nn

from ltxlite.checkpoint.assemble import Naming, Rules, assemble
from ltxlite.checkpoint.files import open_models
from ltxlite.checkpoint.lora import attach, other_generation, read_lora
from ltxlite.checkpoint.variant import disagreement, variant_of
from ltxlite.cli import main
from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.linear import QuantLinear
from ltxlite.opening import open_networks
from ltxlite.request import Files
from ltxlite_quant.containers import open_container
from ltxlite_quant.gguf import write_gguf


def test_01_a_gguf_without_config_is_detected_from_its_tensors(tmp_path: Path) -> None:
    stripped = {
        name.removeprefix(DIT): tensor.float()
        for name, tensor in load_file(MODEL).items()
        if name.startswith(DIT)
    }
    write_gguf(tmp_path / "m-distilled.gguf", stripped, {}, "ltxv")
    found = networks(tmp_path / "m-distilled.gguf")
    found.transformer()
    found.video_connector()
    assert "config: no config in file, detected LTX-2.3 from tensors" in found.loaded[0].line()
    assert found.connector_config(sound=True) == networks(MODEL).connector_config(sound=True)


def test_02_a_dropped_dimension_of_size_one_is_put_back(tmp_path: Path) -> None:
    model = nn.Module()
    with torch.device("meta"):
        model.keyframes_abs_pos_embedding = nn.Parameter(torch.empty(1, 96))
    values = torch.arange(96.0)
    write_gguf(tmp_path / "a.gguf", {"keyframes_abs_pos_embedding": values}, {}, "ltxv")
    (stored,) = [Stored(open_container(tmp_path / "a.gguf"), "keyframes_abs_pos_embedding")]
    assemble(
        model, {"keyframes_abs_pos_embedding": stored}, Rules(Naming(), torch.float32), "a.gguf"
    )
    assert torch.equal(model.keyframes_abs_pos_embedding, values[None])


def test_03_fp8_without_its_scales_is_named_instead_of_giving_static(tmp_path: Path) -> None:
    path = tmp_path / "m-distilled.safetensors"
    rewritten(path, "official fp8", MODEL)
    name = f"{DIT}transformer_blocks.1.attn1.to_q.weight_scale"
    stripped = changed(tmp_path / "n-distilled.safetensors", lambda t: t.pop(name), source=path)
    with pytest.raises(CheckpointError, match=r"scale tensor missing for .*blocks\.1\.attn1\.to_q"):
        networks(stripped).transformer()
    # The other spelling is no missing scale.
    rewritten(path, "legacy e5m2", MODEL)
    networks(path).transformer()


@pytest.mark.parametrize("write_layer", [nvfp4, lambda n, w: bnb_4bit(n, w, "nf4")])
def test_04_packed_weights_are_called_so_and_give_no_matmul_error(
    tmp_path: Path, write_layer: Callable[[str, Tensor], Tensors]
) -> None:
    layer = f"{DIT}transformer_blocks.0.ff.net.2"

    def pack(tensors: Tensors) -> None:
        codes = write_layer(layer, tensors[f"{layer}.weight"].float())[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = codes

    path = changed(tmp_path / "m-distilled.safetensors", pack)
    with pytest.raises(CheckpointError, match=r"is U8 .*packed quantization .*NVFP4"):
        networks(path)


def test_05_header_and_name_that_disagree_on_the_variant_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = metadata_of(MODEL) | {"model_version": "2.3.0-distilled"}
    path = changed(tmp_path / "ltx-2.3-22b-dev.safetensors", metadata=metadata)
    (model,) = open_models(path)
    assert variant_of(model) == ("distilled", "model_version in its header")
    message = "model_version in its header says distilled but its file name says dev"
    assert message in (disagreement(model) or "")
    arguments = ["--model", str(path), "--text-encoder", str(GEMMA), "--prompt", "x"]
    arguments += ["--size", "64x64", "--frames", "9", "-o", str(tmp_path / "clip.avi")]
    main(["generate", *arguments, "--stages", "1"])
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert disagreement(open_models(MODEL)[0]) is None


@pytest.mark.parametrize("word", ["dev", "distilled", "unknown", "", None, 7])
def test_05_a_gguf_that_we_wrote_says_its_variant_itself(tmp_path: Path, word: object) -> None:
    stripped = {
        name.removeprefix(DIT): tensor.float()
        for name, tensor in load_file(MODEL).items()
        if name.startswith(f"{DIT}audio_adaln_single.")
    }
    keys = {} if word is None else {"ltxlite.variant": word}
    write_gguf(tmp_path / "renamed.gguf", stripped, keys, "ltxv")
    (model,) = open_models(tmp_path / "renamed.gguf")
    told = (word, "ltxlite.variant in its header") if word in ("dev", "distilled") else None
    assert variant_of(model) == told
    wrong = tmp_path / "ltx-dev.gguf"
    (tmp_path / "renamed.gguf").rename(wrong)
    (model,) = open_models(wrong)
    disagrees = "ltxlite.variant in its header says distilled but its file name says dev"
    assert (disagrees in (disagreement(model) or "")) == (word == "distilled")


def without_connectors(tensors: Tensors) -> None:
    for name in [name for name in tensors if "embeddings_connector" in name]:
        del tensors[name]


def no_layers(tensors: Tensors) -> None:
    for name in [name for name in tensors if "transformer_1d_blocks" in name]:
        del tensors[name]


def zero_filled(tensors: Tensors) -> None:
    tensors[f"{DIT}video_embeddings_connector.transformer_1d_blocks.0.attn1.to_v.weight"].zero_()


def test_06_connectors_missing_empty_or_zero_filled_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m-distilled.safetensors"
    with pytest.raises(CheckpointError, match=r"missing: the connectors: .*--connectors"):
        networks(changed(path, without_connectors)).video_connector()
    with pytest.raises(CheckpointError, match=r"tensors are missing"):
        networks(changed(path, no_layers)).video_connector()
    with pytest.raises(CheckpointError, match=r"connector blocks \[0\] are missing"):
        networks(changed(path, no_layers, {})).video_connector()
    with pytest.raises(CheckpointError, match=r"to_v\.weight is all zeros, a placeholder"):
        networks(changed(path, zero_filled)).video_connector()
    config = json.loads(metadata_of(MODEL)["config"])
    config["transformer"]["connector_num_layers"] = 0
    zero_layers = changed(path, metadata={"config": json.dumps(config)})
    with pytest.raises(CheckpointError, match="connector_num_layers is 0"):
        networks(zero_layers).video_connector()


def test_14_an_audio_vae_without_metadata_takes_its_configuration_from_the_set(
    tmp_path: Path,
) -> None:
    path = changed(tmp_path / "audio.safetensors", only("audio_vae.", "vocoder."), {})
    files = Files(str(MODEL), audio_vae=str(path))
    found = open_networks(files, "cpu", "float32")
    assert found.audio_config() == networks(MODEL).audio_config()
    found.audio_decoder()
    found.vocoder()
    assert {loaded.path for loaded in found.loaded} == {path}


def test_14_an_audio_vae_of_the_other_generation_is_refused(tmp_path: Path) -> None:
    def flatten(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("vocoder.")]:
            value = tensors.pop(name)
            if name.startswith("vocoder.vocoder."):
                tensors[name.replace("vocoder.vocoder.", "vocoder.", 1)] = value

    path = changed(tmp_path / "old-distilled.safetensors", flatten)
    with pytest.raises(CheckpointError, match=r"its vocoder is LTX-2\.0's, the transformer"):
        networks(path, GEMMA).check_families()


def some_of_a_lora(path: Path, wrong: int) -> Path:
    def rename(tensors: Tensors) -> None:
        modules = sorted({re.sub(r"\.lora_[AB].*", "", name) for name in tensors})[:wrong]
        for name in list(tensors):
            if re.sub(r"\.lora_[AB].*", "", name) in modules:
                tensors[name.replace("transformer_blocks", "other_blocks")] = tensors.pop(name)

    return changed(path, rename, source=LORA)


def test_15_a_lora_adds_at_run_time_and_counts_what_fits(tmp_path: Path) -> None:
    path = tmp_path / "m-distilled.safetensors"
    rewritten(path, "nvfp4", MODEL)
    whole = networks(path)
    transformer = whole.transformer()
    before = {n: m.blocks for n, m in transformer.named_modules() if isinstance(m, QuantLinear)}
    (report,) = attach(transformer, [read_lora(open_models(LORA)[0])], whole.naming("transformer"))
    assert report.line().endswith(f"{report.matched} of {report.matched} modules fit")
    after = {n: m.blocks for n, m in transformer.named_modules() if isinstance(m, QuantLinear)}
    bases = {n.removesuffix(".base"): blocks for n, blocks in after.items()}
    assert all(bases[name] is blocks for name, blocks in before.items())
    partial = some_of_a_lora(tmp_path / "partial.safetensors", report.matched // 2)
    lora = read_lora(open_models(partial)[0])
    (told,) = attach(networks(MODEL).transformer(), [lora], whole.naming("transformer"))
    assert told.line().startswith("warning: LoRA ")
    assert "other_blocks" in told.line()
    strange = some_of_a_lora(tmp_path / "strange.safetensors", report.matched)
    with pytest.raises(CheckpointError, match="this LoRA is for another network"):
        lora = read_lora(open_models(strange)[0])
        attach(networks(MODEL).transformer(), [lora], whole.naming("transformer"))


def test_16_a_lora_of_another_generation_is_told_by_header_or_shape(tmp_path: Path) -> None:
    path = changed(tmp_path / "l.safetensors", metadata={"model_version": "2.0.1"}, source=LORA)
    lora = read_lora(open_models(path)[0])
    assert "was made for LTX-2.0, the checkpoint is LTX-2.3" in str(other_generation(lora, (2, 3)))
    assert other_generation(lora, (2, 0, 5)) is None
    assert other_generation(lora, ()) is None

    def narrow(tensors: Tensors) -> None:
        name = next(name for name in tensors if ".lora_B" in name)
        tensors[name] = tensors[name][:-2].contiguous()

    lora = read_lora(open_models(changed(path, narrow, source=LORA))[0])
    with pytest.raises(ShapeError, match="it was made for another model"):
        attach(networks(MODEL).transformer(), [lora], networks(MODEL).naming("transformer"))
