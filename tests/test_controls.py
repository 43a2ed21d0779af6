"""IC-LoRA controls end to end: tracks, upscaling, detailing, filling, masked references."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import read_pngs, steady, write_clip
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_editing import Bench, clip, own_frames, own_sound
from torch import Tensor

from ltxlite.account import account
from ltxlite.cli import main
from ltxlite.cli.editing import Existing
from ltxlite.cli.upscale import plan
from ltxlite.conditions import Conditions, Reference, Source
from ltxlite.errors import RequestError
from ltxlite.given.encode import encode_given
from ltxlite.given.reference_pixels import reference_pixels
from ltxlite.given.takes import stage_takes
from ltxlite.media.audio import read_audio
from ltxlite.media.compose import masked_reference, panel_of
from ltxlite.media.edges import canny
from ltxlite.media.fit import Fit
from ltxlite.media.timing import Timing
from ltxlite.media.tracks import draw_tracks, read_tracks
from ltxlite.media.video_reader import read_video
from ltxlite.opening import open_networks
from ltxlite.progress import Clock, Report
from ltxlite.request import Files, Output, Request, Stage
from ltxlite.stage_shapes import stage_shape

GOLDEN = Path(__file__).parent / "golden" / "models"
VIDEO = Fraction(30)
TRACKS = [[{"x": 10, "y": 10}, {"x": 50, "y": 50}], [{"x": 60, "y": 9}]]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    model, upscaler = "tiny-2.3-distilled", "tiny-2.3-spatial-upscaler-x2"
    files = (GOLDEN / f"{model}.safetensors", GOLDEN / f"{upscaler}.safetensors")
    return Bench((*files, GOLDEN / "gemma3_tiny"), tmp_path, capsys)


def lora(folder: Path, **facts: str) -> Path:
    with safe_open(GOLDEN / "tiny-distilled-lora-r4.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, folder / "control.safetensors", facts)
    return folder / "control.safetensors"


def job(bench: Bench, verb: str, *words: str | Path) -> dict:
    """Run a verb; return its job."""
    saved = bench.folder / "job.json"
    bench.run(verb, *words, "--save-job", saved, "-o", bench.folder / "made")
    return json.loads(saved.read_text())


def request_of(bench: Bench, conditions: Conditions, size: tuple[int, int] = (128, 64)) -> Request:
    model, upscaler, encoder = map(str, bench.files)
    return Request(
        prompt="x",
        files=Files(model, encoder, upscalers=(upscaler,)),
        output=Output("o.mp4"),
        stages=(Stage(scale="1/2"), Stage(sigmas="stage2", upscaler="x2")),
        width=size[0],
        height=size[1],
        frames=9,
        fps="30",
        conditions=conditions,
    )


def pixels_of(request: Request, number: int = 0) -> Tensor:
    """Return what the first reference of a stage shows: (F, 3, H, W)."""
    networks = open_networks(request.files, "cpu", "float32")
    shape = stage_shape(request, request.stages[number], networks)
    (item,) = stage_takes(request, networks, number, shape).references
    size = item.take.extent[1] * 32, item.take.extent[2] * 32
    return torch.stack(list(reference_pixels(request, item, size)))


def test_tracks_are_drawn_at_the_clips_size_and_seen_at_the_loras_fraction(bench: Bench) -> None:
    path = bench.folder / "tracks.json"
    path.write_text(json.dumps(TRACKS))
    control = lora(bench.folder, reference_downscale_factor="2")
    size = ("--size", "128x64", "--frames", "9")
    saved = job(bench, "generate", "--tracks", f"{path}:0.9:0.5", "--lora", control, *size)
    (reference,) = saved["conditions"]["references"]
    assert (reference["kind"], reference["path"]) == ("tracks", str(path))
    assert (reference["strength"], reference["attention"]) == (0.9, 0.5)
    assert (saved["width"], saved["height"]) == (128, 128), "32 x 2 x 2 stages"
    assert [stage["loras"] for stage in saved["stages"]] != [[], []]
    drawn = Reference(str(path), kind="tracks", downscale=1)
    found = pixels_of(request_of(bench, Conditions(references=(drawn,))))
    assert found.shape == (9, 3, 32, 64)
    frames = list(draw_tracks(read_tracks(path), range(9), 9, (64, 128)))
    small = torch.nn.functional.interpolate(
        torch.stack(frames).movedim(-1, 1).float(), (32, 64), mode="bilinear"
    )
    torch.testing.assert_close((found + 1) * 127.5, small, rtol=0, atol=1e-3)


def test_an_upscaling_lora_sees_the_clip_beside_noise_alone(bench: Bench) -> None:
    source = clip(bench, 12, VIDEO, (70, 52))
    control = lora(bench.folder, reference_downscale_factor="2")
    saved = job(bench, "upscale", source, "--mode", "iclora", "--lora", control)
    (stage,) = saved["stages"]
    assert (stage["scale"], stage["sampler"], stage["sigmas"]) == ("1", "euler_cfg_pp", "1,0.4,0")
    (reference,) = saved["conditions"]["references"]
    assert (reference["kind"], reference["downscale"]) == ("source", 2)
    assert (saved["width"], saved["height"]) == (192, 128), "multiples of 64 above 140x104"
    assert saved["conditions"]["source"]["audio"] is None, "its sound is frozen"
    made = read_pngs(bench.folder / "made")
    assert made.shape == (12, 104, 140, 3)
    waveform, _ = read_audio(bench.folder / "made" / "audio.wav")
    assert (waveform - own_sound(source, 12 / VIDEO)).abs().max() <= 0.51 / 32768


def test_a_detailer_begins_from_the_clip_and_sees_it(bench: Bench) -> None:
    source = clip(bench, 9, VIDEO, (64, 64), sound=False)
    words = [str(word) for word in bench._words("upscale", (source,))]
    words = words[: words.index("--prompt")]  # neither a prompt nor sigmas
    flags = ("--mode", "detailer", "--times", "1", "--lora", lora(bench.folder))
    saved = bench.folder / "job.json"
    output = ("--save-job", saved, "-o", bench.folder / "made")
    assert main([*words, *map(str, (*flags, *output))]) == 0
    found = json.loads(saved.read_text())
    (stage,) = found["stages"]
    assert (stage["sampler"], stage["sigmas"]) == ("euler", "0.909375,0.725,0.421875,0")
    (reference,) = found["conditions"]["references"]
    assert (reference["kind"], reference["downscale"], found["prompt"]) == ("source", 1, "")
    assert read_pngs(bench.folder / "made").shape == (9, 64, 64, 3)
    assert not (bench.folder / "made" / "audio.wav").exists()


def test_an_enlarged_clip_keeps_its_first_frame_and_can_be_refined_twice(bench: Bench) -> None:
    source = clip(bench, 9, VIDEO, (64, 64))
    saved = job(bench, "upscale", source, "--sigmas", "0.6,0.3,0")
    assert saved["conditions"]["source"]["first"]
    assert saved["conditions"]["source"]["held"] == [1]
    found = [(stage["scale"], stage["upscaler"], stage["sigmas"]) for stage in saved["stages"]]
    # The bench says 1,0.4,0 first.
    assert found[1:] == [("1", "x2", "0.6,0.3,0"), ("1", None, "1,0.4,0")]
    assert read_pngs(bench.folder / "made").shape == (9, 128, 128, 3)


def test_the_first_frame_can_be_freed_and_samplers_be_named() -> None:
    timing = Timing((Fraction(0), Fraction(1)), Fraction(2), VIDEO)
    existing = Existing("x.mp4", timing, VIDEO, 64, 64, False)
    made = plan(existing, (None, ["res_2s", "euler"]), first=False)
    assert not made.source.first
    stages = made.stages((Stage(scale="1/2"), Stage(sigmas="stage2", upscaler="x2")))
    assert [stage.sampler for stage in stages] == ["euler", "res_2s", "euler"]
    assert [stage.upscaler for stage in stages] == [None, "x2", None]


def test_a_source_lies_in_the_same_place_in_every_stage(bench: Bench) -> None:
    path = write_clip(bench.folder / "odd.mp4", steady(9, VIDEO), (101, 57))
    source = Source(str(path), video=(0.0, 0.3), whole=True)
    request = request_of(bench, Conditions(source=source))
    networks = open_networks(request.files, "cpu", "float32")
    given = encode_given(request, networks, Clock(Report()))
    encoder = networks.video_encoder()
    frames = own_frames(path)
    for stage, (rows, columns), size in (
        (given.of(0), (28, 50), (32, 64)),
        (given.of(1), (57, 101), (64, 128)),
    ):
        fit = Fit(57, 101, rows, columns, *size)
        pixels = torch.stack([fit.forth(frame) for frame in frames], dim=1)[None]
        # Rolling and whole encodes sum in other groups.
        torch.testing.assert_close(stage.source.video, encoder(pixels), rtol=1e-3, atol=1e-4)


def test_a_filled_reference_shows_the_clip_with_its_grown_mask_in_green(bench: Bench) -> None:
    path = write_clip(bench.folder / "c.mp4", steady(9, VIDEO), (256, 128))
    mask = np.zeros((128, 256), np.uint8)
    mask[60:70, 100:110] = 255
    Image.fromarray(mask).save(bench.folder / "m.png")
    source = Source(
        str(path), video=(0.0, 0.3), mask=str(bench.folder / "m.png"), whole=True, fill=True
    )
    reference = Reference(str(path), kind="filled", downscale=1)
    conditions = Conditions(source=source, references=(reference,))
    found = pixels_of(request_of(bench, conditions, (256, 128)))
    green = torch.tensor([102, 255, 0]) / 127.5 - 1
    shown = (found == green[:, None, None]).all(1)
    # At half size places 30 to 34 by 50 to 54, and 15 pixels more on each side.
    wanted = torch.zeros(64, 128, dtype=torch.bool)
    wanted[15:50, 35:70] = True
    assert torch.equal(shown, wanted.expand(9, 64, 128))


def test_a_place_is_filled_and_the_rest_of_the_clip_comes_back(bench: Bench) -> None:
    source = clip(bench, 9, VIDEO, (250, 128))
    mask = np.zeros((128, 250), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(bench.folder / "m.png")
    control = lora(bench.folder, reference_downscale_factor="2")
    words = ("--mask", bench.folder / "m.png", "--lora", control)
    saved = job(bench, "inpaint", source, *words)
    first, second = saved["stages"]
    assert (first["scale"], first["upscaler"]) == ("1/2", None)
    assert (second["scale"], second["upscaler"]) == ("1", "pixels")
    assert (second["sigmas"], second["sampler"]) == ("stage2-inpaint", "euler_cfg_pp")
    (reference,) = saved["conditions"]["references"]
    assert (reference["kind"], reference["downscale"], reference["stages"]) == ("filled", 1, [1])
    made, own = read_pngs(bench.folder / "made").int(), own_frames(source).int()
    assert made.shape == own.shape
    # The mask grows by 6/64 of 250 pixels, and passes over coarse levels into the clip.
    assert (made - own)[:, :, :20].abs().float().mean() > 5
    assert (made - own)[:, :, 200:].abs().max() <= 1
    waveform, _ = read_audio(bench.folder / "made" / "audio.wav")
    assert (waveform - own_sound(source, 9 / VIDEO)).abs().max() <= 0.51 / 32768


def test_a_larger_canvas_is_drawn_around_the_clip(bench: Bench) -> None:
    source = clip(bench, 9, VIDEO, (112, 58), sound=False)
    control = lora(bench.folder)
    saved = job(bench, "outpaint", source, "--left", "10", "--bottom", "4", "--lora", control)
    assert saved["conditions"]["source"]["pad"] == [10, 0, 0, 4]
    assert (saved["width"], saved["height"]) == (128, 64), "multiples of 64 above 122x62"
    made, own = read_pngs(bench.folder / "made").float(), own_frames(source).float()
    assert made.shape == (9, 62, 122, 3)
    repeated = own[:, :1, :1]
    kept = (made[:, :58, 10:] - own)[:, :, 56:].abs().mean()
    assert kept < (made[:, :, :10] - repeated).abs().mean() / 2


def test_an_account_knows_the_pixels_between_two_stages(bench: Bench) -> None:
    path = write_clip(bench.folder / "c.mp4", steady(9, VIDEO), (128, 64))
    source = Source(str(path), video=(0.0, 0.3), whole=True, fill=True, mask="m")
    reference = Reference(str(path), kind="filled", downscale=1)
    request = request_of(bench, Conditions(source=source, references=(reference,)))
    second = Stage(sigmas="stage2-inpaint", upscaler="pixels")
    request = replace(request, stages=(request.stages[0], second))
    networks = open_networks(request.files, "cpu", "float32")
    names = [phase.name for phase in account(networks, request)]
    start = names.index("stage 1")
    assert names[start + 1 : start + 3] == ["decode for stage 2", "encode for stage 2"]


def test_a_masked_reference_is_painted_and_has_its_panel(bench: Bench) -> None:
    source = clip(bench, 5, VIDEO, (61, 47), sound=False)
    mask = np.zeros((47, 61), np.uint8)
    mask[10:20, 30:40] = 255
    Image.fromarray(mask).save(bench.folder / "m.png")
    thing = torch.full((10, 40, 3), 77, dtype=torch.uint8)
    Image.fromarray(thing.numpy()).save(bench.folder / "thing.png")
    words = ("--mask", bench.folder / "m.png", "--object", bench.folder / "thing.png")
    output = bench.folder / "drawn"
    arguments = ("control", "masked-ref", source, *words, "--panel", "39", "-o", output)
    assert main(list(map(str, arguments))) == 0
    drawn, own = read_pngs(output), own_frames(source)
    assert drawn.shape == (5, 48, 100, 3)
    kept = torch.from_numpy(mask == 0)
    assert torch.equal(drawn[:, :47, :61][:, kept], own[:, kept])
    assert (drawn[:, 10:20, 30:40] == torch.tensor([255, 0, 255])).all()
    panel = drawn[0, :47, 61:]
    assert (panel[0] == torch.tensor([0, 255, 0])).all()
    # 40x10 becomes 39x10, in the middle of 47 rows.
    assert (panel[18:28] == 77).all()
    assert torch.equal(panel, panel_of(thing, 47, 39))
    left = masked_reference(own[0], torch.from_numpy(mask > 0), panel, at_left=True)
    assert torch.equal(left[:, :39], panel)


def test_edges_and_tracks_are_drawn_as_videos(bench: Bench) -> None:
    source, target = clip(bench, 5, VIDEO, (64, 48), sound=False), bench.folder / "edges"
    assert main(["control", "canny", str(source), "-o", str(target)]) == 0
    assert torch.equal(read_pngs(target), torch.stack([canny(f) for f in own_frames(source)]))
    (bench.folder / "t.json").write_text(json.dumps(TRACKS))
    target = bench.folder / "t.mp4"
    words = ("--size", "96x64", "--frames", "3", "--fps", "24000/1001", "-o", str(target))
    assert main(["control", "tracks", str(bench.folder / "t.json"), *words]) == 0
    drawn = read_video(target)
    assert (drawn.frames.shape, drawn.fps) == ((3, 1080, 1620, 3), Fraction(24000, 1001))


def test_borders_are_cut_off_a_clip(bench: Bench) -> None:
    size = ("--size", "128x64", "--frames", "9", "--stages", "1", "--seed", "3")
    bench.run("generate", *size, "-o", bench.folder / "whole")
    bench.run("generate", *size, "--cut", "2,4,62,0", "-o", bench.folder / "cut")
    whole, cut = read_pngs(bench.folder / "whole"), read_pngs(bench.folder / "cut")
    assert torch.equal(cut, whole[:, 4:, 2:66])


def test_wrong_use_is_answered_in_one_line(bench: Bench) -> None:
    source = clip(bench, 9, VIDEO, (64, 64), sound=False)
    control = lora(bench.folder, reference_downscale_factor="2")
    text = bench.folder / "tracks.json"
    text.write_text("[]")
    Image.new("L", (32, 32)).save(bench.folder / "m.png")
    output = ("-o", bench.folder / "made")
    small = ("--size", "64x64", "--frames", "9", *output)
    cases = (
        (("generate", "--tracks", text, *small), "wanted tracks as"),
        (("generate", "--tracks", bench.folder / "none.json", *small), "no such file"),
        (("generate", "--cut", "1,2", *small), "wanted pixels left, top"),
        (("generate", "--cut", "1,0,0,0", *small), "wanted even numbers"),
        (("generate", "--cut", "32,0,32,0", *small), "leaves nothing"),
        (("generate", "--init-video", source, "--cut", "2,0,0,0", *small), "neither with a source"),
        (("upscale", source, "--mode", "iclora", *output), "needs its IC-LoRA"),
        (("upscale", source, "--mode", "detailer", *output), "needs its IC-LoRA"),
        (
            ("upscale", source, "--mode", "iclora", "--times", "4", "--lora", control, *output),
            "the LoRA enlarges 2 times",
        ),
        (("upscale", source, "--times", "2", *output), "goes with --mode iclora"),
        (("inpaint", source, "--lora", control, *output), "say with --mask"),
        (("inpaint", source, "--mask", bench.folder / "m.png", *output), "needs its LoRA"),
        (
            ("inpaint", source, "--mask", bench.folder / "m.png", "--lora", control, *output),
            "wanted the same size",
        ),
        (("outpaint", source, "--lora", control, *output), "say how many pixels"),
        (("outpaint", source, "--left", "-4", "--lora", control, *output), "wanted pixels from 0"),
    )
    for words, said in cases:
        assert said in bench.refused(words[0], *words[1:]), words


def test_control_answers_in_one_line(bench: Bench) -> None:
    source = clip(bench, 5, VIDEO, (64, 64), sound=False)
    Image.new("L", (32, 32)).save(bench.folder / "m.png")
    masked = ("masked-ref", source, "--object", bench.folder / "m.png")
    cases = (
        (("masked-ref", source), "give the place with --mask"),
        ((*masked, "--mask", bench.folder / "m.png"), "wanted the same size"),
        (("tracks", source, "--size", "64"), "wanted such as 1280x768"),
        (("tracks", source), "tracks"),
        (("canny", bench.folder / "none.mp4"), "no such file"),
    )
    for words, said in cases:
        assert main(["control", *map(str, words), "-o", str(bench.folder / "o.mp4")]) == 1
        assert said in bench.capture.readouterr().err.strip().splitlines()[-1], words
    assert main(["control", "canny", str(source), "-o", str(source)]) == 1
    assert "written over its source" in bench.capture.readouterr().err


def test_records_of_the_source_are_checked_on_reading() -> None:
    for make, said in (
        (lambda: Source("x", fill=True, mask="m"), "the whole clip delivered"),
        (lambda: Source("x", fill=True, whole=True), "needs a mask or a pad"),
        (lambda: Source("x", pad=(8, 0, 0, 0)), "pad goes with fill"),
        (lambda: Source("x", whole=True, fill=True, pad=(-1, 0, 0, 0)), "wanted pixels"),
        (lambda: Conditions(references=(Reference("a", kind="source"),)), "source's own file"),
        (
            lambda: Conditions(
                references=(Reference("x", kind="filled"),), source=Source("x", denoise=1.0)
            ),
            "fills nothing",
        ),
    ):
        with pytest.raises(RequestError, match=said):
            make()
