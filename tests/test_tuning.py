"""Branches that weigh more, attention above 1, and masks as ComfyUI means them."""

import dataclasses
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resume_support import every_progress, request_of, tiny_networks
from steered_text_support import dense_outputs, inputs, network, outputs
from test_steering_runs import photograph
from torch import Tensor, nn

from benchmarks.quality import _drawn
from ltxlite.cli import main
from ltxlite.conditioning import LatentState
from ltxlite.conditions import Conditions, Image
from ltxlite.denoise import Denoiser, Prompt, Stream
from ltxlite.errors import RequestError
from ltxlite.models.passes import BranchScales, StreamInput, Timesteps
from ltxlite.models.transformer import Transformer
from ltxlite.pipeline import encode
from ltxlite.progress import Clock, Report
from ltxlite.request import Request, Stage, build
from ltxlite.sampling.settings import Guidance
from ltxlite.tuning import Tuning

OWN = ("self_attention.to_out", "text_attention.to_out", "feed_forward.down")


def scaled(
    given: tuple[StreamInput, StreamInput], blocks: frozenset[int] | None = None
) -> tuple[StreamInput, StreamInput]:
    video, audio = given
    return (
        replace(video, scales=BranchScales(1.3, 2.0, blocks)),
        replace(audio, scales=BranchScales(0.7, 0.0, blocks)),
    )


def with_larger_outputs(transformer: Transformer, blocks: tuple[int, ...]) -> Transformer:
    """Return a network whose last linears of each branch give so much more."""
    factors = {f"video.{name}": 1.3 for name in OWN} | {f"audio.{name}": 0.7 for name in OWN}
    factors |= {"audio_to_video.to_out": 2.0, "video_to_audio.to_out": 0.0}
    changed = deepcopy(transformer)
    for number in blocks:
        for name, factor in factors.items():
            linear = changed.blocks[number].get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight.data *= factor
            if linear.bias is not None:
                linear.bias.data *= factor
    return changed


def of_20() -> Transformer:
    """Return a network whose prompt is not modulated, and whose text attention has no gate row."""
    config = replace(network().config, text_modulation=False, prompt_adaln=False)
    made, random = Transformer(config).requires_grad_(False).eval(), torch.Generator()
    random.manual_seed(9)
    for name, value in made.named_parameters():
        value.data = _drawn(name, value.shape, random)
    return made


@pytest.mark.parametrize("steered", [False, True], ids=["plain", "nag and relay"])
@pytest.mark.parametrize("make", [network, of_20])
def test_scales_are_those_of_what_branches_give(make, steered: bool) -> None:  # type: ignore[no-untyped-def]
    transformer, given = make(), inputs(bias=steered, avoided=steered)
    for blocks in (None, frozenset({1})):
        wanted = outputs(with_larger_outputs(transformer, tuple(blocks or (0, 1))), given)
        found = outputs(transformer, scaled(given, blocks))
        # The factor meets each product before or after its sum: fp32.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert (found - outputs(transformer, given)).abs().max() > 1e-2


def test_scales_of_1_change_no_bit() -> None:
    given, transformer = inputs(), network()
    same = [replace(s, scales=BranchScales(1.0, 1.0, frozenset({0}))) for s in given]
    assert torch.equal(outputs(transformer, (same[0], same[1])), outputs(transformer, given))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_attention_above_1_equals_the_one_with_full_masks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(weights=True)
    more = []
    for stream in given:
        (rows,) = stream.weights
        factors = torch.linspace(0.5, 10, rows.weights.shape[2])  # all alike would do nothing
        more.append(replace(stream, weights=(replace(rows, weights=rows.weights * factors),)))
    wanted = dense_outputs((more[0], more[1]), monkeypatch)
    transformer = network()
    transformer.chunk = chunk
    found = outputs(transformer, (more[0], more[1]))
    assert (found - wanted).abs().max() < 1e-5  # what the issue asks for
    assert (found - outputs(transformer, given)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"video": -0.1}, "scale of video: -0.1, wanted 0 to 10"),
        ({"video_to_audio": float("nan")}, "scale of video_to_audio: nan"),
        ({"blocks": ((5, 3),)}, "blocks 5-3"),
    ],
)
def test_impossible_scales_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Tuning(**fields)  # type: ignore[arg-type]


def test_a_tuning_comes_back_from_json_and_knows_its_blocks() -> None:
    tuning = Tuning(1.03, audio_to_video=1.5, blocks=((0, 2), (7, 7)), masks="comfy")
    stored = json.loads(json.dumps(dataclasses.asdict(tuning)))
    assert build(Tuning, stored, "job") == tuning
    assert tuning.covered() == {0, 1, 2, 7}
    assert Tuning().covered() is None


# Masks between 0 and 1.


def state_of(given: StreamInput, mask: Tensor, mixed: bool) -> LatentState:
    random = torch.Generator().manual_seed(3)
    clean = torch.randn(given.latent.shape, generator=random)
    initial = torch.randn(given.latent.shape, generator=random)
    target = given.latent.shape[1]
    return LatentState(initial, clean, mask, given.positions, target, mixed=mixed)


