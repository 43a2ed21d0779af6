"""What goes wrong with text encoders (formats.md 6, cases 7 to 13): our words for it."""

from pathlib import Path

import pytest
import torch
from failure_files import (
    GEMMA,
    MODEL,
    SINGLE,
    Tensors,
    changed,
    networks,
)
from test_gemma_gguf import keys_of, vocabulary, write

from ltxlite.checkpoint.files import open_models
from ltxlite.errors import CheckpointError
from ltxlite.models.tokenizer import Tokenizer, check_vocabulary
from ltxlite_quant.gguf import write_gguf


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
