"""Calibration: sums of squares beside numpy, names as in the file, prompts added up, mistakes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ltxlite.calibrate import Calibrated, Calibration, Moments, calibrate, with_prompts
from ltxlite.cli import main
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.importance import Importance, read_importance, write_importance
from ltxlite.linear import QuantLinear
from ltxlite.low_rank import LowRankLinear, LowRankTerm
from ltxlite.memory.machine import CpuMachine
from ltxlite.memory.place import Memory, close
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.pipeline import run_stages
from ltxlite.presets import Model, stages_for
from ltxlite.progress import Clock, Report
from ltxlite.request import Files, Output, Request
from ltxlite.stages import Progress, Prompts, StageRun
from ltxlite_quant import FORMATS, encode

GOLDEN = Path(__file__).parent / "golden" / "models"
MODEL = GOLDEN / "tiny-2.3-distilled.safetensors"
ENCODER = GOLDEN / "gemma3_tiny"
PREFIX = "model.diffusion_model."
# One stage of two steps at 64x64 x 9 frames: 2 x 2 x 2 video tokens.
SHORT = ["--stages", "1", "--steps", "2", "--size", "64x64", "--frames", "9", "--device", "cpu"]
VIDEO_TOKENS, STEPS, CONTEXT = 8, 2, 1024


def arguments(target: Path, *more: object) -> list[str]:
    files = ["--model", MODEL, "--text-encoder", ENCODER]
    return [*map(str, ["calibrate", *files, *SHORT, "--quiet", "-o", target, *more])]


def measured(target: Path, *more: object) -> Importance:
    assert main(arguments(target, *more)) == 0
    return read_importance(target)


def matrices(path: Path, *words: str) -> dict[str, int]:
    """Return the inputs of a file's Linear weights: two dimensions, and neither table nor norm."""
    odd = ("table", "registers", "embed_tokens", "vae.", "vocoder.", "mel_", "conv")
    return {
        name: tensor.shape[1]
        for name, tensor in load_file(path).items()
        if tensor.dim() == 2
        and name.startswith(words or "")
        and not any(word in name for word in odd)
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts, with what encodes them."""
    target = tmp_path_factory.mktemp("calibrated") / "both.safetensors"
    measured(target, "--prompt", "rain", "--prompt", "a dog barks", "--text")
    return target


class Toy(nn.Module):
    """Two plain linears; what the second one reads follows from the first one's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(33, 17), nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_squares_are_those_of_numpy(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    network, moments = Toy().to(dtype), Moments()
    moments.watch("text_encoder", network)
    batches = [
        torch.randn(shape, generator=random).to(dtype) for shape in ((2, 7, 33), (1, 63, 33))
    ]
    for batch in batches:
        network(batch)
    rows = np.concatenate([batch.double().numpy().reshape(-1, 33) for batch in batches])
    hidden = [network.first(batch).relu().double().numpy().reshape(-1, 17) for batch in batches]
    found = moments.taken(2, ())
    # Sums of at most 63 squares in fp32: 63 units of 2^-24 at the very most.
    for name, read in (("first", rows), ("second", np.concatenate(hidden))):
        wanted = np.square(read).mean(0)
        got = found.moments[f"model.{name}.weight"].double().numpy()
        assert np.abs(got - wanted).max() <= wanted.max() * 63 * 2.0**-24
    # The oracle itself ran the first layer once more.
    assert found.tokens == {"model.first.weight": 2 * 77, "model.second.weight": 77}


def test_values_beyond_half_precision_do_not_overflow_their_squares() -> None:
    network, moments = nn.ModuleDict({"one": nn.Linear(3, 2).half()}), Moments()
    moments.watch("text_encoder", network)
    network["one"](torch.tensor([[300.0, -60000.0, 0.0]], dtype=torch.float16))
    (found,) = moments.taken(1, ()).moments.values()
    # 60000 is an fp16 number (59968 is its neighbour below); its square needs fp32's range.
    assert found.tolist() == pytest.approx([9e4, 3.6e9, 0.0], rel=1e-6)


def test_quantized_cut_and_lora_layers_count_once_under_their_own_names() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    quantized = QuantLinear(encode.quantize(weight, FORMATS["Q8_0"]))
    term = LowRankTerm(torch.zeros(1, 64), torch.zeros(6, 1), 1.0, "lora")
    whole = nn.Module()
    whole.video = nn.Module()
    whole.video.pieces = nn.ModuleList(nn.Linear(64, 3) for _ in range(11))
    whole.audio = LowRankLinear(quantized, [term])
    moments = Moments()
    moments.watch("text_projection", whole)
    x = torch.full((5, 64), 2.0)
    whole.audio(x)
    for piece in whole.video.pieces:
        piece(x)
    found = moments.taken(1, ())
    names = [f"text_embedding_projection.{s}_aggregate_embed.weight" for s in ("audio", "video")]
    assert sorted(found.moments) == names
    assert all(found.tokens[name] == 5 and bool((found.moments[name] == 4).all()) for name in names)


def test_every_matrix_of_the_checkpoint_is_measured_under_its_own_name(both: Path) -> None:
    wanted = matrices(MODEL, PREFIX, "text_embedding_projection.")
    wanted |= {
        name.removeprefix("language_model."): columns
        for shard in sorted(ENCODER.glob("*.safetensors"))
        for name, columns in matrices(shard).items()
        if ".layers." in name and "vision" not in name
    }
    found = read_importance(both)
    assert {name: len(value) for name, value in found.moments.items()} == wanted
    assert found.prompts == 2
    assert {model["file"] for model in found.models} >= {MODEL.name}


def test_tokens_are_counted_per_matrix(both: Path) -> None:
    tokens = read_importance(both).tokens
    block = f"{PREFIX}transformer_blocks.0."
    assert tokens[f"{block}attn1.to_q.weight"] == 2 * STEPS * VIDEO_TOKENS
    assert tokens[f"{block}attn2.to_k.weight"] == 2 * STEPS * CONTEXT
    assert tokens[
        f"{PREFIX}video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight"
    ] == (2 * CONTEXT)


def test_what_a_norm_gives_has_a_mean_square_of_one(both: Path) -> None:
    # Connectors divide by the root mean square and scale by nothing: an oracle for whole networks.
    found = read_importance(both).moments
    for stream in ("video", "audio"):
        name = f"{PREFIX}{stream}_embeddings_connector.transformer_1d_blocks.1.attn1.to_v.weight"
        # The norm's epsilon of 1e-6 and fp32.
        assert found[name].mean().item() == pytest.approx(1, abs=1e-4)
        assert found[name].std() > 0.01, "but its channels differ"


def test_matrices_that_read_the_same_have_the_same_importance(both: Path) -> None:
    found = read_importance(both).moments
    block = f"{PREFIX}transformer_blocks.2.attn1."
    for other in ("to_k", "to_v", "to_gate_logits"):
        assert torch.equal(found[f"{block}to_q.weight"], found[f"{block}{other}.weight"])
    assert not torch.equal(found[f"{block}to_q.weight"], found[f"{block}to_out.0.weight"])


def test_adding_a_prompt_gives_what_both_together_give(both: Path, tmp_path: Path) -> None:
    target = tmp_path / "one by one.safetensors"
    measured(target, "--prompt", "rain")
    added = measured(target, "--prompt", "a dog barks", "--seed", "11", "--add")
    together = read_importance(both)
    # Without --text: the transformer alone.
    inner = {name for name in matrices(MODEL, PREFIX) if "embeddings_connector" not in name}
    assert (added.prompts, added.moments.keys()) == (2, inner)
    for name, value in added.moments.items():
        assert added.tokens[name] == together.tokens[name]
        # Rounded to fp32 once more in between.
        torch.testing.assert_close(value, together.moments[name], rtol=3e-7, atol=0)


def test_prompts_come_from_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, asked = tmp_path / "prompts.txt", []
    # As Windows writes it.
    listed.write_bytes("\ufeffrain\r\n\r\n  a dog barks \n".encode())

    def kept(calibration: Calibration, *rest: object) -> Calibrated:
        asked.extend(calibration.requests)
        return Calibrated(calibration.target, 0, 0, 0)

    monkeypatch.setattr("ltxlite.calibrate.calibrate", kept)
    target = tmp_path / "x.safetensors"
    assert main(arguments(target, "--prompt", "wind", "--prompts", listed, "--json")) == 0
    assert [request.prompt for request in asked] == ["wind", "rain", "a dog barks"]
    assert [request.seed for request in asked] == [10, 11, 12], "each has noise of its own"
    assert (asked[0].width, asked[0].height, asked[0].frames) == (64, 64, 9)


def tiny_request(networks: Networks) -> Request:
    config = networks.transformer_config()
    stages = stages_for(Model("distilled", config.family, config.layers), "draft", 1, "x2")
    stages = tuple(replace(stage, sigmas="linq:2") for stage in stages)
    return Request("rain", Files(str(MODEL)), Output("x.mp4"), stages, 64, 64, 9)


@pytest.fixture(scope="module")
def networks() -> Networks:
    return open_networks(Files(str(MODEL), str(ENCODER)), "cpu", "float32")


def test_measuring_changes_nothing(networks: Networks, tmp_path: Path) -> None:
    made: list[Tensor] = []

    def stages(
        request: Request, given: Networks, prompts: Prompts, progress: Progress, clock: Clock
    ) -> Iterator[Progress]:
        for loaded in (given, networks):
            (last,) = run_stages(request, loaded, prompts, progress, clock)
            made.append(last.latents.video)
            yield last

    asked = Calibration((tiny_request(networks),), tmp_path / "x.safetensors")
    calibrate(asked, networks, stages, Report())
    assert torch.equal(*made)


def test_a_run_that_is_stopped_keeps_the_prompts_that_were_done(
    networks: Networks, tmp_path: Path
) -> None:
    def stages(
        request: Request, given: Networks, prompts: Prompts, progress: Progress, clock: Clock
    ) -> Iterator[Progress]:
        if request.prompt == "stop":
            raise KeyboardInterrupt
        return run_stages(request, given, prompts, progress, clock)

    target = tmp_path / "x.safetensors"
    requests = with_prompts(tiny_request(networks), ["rain", "stop", "wind"])
    assert [request.seed for request in requests] == [10, 11, 12]
    with pytest.raises(KeyboardInterrupt):
        calibrate(Calibration(requests, target), networks, stages, Report())
    assert read_importance(target).prompts == 1
    assert list(tmp_path.iterdir()) == [target], "no unfinished file beside it"


def test_blocks_that_come_and_go_are_measured_as_those_that_stay(
    networks: Networks, tmp_path: Path
) -> None:
    def stages(
        request: Request, given: Networks, prompts: Prompts, progress: Progress, clock: Clock
    ) -> Iterator[Progress]:
        transformer = given.transformer()
        latents = StageRun(request, progress, given, transformer)(prompts, lambda _: None)
        close(transformer)
        yield Progress(1, latents)

    machine, found = CpuMachine(), []
    streamed = open_networks(Files(str(MODEL), str(ENCODER)), "cpu", "float32")
    streamed.memory = Memory(machine)
    for name, loaded in (("stay", networks), ("come and go", streamed)):
        target = tmp_path / f"{name}.safetensors"
        calibrate(Calibration((tiny_request(networks),), target), loaded, stages, Report())
        found.append(read_importance(target))
    machine.close()
    # AdaLNs are asked once a level instead of once an evaluation when blocks are streamed.
    kept = [name for name in found[0].moments if "adaln" not in name]
    assert len(kept) > 100
    assert found[0].moments.keys() == found[1].moments.keys()
    for name in kept:
        assert found[0].tokens[name] == found[1].tokens[name], name
        assert torch.equal(found[0].moments[name], found[1].moments[name]), name


class Told(Report):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.parts: list[tuple[str, int]] = []
        self.done: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, part: str, steps: int) -> None:
        self.parts.append((part, steps))
        self.done.clear()

    def advance(self, done: int) -> None:
        self.done.append(done)


