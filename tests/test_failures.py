"""What goes wrong for users of other programs, case by case (formats.md 6): our words for it."""

import json
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from failure_files import (
    DIT,
    GEMMA,
    LORA,
    MODEL,
    SINGLE,
    Stored,
    Tensors,
    changed,
    metadata_of,
    networks,
    only,
)
from flavour_files import bnb_4bit, nvfp4, row_scaled_fp8
from release_files import write_safetensors
from safetensors.torch import load_file, save_file
from test_flavours import rewritten
from test_gemma_gguf import keys_of, vocabulary, write
from torch import Tensor, nn

from ltxlite.checkpoint.assemble import Naming, assemble
from ltxlite.checkpoint.files import open_models
from ltxlite.checkpoint.lora import attach, other_generation, read_lora
from ltxlite.checkpoint.variant import disagreement, variant_of
from ltxlite.cli import main
from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.linear import QuantLinear
from ltxlite.memory.meter import ActivationMeter
from ltxlite.models.tokenizer import Tokenizer, check_vocabulary
from ltxlite.opening import open_networks
from ltxlite.pipeline import decode_picture
from ltxlite.request import Files
from ltxlite_quant import FORMATS
from ltxlite_quant.containers import open_container
from ltxlite_quant.encode import quantize
from ltxlite_quant.formats import FormatError
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
    assemble(model, {"keyframes_abs_pos_embedding": stored}, Naming(), torch.float32, "a.gguf")
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


def test_07_a_text_encoder_without_tokenizer_lists_what_was_searched(tmp_path: Path) -> None:
    path = tmp_path / "gemma.safetensors"
    changed(path, lambda t: t.pop("spiece_model"), source=SINGLE)
    with pytest.raises(CheckpointError, match=r"no tokenizer found; searched .*tokenizer.json"):
        networks(path).tokenizer()


def test_08_a_tokenizer_that_tells_no_prompts_apart_is_refused() -> None:
    class Blind:
        size = 700

        def id_of(self, token: str) -> int:
            return 0

        def split(self, text: str) -> list[int]:
            return [3]

    with pytest.raises(CheckpointError, match="different prompts give the same tokens"):
        check_vocabulary(Tokenizer(Blind(), "tokenizer.json"), 704)
    own = Tokenizer.from_file(GEMMA / "tokenizer.model")
    with pytest.raises(CheckpointError, match="642 tokens, but the text encoder has 262208"):
        check_vocabulary(own, 262208)


@pytest.mark.parametrize(("hidden", "size"), [(1152, "1B"), (2560, "4B"), (5376, "27B")])
def test_09_another_size_of_gemma_3_is_named(tmp_path: Path, hidden: int, size: str) -> None:
    def widen(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = torch.ones(hidden)

    path = changed(tmp_path / "gemma.safetensors", widen, {}, SINGLE)
    with pytest.raises(CheckpointError, match=rf"Gemma 3 {size} .*needs the 12B.*google/gemma-3"):
        networks(path).gemma_config()


def test_09_a_gemma_that_the_projection_does_not_read_is_refused_before_loading(
    tmp_path: Path,
) -> None:
    def shorten(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.7.")]:
            del tensors[name]

    path = changed(tmp_path / "gemma.safetensors", shorten, {}, SINGLE)
    with pytest.raises(CheckpointError, match=r"reads 576 values .* gives 8 x 64; .*\(49 x 3840\)"):
        networks(path, MODEL).check_families()


@pytest.mark.parametrize("name", ["layer_scalar", "v_proj"])
def test_09_gemma_4_is_told_from_gemma_3_by_its_tensors(tmp_path: Path, name: str) -> None:
    def mutate(tensors: Tensors) -> None:
        if name == "layer_scalar":
            tensors["model.layers.0.layer_scalar"] = torch.ones(1)
        else:  # stock Gemma 4: its global layers have no values of their own
            del tensors["model.layers.5.self_attn.v_proj.weight"]

    path = changed(tmp_path / "gemma.safetensors", mutate, source=SINGLE)
    with pytest.raises(CheckpointError, match=r"this is Gemma 4, .*LTX-2.5; .*need Gemma 3 12B"):
        networks(path).gemma_config()


def test_10_gemma_3_in_gguf_loads_and_gemma_4_is_refused(tmp_path: Path) -> None:
    data = (GEMMA / "tokenizer.model").read_bytes()
    networks(write(tmp_path / "gemma3.gguf", keys_of(data))).gemma()
    path = write(tmp_path / "gemma4.gguf", vocabulary(data), architecture="gemma4")
    with pytest.raises(CheckpointError, match=r"architecture 'gemma4'; .*Gemma 3 12B"):
        networks(path).gemma_config()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_11_all_hidden_states_differ_and_are_tensors_of_their_own(
    tmp_path: Path, kind: str
) -> None:
    data = (GEMMA / "tokenizer.model").read_bytes()
    gemma = networks(write(tmp_path / "gemma.gguf", keys_of(data), kind)).gemma()
    states = list(gemma.states(torch.tensor([[2, 17, 300, 41, 5]])))
    assert len(states) == 9
    assert len({state.data_ptr() for state in states}) == 9
    for index, state in enumerate(states):
        for other in states[:index]:
            assert (state - other).abs().max() > 1e-3 * state.abs().max()


def test_12_norms_of_a_gguf_are_not_offset_twice(tmp_path: Path) -> None:
    data = (GEMMA / "tokenizer.model").read_bytes()
    from_gguf = networks(write(tmp_path / "gemma.gguf", keys_of(data))).gemma()
    original = networks(GEMMA).gemma()
    stored, trained = from_gguf.layers[3].input_layernorm, original.layers[3].input_layernorm
    assert (stored.weight - trained.weight).mean().item() == pytest.approx(1, abs=1e-6)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    assert (stored(x) - trained(x)).abs().max() < 1e-5  # w + 1 is rounded to fp32 once more


def test_13_the_vision_projector_is_neither_needed_nor_taken_for_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (GEMMA / "tokenizer.model").read_bytes()
    write(tmp_path / "gemma.gguf", keys_of(data))
    projector = tmp_path / "mmproj-F16.gguf"
    write_gguf(projector, {"mm.input_projection.weight": torch.ones(4, 4)}, {}, "clip")
    assert networks(tmp_path).tokenizer().encode("a dog").ids[0] == 2
    with pytest.raises(CheckpointError, match=r"vision projector \(mmproj\), not needed"):
        open_models(projector)


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


def test_17_quantized_weights_stay_in_the_map_of_their_file(tmp_path: Path) -> None:
    weights = {f"{n}.weight": quantize(torch.randn(512, 512), FORMATS["Q8_0"]) for n in "abcd"}
    write_gguf(tmp_path / "m.gguf", weights, {}, "ltxv")
    container = open_container(tmp_path / "m.gguf")
    with torch.device("meta"):
        model = nn.ModuleDict({n: nn.Linear(512, 512, bias=False) for n in "abcd"})
    stored = {name: Stored(container, name) for name in weights}
    with ActivationMeter("cpu") as meter:
        assemble(model, stored, Naming(), torch.float32, "m.gguf")
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
