"""Parts other than the transformer, and connectors in files of their own."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from convert_support import GEMMA, MODEL, SMALL, changed, converted, field, without
from safetensors.torch import save_file
from torch import Tensor

import ltxlite.convert.plan as convert_plan
from ltxlite.checkpoint.files import ModelFiles
from ltxlite.convert.run import Conversion, convert
from ltxlite.convert.vocabulary import pieces_of
from ltxlite.errors import CheckpointError
from ltxlite.networks import Networks
from ltxlite.progress import Report
from ltxlite.release import release_name
from ltxlite_quant.gguf import GgufFile
from ltxlite_quant.policy import recipe_named

pytest_plugins = ("convert_fixtures",)


def states(path: Path) -> Tensor:
    loaded = Networks(ModelFiles.open([path]), torch.device("cpu"), torch.float32)
    return torch.stack(list(loaded.gemma().states(torch.tensor([[2, 17, 300, 41, 5, 17]]))))


def test_a_text_encoder_becomes_what_llama_cpp_would_write(tmp_path: Path) -> None:
    target = tmp_path / "gemma.gguf"
    result = converted(target, GEMMA, "BF16", "text_encoder")
    theirs = gguf.GGUFReader(target)
    assert field(theirs, "general.architecture")[0] == "gemma3"
    assert field(theirs, "gemma3.block_count") == (8, [gguf.GGUFValueType.UINT32])
    assert field(theirs, "gemma3.attention.sliding_window")[0] == 64
    names = {tensor.name for tensor in theirs.tensors}
    assert len(names) == 8 * 13 + 2
    assert {"token_embd.weight", "output_norm.weight", "blk.7.ffn_down.weight"} <= names
    assert any("what reads pictures stays out" in note for note in result.notes)
    ours, wanted = states(target), states(GEMMA)
    # The source is bf16, so only w + 1 rounds once more: 6e-8 a norm, 33 of them.
    assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()
    tokenizers = [
        Networks(ModelFiles.open([path]), torch.device("cpu"), torch.float32).tokenizer()
        for path in (target, GEMMA)
    ]
    assert tokenizers[0].where == f"{target}: tokenizer.ggml.*"
    for prompt in ("A golden retriever,  at dawn", "x\n\n  y <image_soft_token>", "日本 dorée"):
        assert tokenizers[0].encode(prompt) == tokenizers[1].encode(prompt)


def test_a_gguf_text_encoder_keeps_norms_keys_and_vocabulary(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    converted(first, GEMMA, "F16", "text_encoder")
    converted(second, first, "Q8_0", "text_encoder")
    one, two = gguf.GGUFReader(first), gguf.GGUFReader(second)
    kept = [name for name in one.fields if name.startswith(("gemma3.", "tokenizer."))]
    assert len(kept) == 13 + 12
    for name in kept:
        assert one.fields[name].types == two.fields[name].types, name
        assert one.fields[name].contents() == two.fields[name].contents(), name
    norms = [{t.name: t.data for t in f.tensors if "norm" in t.name} for f in (one, two)]
    assert norms[0].keys() == norms[1].keys()
    assert all(np.array_equal(norms[0][name], norms[1][name]) for name in norms[0])


def test_a_damaged_tokenizer_is_refused() -> None:
    for data in (b"\x0a\x05ab", b"\x0a\x02\x10\x01", b"\xff" * 12, b"\x0a\x04\x0a\x02\xff\xfe"):
        with pytest.raises(CheckpointError, match=r"x: its tokenizer is no SentencePiece model"):
            list(pieces_of(data, "x"))


@pytest.mark.parametrize("part", ["text_projection", "vae", "audio_vae"])
def test_other_parts_lose_no_tensor_and_load_as_the_same_network(tmp_path: Path, part: str) -> None:
    target = tmp_path / f"{part}.gguf"
    converted(target, MODEL, "BF16", part)
    ours, source = ModelFiles.open([target]).models[0], ModelFiles.open([MODEL]).models[0]
    for component in ours.components:
        assert ours.named(component).keys() == source.named(component).keys()
    assert set(ours.components) >= set(convert_plan.PARTS[part].needed)
    both = [
        Networks(ModelFiles([model]), torch.device("cpu"), torch.float32)
        for model in (ours, source)
    ]
    loaders = {
        "text_projection": (),
        "vae": ("video_decoder", "video_encoder"),
        "audio_vae": ("audio_decoder", "audio_encoder", "vocoder"),
    }
    for name in loaders[part]:
        first, second = (getattr(networks, name)().state_dict() for networks in both)
        assert first.keys() == second.keys()
        for key in first:
            # bf16 in the source, but for the mel filters and statistics, which are fp32 vectors
            # or matrices: a bf16 has 8 bits.
            assert torch.allclose(first[key], second[key], rtol=2**-8, atol=0), key


def test_connectors_of_another_file_come_along(tmp_path: Path, small: Path) -> None:
    alone = changed(tmp_path, small, without("_connector."))
    both = Conversion((alone, small), tmp_path / "x.gguf", recipe_named("Q8_0"))
    convert(both, Report())
    with GgufFile(tmp_path / "x.gguf") as file:
        assert len(file.tensors) == SMALL
        files = [source["file"] for source in json.loads(file.metadata["ltxlite.sources"])]
        assert sorted(files) == sorted([alone.name, small.name])


def test_a_2_0_transformer_leaves_the_connectors_in_their_own_file(tmp_path: Path) -> None:
    from test_family_20 import SETTINGS, random_transformer

    source = tmp_path / "ltx-2-19b-dev.safetensors"
    weights = {
        release_name("transformer", n): v for n, v in random_transformer().state_dict().items()
    }
    config = json.dumps({"transformer": SETTINGS})
    save_file({n: v.contiguous() for n, v in weights.items()}, source, {"config": config})
    result = converted(tmp_path / "x.gguf", source, "Q8_0")
    assert result.family == "2.0"
    assert any("connectors stay in their own file" in note for note in result.notes)
    with GgufFile(tmp_path / "x.gguf") as file:
        assert len(file.tensors) == len(weights)
        assert file.tensors["caption_projection.linear_1.weight"].format.name == "BF16"