def test_progress_counts_the_steps_of_all_prompts(networks: Networks, tmp_path: Path) -> None:
    told = Told()
    requests = with_prompts(tiny_request(networks), ["rain", "wind"])
    calibrate(Calibration(requests, tmp_path / "x.safetensors"), networks, run_stages, told)
    assert told.parts[-1] == ("denoise", 4)
    assert told.done == sorted(told.done)
    assert set(told.done) - {0} == {1, 2, 3, 4}
    assert sum("transformer:" in note for note in told.notes) == 1


def test_adding_to_a_file_of_another_model_is_told(networks: Networks, tmp_path: Path) -> None:
    target, told = tmp_path / "x.safetensors", Told()
    asked = Calibration((tiny_request(networks),), target, add=True)
    calibrate(asked, networks, run_stages, Report())
    found = read_importance(target)
    other = ({**found.models[0], "file": "other.gguf", "header_sha256": "0"},)
    write_importance(target, replace(found, models=other))
    calibrate(asked, networks, run_stages, told)
    (warning,) = [note for note in told.notes if note.startswith("warning")]
    assert "other.gguf" in warning and MODEL.name in warning
    assert len(read_importance(target).models) == 2
    assert read_importance(target).prompts == 2


def test_inputs_that_are_not_finite_are_told_by_the_name_of_their_matrix() -> None:
    network, moments = nn.ModuleDict({"one": nn.Linear(3, 2)}), Moments()
    moments.watch("text_encoder", network)
    network["one"](torch.tensor([[1.0, torch.nan, 0.0]]))
    with pytest.raises(CheckpointError, match=r"model\.one\.weight read NaN or infinity"):
        moments.taken(1, ())


