"""AdaIN and StatNorm: the formulas of features.md K1 to K3, and what a stage makes of them."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from test_engine_runs import Files, generate
from test_steering_runs import every_progress
from torch import Tensor

from ltxlite import conditioning
from ltxlite.conditioning import LatentState, StageContext
from ltxlite.conditions import Conditions, Image, Source
from ltxlite.errors import RequestError
from ltxlite.geometry import AudioGrid, ClipShape, LatentGrid, patchify_video, video_positions
from ltxlite.given import GivenSource, StageGiven
from ltxlite.opening import open_networks
from ltxlite.pipeline import encode, run_stages
from ltxlite.progress import Clock, Report
from ltxlite.request import Files as ModelFiles
from ltxlite.request import Output, Request, Stage
from ltxlite.sampling.settings import Statistics
from ltxlite.sampling.statistics import ChannelControl, match_channels, normalise_channels
from ltxlite.saved_state import conditions as saved_conditions
from ltxlite.saved_state import encode_state, read_state
from ltxlite.steering.statistics import channel_control, controlled

FRAMES, PLACES, CHANNELS = 3, 35, 37
SHAPE = ClipShape(FRAMES, 5, 7, 18, 24.0)


def stage(number: int = 0) -> StageContext:
    return StageContext(number, SHAPE, 17, Fraction(24), LatentGrid(), AudioGrid())


def noise(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def adain_by_channel(latent: Tensor, reference: Tensor, factor: float, per_frame: bool) -> Tensor:
    """The node's loop over channels, and frames: (1, F, P, C), torch's own deviation."""
    found = latent.clone()
    for channel in range(latent.shape[3]):
        for frame in range(latent.shape[1]) if per_frame else [slice(None)]:
            shown = frame if reference.shape[1] > 1 or not per_frame else 0
            own, other = latent[0, frame, :, channel], reference[0, shown, :, channel]
            found[0, frame, :, channel] = (own - own.mean()) / own.std() * other.std()
            found[0, frame, :, channel] += other.mean()
    return latent + factor * (found - latent)


@pytest.mark.parametrize("factor", [0.2, 1.0, -0.5, 1.7])
@pytest.mark.parametrize(("per_frame", "frames"), [(False, 5), (False, 1), (True, 3), (True, 1)])
def test_adain_gives_each_channel_the_references_mean_and_deviation(
    factor: float, per_frame: bool, frames: int
) -> None:
    latent = noise(1, FRAMES, PLACES, CHANNELS) * 2 + 0.3
    reference = noise(1, frames, 11, CHANNELS, seed=2) * 0.5 - 0.7
    found = match_channels(latent, reference, factor, per_frame)
    wanted = adain_by_channel(latent, reference, factor, per_frame)
    # Values up to about 10, in sums of 105 fp32 numbers.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_channel_without_deviation_is_moved_and_stays_finite() -> None:
    latent, reference = torch.full((1, 2, 3, 2), 4.0), noise(1, 1, 1, 2)
    for per_frame in (False, True):
        found = match_channels(latent, reference, 1.0, per_frame)
        torch.testing.assert_close(found, reference.expand_as(latent))
    assert torch.equal(normalise_channels(latent, 1.0), torch.zeros_like(latent))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("percentile", [95.0, 70.0, 100.0])
def test_statnorm_measures_what_lies_in_the_middle(percentile: float, clip: bool) -> None:
    latent = noise(1, FRAMES, PLACES, CHANNELS) * 3 - 1
    latent[0, 0, 0] = 40  # outliers, which do not count
    found = normalise_channels(latent, 0.75, percentile, clip)
    tail = (100 - percentile) / 200
    for channel in range(CHANNELS):
        values = latent[..., channel].flatten()
        low, high = torch.quantile(values, tail), torch.quantile(values, 1 - tail)
        middle = values[(values >= low) & (values <= high)]
        wanted = (values.clamp(low, high) if clip else values) - middle.mean()
        wanted = values + 0.75 * (wanted / middle.std() - values)
        # Sums of 105 fp32 numbers up to 40.
        torch.testing.assert_close(found[..., channel].flatten(), wanted, rtol=1e-4, atol=1e-4)


def test_steps_take_their_factor_and_the_last_one_serves_the_rest() -> None:
    settings = Statistics(adain_steps=(0.3, 0.1), statnorm=1.0)
    reference, tokens = noise(1, 1, PLACES, CHANNELS, seed=3), noise(1, 105 + 9, CHANNELS)
    control = ChannelControl(settings, FRAMES, 105, reference)
    own = tokens[:, :105].unflatten(1, (FRAMES, PLACES))
    for step, factor in ((0, 0.3), (1, 0.1), (7, 0.1)):
        found = control.predicted(tokens, step)
        wanted = match_channels(own, reference, factor).flatten(1, 2)
        torch.testing.assert_close(found[:, :105], wanted)
        assert torch.equal(found[:, 105:], tokens[:, 105:]), "guides are no part of the clip"
    after = control.finished(tokens)
    torch.testing.assert_close(after[:, :105], normalise_channels(own, 1.0).flatten(1, 2))
    assert torch.equal(after[:, 105:], tokens[:, 105:])


def state() -> LatentState:
    positions = video_positions((FRAMES, 5, 7), 24.0, LatentGrid())
    return conditioning.start(torch.zeros(1, 105, CHANNELS), positions)


def test_a_stage_follows_the_one_before_it_and_the_first_its_source_or_image() -> None:
    settings, begun = Statistics(adain=0.2), noise(1, CHANNELS, FRAMES, 5, 7)
    image, video = noise(1, CHANNELS, 1, 5, 7, seed=4), noise(1, CHANNELS, FRAMES, 5, 7, seed=5)
    images = Conditions(images=(Image("a"),))
    extended = Conditions(source=Source("x", video=(9 / 24, 1.0)))
    anew = Conditions(source=Source("x", denoise=0.5))
    given = StageGiven(images=(image,), source=GivenSource(video))
    wanted = (
        (images, 1, begun),
        (images, 0, image),
        (extended, 0, video[:, :, :2]),  # frames 0 to 8 are kept
        (anew, 0, video),
    )
    for conditions, number, latent in wanted:
        control = channel_control(settings, conditions, given, begun, stage(number))
        assert control is not None
        assert control.reference is not None
        assert torch.equal(control.reference.flatten(1, 2), patchify_video(latent))
        assert (control.frames, control.target) == (FRAMES, 105)
    assert channel_control(Statistics(), images, given, begun, stage()) is None


def test_kept_tokens_stay_what_they_are() -> None:
    image = noise(1, CHANNELS, 1, 5, 7, seed=4)
    held = conditioning.place_image(state(), image, 0, 1.0)
    control = ChannelControl(Statistics(statnorm=1.0), FRAMES, 105)
    x = held.blend(noise(1, 105, CHANNELS, seed=6) * 5)
    found = controlled(control, x, held)
    assert torch.equal(found[:, :35], patchify_video(image))
    assert not torch.equal(found[:, 35:], x[:, 35:])
    assert controlled(None, x, held) is x


def test_flags_become_factors_of_each_stage(demo_files: Files, tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    flags = ("--adain", "0.2", "--statnorm-steps", "0.5,0.25", "--adain-per-frame")
    assert generate(demo_files, tmp_path / "a", *flags, "--save-job", str(job)) == 0
    first, second = Request.from_json(job.read_text(), "job").stages
    assert first.statistics == Statistics(statnorm_steps=(0.5, 0.25), per_frame=True)
    assert second.statistics == Statistics(adain=0.2, per_frame=True)
    # And the clip is another one than without them.
    assert generate(demo_files, tmp_path / "b") == 0
    made, plain = ((tmp_path / name / "frame_00003.png").read_bytes() for name in ("a", "b"))
    assert made != plain


def test_a_stopped_run_goes_on_to_the_same_bits(demo_files: Files, tmp_path: Path) -> None:
    model, upscaler, encoder = map(str, demo_files)
    settings = Statistics(adain=0.5, adain_steps=(0.3, 0.0), statnorm_steps=(0.1,))
    stages = (
        Stage(scale="1/2", sigmas="linq:2", statistics=Statistics(statnorm=0.2)),
        Stage(sigmas="0.9,0.5,0", upscaler="x2", statistics=settings),
    )
    files = ModelFiles(model, encoder, upscalers=(upscaler,))
    request = Request("x", files, Output("o.mp4"), stages, width=64, height=64, frames=9)
    networks = open_networks(files, "cpu", "float32")
    saved = every_progress(request, networks)
    prompts = encode(request, networks, Clock(Report()))
    for step in saved[:-1]:
        state = b"".join(encode_state(step, saved_conditions(request, networks)))
        (tmp_path / "state").write_bytes(state)
        back = read_state(tmp_path / "state", request, networks)
        *_, last = run_stages(request, networks, prompts, back, Clock(Report()))
        assert torch.equal(last.latents.video, saved[-1].latents.video)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--adain", "x"), "wanted numbers such as 0.2"),
        (("--adain", "11"), "wanted a number from -10 to 10"),
        (("--adain", "0.2", "--stages", "1"), "it begins from noise alone"),
        (("--adain", "0.2,0.2"), "it begins from noise alone"),
        (("--adain-steps", "1", "--adain-steps", "1", "--adain-steps", "1"), "3 times for 2"),
        (("--adain-per-frame",), "without --adain"),
        (("--statnorm-clip",), "say how far with --statnorm"),
        (("--statnorm", "1", "--statnorm-percentile", "20"), "from 50 to 100"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    demo_files: Files,
    tmp_path: Path,
    flags: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate(demo_files, tmp_path / "clip.mp4", *flags) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_factors_are_numbers() -> None:
    with pytest.raises(RequestError, match="adain is nan"):
        Statistics(adain_steps=(0.1, float("nan")))
    assert replace(Statistics(), statnorm=0.1).is_active