def test_a_mixed_mask_shows_a_mixture_and_steps_by_the_whole_sigma() -> None:
    video, audio = inputs(bias=False, avoided=False)
    random = torch.Generator().manual_seed(5)
    states, xs = [], []
    for given in (video, audio):
        mask = torch.rand(1, given.latent.shape[1], 1, generator=random)
        mask[:, :2], mask[:, 2:4] = 0, 1
        states.append(state_of(given, mask, mixed=True))
        xs.append(torch.randn(given.latent.shape, generator=random))
    transformer, sigma = network(), 0.6
    streams = [
        Stream(state, Prompt(given.context), Guidance())
        for state, given in zip(states, (video, audio), strict=True)
    ]
    found = Denoiser(transformer, *streams)(tuple(xs), sigma).x0
    # KSamplerX0Inpaint around an x0 of x - v sigma, timesteps mask * sigma.
    seen = [x * s.mask + s.clean * (1 - s.mask) for x, s in zip(xs, states, strict=True)]
    asked = [
        StreamInput(x, torch.tensor([sigma]), Timesteps.of(s.mask * sigma), s.positions, g.context)
        for x, s, g in zip(seen, states, (video, audio), strict=True)
    ]
    sizes = [x.numel() for x in xs]
    velocities = outputs(transformer, (asked[0], asked[1])).split(sizes)
    for x, v, s, x0 in zip(seen, velocities, states, found, strict=True):
        predicted = x - v.view(x.shape) * sigma
        wanted = predicted * s.mask + s.clean * (1 - s.mask)
        torch.testing.assert_close(x0, wanted, rtol=1e-5, atol=1e-5)


def test_all_of_a_mixed_state_is_noised_and_none_of_it_held() -> None:
    video, _ = inputs(bias=False, avoided=False)
    mask = torch.full((1, 30, 1), 0.25)
    mask[:, 6:] = 1
    state, noise = state_of(video, mask, mixed=True), torch.ones(video.latent.shape)
    found = state.noised(noise, 0.5)
    latent = torch.cat([state.clean[:, :6], state.initial[:, 6:]], dim=1)
    torch.testing.assert_close(found, (latent + 1) / 2, rtol=0, atol=1e-6)  # lerp rounds otherwise
    denoiser = Denoiser(network(), Stream(state, Prompt(video.context), Guidance()), None)
    assert denoiser.hold((found,))[0] is found
    plain = Denoiser(
        network(), Stream(replace(state, mixed=False), Prompt(video.context), Guidance()), None
    )
    assert torch.equal(plain.hold((found,))[0], state.blend(found))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "res_2s"])
def test_masks_of_0_and_1_mean_the_same_in_both(tmp_path: Path, sampler: str) -> None:
    path = str(photograph(tmp_path / "x.png", 64, 64))
    networks = tiny_networks()

    def picture(strength: float, masks: str) -> Tensor:
        stage = Stage(sigmas="linq:3", sampler=sampler)
        request = request_of(
            tmp_path,
            stage,
            conditions=Conditions((Image(path, "0", (strength,)),)),
            tuning=Tuning(masks=masks),  # type: ignore[arg-type]
        )
        prompts = encode(request, networks, Clock(Report()))
        return every_progress(request, networks, prompts)[-1].latents.video

    official = picture(1.0, "official")
    # Noise is added before or after the clean tokens are put in: the free ones' bits are alike.
    assert torch.equal(picture(1.0, "comfy"), official)
    part = [picture(0.5, masks) for masks in ("official", "comfy")]
    assert float((part[0] - part[1]).abs().max()) > 1e-2


def arguments(target: Path, *more: str) -> list[str]:
    files = request_of(target, Stage()).files
    return [
        *("generate", "--model", files.model, "--upscaler", files.upscalers[0]),
        *("--text-encoder", str(files.text_encoder), "--prompt", "rain", "--size", "64x64"),
        *("--frames", "9", "--stages", "1", "--steps", "2", "-o", str(target / "clip.mp4")),
        *("--quiet", *more),
    ]


def test_flags_become_a_tuning_of_the_job(tmp_path: Path) -> None:
    saved = tmp_path / "job.json"
    more = ("--attn-scale", "video=1.03,a2v=1.5,blocks=1-2", "--mask-mode", "comfy")
    assert main(arguments(tmp_path, *more, "--save-job", str(saved))) == 0
    request = Request.from_json(saved.read_text(), "job")
    assert request.tuning == Tuning(1.03, 1.0, 1.5, 1.0, ((1, 2),), "comfy")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1.03", "'1.03' is amiss; wanted items such as video=1.03"),
        ("video=1,video=2", "'video=2' is amiss"),
        ("picture=2", "'picture=2' is amiss"),
        ("blocks=1-2", "blocks without a scale"),
        ("video=99", "scale of video: 99.0, wanted 0 to 10"),
    ],
)
def test_wrong_scales_are_refused_in_one_line(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--attn-scale", text)) == 1
    error = capsys.readouterr().err.strip()
    assert told in error
    assert len(error.splitlines()) == 1