# Mistakes, each told in one line.


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_a_run_without_prompts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x.safetensors"
    assert "no prompt" in refused(capsys, arguments(target))
    listed = tmp_path / "prompts.txt"
    assert "no such file" in refused(capsys, arguments(target, "--prompts", listed))
    listed.write_text(" \n\n")
    assert "holds no prompt" in refused(capsys, arguments(target, "--prompts", listed))
    listed.write_bytes(b"\xff\xfe\x00rain")
    assert "not a UTF-8 text file" in refused(capsys, arguments(target, "--prompts", listed))
    listed.write_bytes(b"x" * ((1 << 20) + 1))
    assert "at most 1048576" in refused(capsys, arguments(target, "--prompts", listed))
    with pytest.raises(RequestError, match="no prompt"):
        Calibration((), target)


def test_targets_that_cannot_be_are_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x.gguf"
    assert "must be called .safetensors" in refused(capsys, arguments(target, "--prompt", "x"))
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"something else")
    assert "exists already" in refused(capsys, arguments(target, "--prompt", "x"))
    told = refused(capsys, arguments(target, "--prompt", "x", "--add"))
    assert "wanted an importance file" in told
    assert target.read_bytes() == b"something else"


def test_a_file_of_a_model_of_other_sizes_cannot_be_added_to(
    networks: Networks, tmp_path: Path
) -> None:
    target = tmp_path / "x.safetensors"
    name = f"{PREFIX}transformer_blocks.0.attn1.to_q.weight"
    write_importance(target, Importance({name: torch.ones(63)}, {name: 7}, 1, ()))
    asked = Calibration((tiny_request(networks),), target, add=True)
    with pytest.raises(
        CheckpointError, match=r"to_q\.weight reads 64 inputs here and 63 in the file"
    ):
        calibrate(asked, networks, run_stages, Report())
