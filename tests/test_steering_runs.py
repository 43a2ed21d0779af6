"""Whole jobs steered by pictures, from real files to an mp4 that is read back."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from clip_files import write_clip
from safetensors import safe_open
from safetensors.torch import save_file

from ltxlite import conditioning
from ltxlite.account import job_of
from ltxlite.cli import main
from ltxlite.conditions import Conditions, Guide, Image, Reference
from ltxlite.denoise import Denoiser, Prompt, Stream
from ltxlite.errors import RequestError
from ltxlite.geometry import audio_positions, video_positions
from ltxlite.given.encode import encode_given
from ltxlite.media.container import read_metadata
from ltxlite.media.video_reader import read_video
from ltxlite.memory.budget import Budget
from ltxlite.models.passes import RowWeights
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.pipeline import JOB_TAG, Means, encode, make_plan, run_stages
from ltxlite.progress import Clock, Report
from ltxlite.request import Files, Output, Request, Stage
from ltxlite.sampling.settings import Guidance
from ltxlite.saved_state import conditions, encode_state, read_state
from ltxlite.stages import Progress, beginning

GOLDEN = Path(__file__).parent / "golden" / "models"
DemoFiles = tuple[Path, Path, Path]
STAGES = (Stage(scale="1/2", sigmas="linq:2"), Stage(sigmas="0.9,0.5,0", upscaler="x2"))


def photograph(path: Path, height: int, width: int, orientation: int = 1) -> Path:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, rows ^ columns], axis=-1)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(path, exif=exif)
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    photograph(folder / "odd.png", 47, 83)
    photograph(folder / "phone.jpg", 60, 90, orientation=6)
    write_clip(folder / "film.mp4", [n * Fraction(1001, 24000) for n in range(9)], (81, 47))
    write_clip(folder / "fast.mp4", [n / Fraction(30) for n in range(21)], (80, 48))
    return folder


def everything(media: Path) -> Conditions:
    return Conditions(
        images=(
            Image(str(media / "phone.jpg"), "0", (0.7, 1.0)),
            Image(str(media / "odd.png"), "50%"),
        ),
        guides=(
            Guide(str(media / "film.mp4"), "8", (0.9,), 0.5),
            Guide(str(media / "odd.png"), "ref"),
            Guide(str(media / "phone.jpg"), "last"),
        ),
        references=(
            Reference(str(media / "fast.mp4"), downscale=2),
            Reference(
                str(media / "odd.png"), 1.0, 0.25, str(media / "odd.png"), 1, 2, (1, 2), "canny"
            ),
        ),
    )


def request_of(demo_files: DemoFiles, media: Path, output: Path) -> Request:
    model, upscaler, encoder = map(str, demo_files)
    return Request(
        prompt="rain",
        files=Files(model, encoder, upscalers=(upscaler,)),
        output=Output(str(output)),
        stages=STAGES,
        width=256,
        height=128,
        frames=17,
        conditions=everything(media),
    )


def networks_of(request: Request) -> Networks:
    return open_networks(request.files, "cpu", "float32")


def every_progress(request: Request, networks: Networks) -> list[Progress]:
    prompts = encode(request, networks, Clock(Report()))
    saved: list[Progress] = []
    begun = beginning(request, networks)
    for _ in run_stages(request, networks, prompts, begun, Clock(Report()), saved.append):
        pass
    return saved


def test_everything_at_once_becomes_a_clip_of_the_right_length(
    demo_files: DemoFiles, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, upscaler, encoder = demo_files
    target, again = tmp_path / "clip.mp4", tmp_path / "again.mp4"
    done = main(
        [
            *("generate", "--model", str(model), "--upscaler", str(upscaler)),
            *("--text-encoder", str(encoder), "--prompt", "rain", "--size", "128x64"),
            *("--frames", "17", "--fps", "24000/1001", "-o", str(target), "--quiet"),
            *("--image", f"{media / 'phone.jpg'}@0:0.7,1", "--guide", f"{media / 'odd.png'}@ref"),
            *("--guide", f"{media / 'film.mp4'}@8:1:0.5", "--image", f"{media / 'odd.png'}@last"),
            *("--reference", f"{media / 'fast.mp4'}:1:0.5", "--reference-mask"),
            *(str(media / "fast.mp4"), "--reference-downscale", "2", "--json"),
        ]
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (done, told["frames"]) == (0, 17)
    clip = read_video(target)
    # A reference at half size in a first stage of half size: sides are multiples of 128.
    assert clip.frames.shape == (17, 128, 128, 3), "what was appended is in the clip"
    assert clip.fps == Fraction(24000, 1001)
    assert clip.waveform is not None
    job = Request.from_json(read_metadata(target)[JOB_TAG], "clip")
    assert job.conditions.images[0] == Image(str(media / "phone.jpg"), "0", (0.7, 1.0))
    assert main(["generate", "--job", str(target), "-o", str(again), "--quiet"]) == 0
    assert torch.equal(read_video(again).frames, clip.frames)


def test_an_ic_lora_gives_its_factor_and_rests_where_no_reference_is_seen(
    media: Path, tmp_path: Path
) -> None:
    lora, job = tmp_path / "control.safetensors", tmp_path / "job.json"
    with safe_open(GOLDEN / "tiny-distilled-lora-r4.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, lora, {"reference_downscale_factor": "2"})
    arguments = [
        *("generate", "--model", str(GOLDEN / "tiny-2.3-distilled.safetensors")),
        *("--upscaler", str(GOLDEN / "tiny-2.3-spatial-upscaler-x2.safetensors")),
        *("--text-encoder", str(GOLDEN / "gemma3_tiny"), "--prompt", "rain", "--size", "128x64"),
        *("--frames", "9", "-o", str(tmp_path / "clip.mp4"), "--quiet", "--save-job", str(job)),
        *("--reference", f"canny:{media / 'fast.mp4'}"),
    ]
    for text, strengths in ((str(lora), [1.0, 0.0]), (f"{lora}:0.5", [0.5, 0.5])):
        assert main([*arguments, "--lora", text]) == 0
        request = Request.from_json(job.read_text(), "job")
        assert (request.width, request.height) == (128, 128), "both stages hold the reference"
        found = [stage.lora_strength(0).at("transformer_blocks.0.x") for stage in request.stages]
        assert found == strengths


def test_images_of_strength_1_are_the_clips_own_latents_in_the_end(
    demo_files: DemoFiles, media: Path, tmp_path: Path
) -> None:
    request = request_of(demo_files, media, tmp_path / "clip.mp4")
    networks = networks_of(request)
    given = encode_given(request, networks, Clock(Report()))
    final = every_progress(request, networks)[-1].latents
    assert final.video.shape[2:] == (3, 4, 8)
    for image, frame in zip(given.of(1).images, (0, 1), strict=True):
        assert torch.equal(final.video[:, :, frame], image[:, :, 0])


def test_a_plan_for_a_card_changes_nothing_but_where_blocks_are(
    demo_files: DemoFiles, media: Path, tmp_path: Path
) -> None:
    request = request_of(demo_files, media, tmp_path / "clip.mp4")
    networks = networks_of(request)
    plain = every_progress(request, networks)[-1].latents
    planned = networks_of(request)
    means = Means(Budget(vram=64 << 20, ram=1 << 30, reserve=0))
    make_plan(request, planned, means, Clock(Report()))
    streamed = every_progress(request, planned)[-1].latents
    planned.close()
    # Chunks sum in another order; eleven steps of a random network amplify it.
    torch.testing.assert_close(streamed.video, plain.video, rtol=1e-3, atol=1e-3)


def test_the_planner_knows_every_token_and_what_is_encoded(
    demo_files: DemoFiles, media: Path, tmp_path: Path
) -> None:
    request = request_of(demo_files, media, tmp_path / "clip.mp4")
    networks = networks_of(request)
    first, second = job_of(request, networks).stages
    assert first.appended == ((2, 2, 4), (1, 2, 4), (1, 2, 4), (3, 1, 2), (2, 2, 4))
    assert second.appended == ((2, 4, 8), (1, 4, 8), (1, 4, 8), (2, 4, 8))
    assert first.weighted and second.weighted
    assert set(first.encodes) == {(1, 2, 4), (2, 2, 4), (3, 1, 2)}
    saved = every_progress(request, networks)
    sampled = [step.position.carry["x"][0].shape[1] for step in saved if step.done]
    assert sampled == [first.tokens] * 2 + [second.tokens] * 2
    # 0.7, 0.9 and 1 in the first stage, 0.9 and 1 in the second; and what is free.
    assert (first.strengths, second.strengths) == (3, 2)


def test_a_stopped_run_goes_on_with_its_appended_tokens(
    demo_files: DemoFiles, media: Path, tmp_path: Path
) -> None:
    stages = (replace(STAGES[0], video=Guidance(cfg=2.0, skip_step=2)), STAGES[1])
    request = replace(request_of(demo_files, media, tmp_path / "clip.mp4"), stages=stages)
    networks = networks_of(request)
    path = tmp_path / "state"
    saved = every_progress(request, networks)
    prompts = encode(request, networks, Clock(Report()))
    for step in saved[:-1]:
        path.write_bytes(b"".join(encode_state(step, conditions(request, networks))))
        back = read_state(path, request, networks)
        *_, last = run_stages(request, networks, prompts, back, Clock(Report()))
        assert torch.equal(last.latents.video, saved[-1].latents.video)


def test_a_changed_picture_starts_a_run_anew(
    demo_files: DemoFiles, media: Path, tmp_path: Path
) -> None:
    picture = photograph(tmp_path / "own.png", 40, 50)
    request = request_of(demo_files, media, tmp_path / "clip.mp4")
    request = replace(request, conditions=Conditions(images=(Image(str(picture)),)))
    networks, path = networks_of(request), tmp_path / "state"
    step = every_progress(request, networks)[0]
    path.write_bytes(b"".join(encode_state(step, conditions(request, networks))))
    assert read_state(path, request, networks).done == 1
    photograph(picture, 42, 50)
    with pytest.raises(RequestError, match="other media files"):
        read_state(path, request, networks)


def test_weights_row_by_row_equal_the_whole_matrix(demo_files: DemoFiles) -> None:
    networks = open_networks(Files(*map(str, (demo_files[0], demo_files[2]))), "cpu", "float32")
    transformer = networks.transformer()
    config, grid = transformer.config, networks.latent_grid()
    generator = torch.Generator().manual_seed(3)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    channels = config.video.channels
    video = conditioning.start(noise(1, 30, channels), video_positions((2, 3, 5), 24.0, grid))
    for count, weight in ((4, None), (6, torch.rand(6, generator=generator)), (3, torch.zeros(3))):
        positions = video_positions((1, 1, count), 24.0, grid)
        latent = noise(1, channels, 1, 1, count)
        video = conditioning.append(video, latent, positions, 0.8, weight)
    sound = audio_positions(5, networks.audio_grid())
    audio = conditioning.start(noise(1, 5, config.audio.channels), sound)
    widths = (config.caption_channels or stream.context for stream in (config.video, config.audio))
    prompts = [Prompt(noise(1, 7, width)) for width in widths]
    streams = [
        Stream(state, prompt, Guidance())
        for state, prompt in zip((video, audio), prompts, strict=True)
    ]
    state = tuple(item.state.noised(noise(*item.state.initial.shape), 0.9) for item in streams)
    by_rows = Denoiser(transformer, *streams)
    whole = Denoiser(transformer, *streams)
    dense = conditioning.dense_weights(video)
    whole._streams[0].weights = (RowWeights(0, video.tokens, dense),)
    assert len(by_rows._streams[0].weights) == 1 + 1 + 6 + 1
    plain = Denoiser(transformer, *streams)
    plain._streams[0].weights = ()
    found, wanted, free = (each(state, 0.9).x0[0] for each in (by_rows, whole, plain))
    # The bound; softmax sums the same numbers, in matrices of another height.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (wanted - free).abs().max() > 1e-3, "weights make a difference"
