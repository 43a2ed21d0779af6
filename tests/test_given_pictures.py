"""Pictures that are given: what of a file is taken, how it is encoded, what is refused."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from clip_files import write_clip
from safetensors.torch import save_file
from torch.nn import functional as F

from ltxlite.conditions import Conditions, Guide, Image, Reference
from ltxlite.errors import LtxliteError
from ltxlite.geometry import LatentGrid
from ltxlite.given.encode import check_given, encode_given
from ltxlite.given.footage import open_footage
from ltxlite.given.pictures import grouped, mask_weights
from ltxlite.given.takes import sparse_frames, stage_takes
from ltxlite.media.edges import canny
from ltxlite.media.image import fit_cover, load_image
from ltxlite.media.recompress import recompress
from ltxlite.media.video_reader import read_video
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.progress import Clock, Report
from ltxlite.request import Files, Output, Request, Stage
from ltxlite.stage_shapes import stage_shape

DemoFiles = tuple[Path, Path, Path]
STAGES = (Stage(scale="1/2"), Stage(sigmas="stage2", upscaler="x2"))


@pytest.fixture(scope="module")
def networks(demo_files: DemoFiles) -> Networks:
    return open_networks(files_of(demo_files), "cpu", "float32")


def files_of(demo_files: DemoFiles, *loras: Path) -> Files:
    model, upscaler, encoder = map(str, demo_files)
    return Files(model, encoder, upscalers=(upscaler,), loras=tuple(map(str, loras)))


def request_of(demo_files: DemoFiles, conditions: Conditions, *loras: Path) -> Request:
    return Request(
        prompt="x",
        files=files_of(demo_files, *loras),
        output=Output("o.mp4"),
        stages=STAGES,
        width=256,
        height=128,
        frames=17,
        conditions=conditions,
    )


def photograph(path: Path, height: int = 47, width: int = 83, **options: object) -> Path:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, rows ^ columns], axis=-1)
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return path


def clip(path: Path, frames: int, fps: Fraction = Fraction(24), height: int = 48) -> Path:
    return write_clip(path, [number / fps for number in range(frames)], (80, height))


def test_a_still_is_compressed_and_encoded_at_each_stages_size(
    demo_files: DemoFiles, networks: Networks, tmp_path: Path
) -> None:
    path = photograph(tmp_path / "odd.png")
    images = (Image(str(path)), Image(str(path), "last", crf=0))
    given = encode_given(request_of(demo_files, Conditions(images)), networks, Clock(Report()))
    encoder, still = networks.video_encoder(), load_image(path)
    for stage, size in zip(given.stages, ((64, 128), (128, 256)), strict=True):
        # 33 is what 2.3 was trained with; the same arithmetic, so only group sizes may round.
        for latent, crf in zip(stage.images, (33, 0), strict=True):
            wanted = encoder(fit_cover(recompress(still, crf), *size)[None, :, None])
            assert latent.shape == (1, wanted.shape[1], 1, size[0] // 32, size[1] // 32)
            torch.testing.assert_close(latent, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.equal(*stage.images)


def test_a_photograph_is_turned_as_its_camera_says(
    demo_files: DemoFiles, networks: Networks, tmp_path: Path
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = photograph(tmp_path / "phone.jpg", exif=exif, quality=95)
    plain = tmp_path / "plain.png"
    PIL.Image.fromarray(load_image(turned).numpy()).save(plain)
    footage = open_footage(str(turned), Fraction(24))
    assert (footage.height, footage.width, footage.is_still) == (83, 47, True)
    pair = Conditions((Image(str(turned)), Image(str(plain))))
    stage = encode_given(request_of(demo_files, pair), networks, Clock(Report())).of(0)
    assert torch.equal(*stage.images)


def test_a_clip_is_encoded_as_a_whole_at_the_jobs_rate(
    demo_files: DemoFiles, networks: Networks, tmp_path: Path
) -> None:
    # 12 frames at 30 fps last as long as 10 at 24, of which 9 make whole latent frames.
    path = clip(tmp_path / "c.mp4", 12, Fraction(30))
    request = request_of(demo_files, Conditions(guides=(Guide(str(path), "8"),)))
    (latent,) = encode_given(request, networks, Clock(Report())).of(0).guides
    frames = read_video(path).frames
    picked = [0, 1, 2, 4, 5, 6, 7, 9, 10]  # nearest in time; of two the earlier
    pixels = torch.stack([fit_cover(frames[n], 64, 128) for n in picked], dim=1)[None]
    # Rolling and whole encodes sum in other groups.
    torch.testing.assert_close(latent, networks.video_encoder()(pixels), rtol=1e-3, atol=1e-4)
    assert latent.shape[2] == 2


def test_references_take_their_factors_from_the_lora(
    demo_files: DemoFiles, networks: Networks, tmp_path: Path
) -> None:
    lora = tmp_path / "control.safetensors"
    plain = tmp_path / "style.safetensors"
    tensors = {
        "diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1, 4),
        "diffusion_model.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(4, 1),
    }
    facts = {"reference_downscale_factor": "2", "reference_temporal_scale_factor": "2"}
    save_file(tensors, lora, facts)
    save_file(tensors, plain)
    path = clip(tmp_path / "c.mp4", 17)
    references = (Reference(str(path)), Reference(str(path), downscale=1, temporal=1))
    request = request_of(demo_files, Conditions(references=references), lora, plain)
    first, second = (
        stage_takes(request, networks, number, stage_shape(request, stage, networks))
        for number, stage in enumerate(request.stages)
    )
    assert [item.take.extent for item in first.references] == [(2, 1, 2), (3, 2, 4)]
    assert first.references[0].take.chosen == (0, 1, 3, 5, 7, 9, 11, 13, 15)
    assert first.tokens == 4 + 24
    assert second.references == (), "IC-LoRA references are seen by stage 1 only"


def test_sparse_references_keep_the_first_frame_and_whole_latents() -> None:
    grid = LatentGrid()
    assert sparse_frames(17, 1, grid) == tuple(range(17))
    assert sparse_frames(121, 2, grid)[:3] == (0, 1, 3)
    assert len(sparse_frames(121, 2, grid)) == 57  # 61 cut to 8n + 1
    assert sparse_frames(5, 3, grid) == (0,)


def test_a_still_serves_a_whole_reference_and_edges_are_drawn_at_the_clips_size(
    demo_files: DemoFiles, networks: Networks, tmp_path: Path
) -> None:
    path = photograph(tmp_path / "sheet.png", 64, 128)
    references = (Reference(str(path), 0.9, 0.5, downscale=2, kind="canny"),)
    request = request_of(demo_files, Conditions(references=references))
    (given,) = encode_given(request, networks, Clock(Report())).of(0).references
    lines = canny(load_image(path)).movedim(-1, 0).float() / 127.5 - 1
    frame = F.avg_pool2d(lines, 2)[:, None].expand(3, 17, 32, 64)
    wanted = networks.video_encoder()(frame[None])
    torch.testing.assert_close(given.latent, wanted, rtol=1e-3, atol=1e-4)
    assert given.weight is not None
    assert (given.strength, given.downscale, given.weight.unique().tolist()) == (0.9, 2, [0.5])


def test_a_mask_weighs_tokens_by_their_share_of_white(
    demo_files: DemoFiles, networks: Networks, tmp_path: Path
) -> None:
    path, mask = photograph(tmp_path / "r.png", 64, 128), tmp_path / "m.png"
    half = np.zeros((64, 128, 3), np.uint8)
    half[:, 48:] = 255  # the left token half white, the right one wholly
    PIL.Image.fromarray(half[:, :64].repeat(2, 1) * 0 + half).save(mask)
    reference = Reference(str(path), attention=0.5, attention_mask=str(mask), downscale=2)
    request = request_of(demo_files, Conditions(references=(reference,)))
    (given,) = encode_given(request, networks, Clock(Report())).of(0).references
    assert given.weight is not None
    # Of 32 columns at half size 24 are black; bilinear scaling mixes two of them.
    assert given.weight.reshape(3, 1, 2)[1, 0].tolist() == pytest.approx([0.125, 0.5], abs=0.01)


def test_masks_average_the_first_frame_alone_and_then_each_eight() -> None:
    frames = [torch.full((32, 64), float(number)) for number in range(17)]
    weights = mask_weights([frame / 16 for frame in frames], LatentGrid())
    wanted = torch.tensor([0.0, 4.5, 12.5]) / 16
    torch.testing.assert_close(
        weights, wanted.repeat_interleave(2), rtol=0, atol=1 / 128
    )  # rounded to 64ths


def test_frames_are_joined_to_groups_of_bounded_size() -> None:
    frames = [torch.full((3, 2, 5), float(number)) for number in range(7)]
    groups = list(grouped(iter(frames), 3 * frames[0].nbytes))
    assert [group.shape[2] for group in groups] == [3, 3, 1]
    assert torch.cat(groups, dim=2)[0, 0, :, 0, 0].tolist() == list(range(7))
    assert [group.shape[2] for group in grouped(iter(frames[:2]), 1)] == [1, 1]


def test_canny_finds_a_squares_outline_once_and_nothing_in_flat_places() -> None:
    frame = torch.full((41, 53, 3), 40, dtype=torch.uint8)
    frame[10:30, 12:40] = 200
    edges = canny(frame)[..., 0] > 0
    outline = torch.zeros(41, 53, dtype=torch.bool)
    outline[9:31, 11:41] = True
    outline[11:29, 13:39] = False
    assert not (edges & ~outline).any(), "edges lie on the border, one pixel in or out"
    columns = edges[12:28].sum(1)
    assert columns.tolist() == [2] * 16, "each side is drawn once"
    assert not canny(torch.full((9, 11, 3), 77, dtype=torch.uint8)).any()


def test_canny_keeps_weak_edges_only_where_they_touch_strong_ones() -> None:
    frame = torch.full((40, 60, 3), 100, dtype=torch.uint8)
    frame[:, 20:] = 130  # 4 x 30 = 120: between the thresholds
    assert not canny(frame).any()
    frame[:8, 20:] = 200  # the same line, strong at its upper end
    assert canny(frame)[39, :, 0].any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: Conditions((Image(f"{d}/p.png", "17"),)), "outside the clip"),
        (lambda d: Conditions((Image(f"{d}/none.png"),)), "no such file"),
        (lambda d: Conditions((Image(f"{d}/p.png@soon"),)), "behind @"),
        (lambda d: Conditions((Image(f"{d}/text.txt"),)), "no picture that can be read"),
        (lambda d: Conditions((Image(f"{d}/text.png"),)), "no picture that Pillow knows"),
        (lambda d: Conditions((Image(f"{d}/long.mp4", "1"),)), "at most 17 fit"),
        (lambda d: Conditions(guides=(Guide(f"{d}/long.mp4"),)), "run past the end of the clip"),
        (lambda d: Conditions(guides=(Guide(f"{d}/c.mp4", "9"),)), "at most 1 fit"),
        (lambda d: Conditions(guides=(Guide(f"{d}/c.mp4", "ref"),)), "room for a still"),
        (
            lambda d: Conditions(references=(Reference(f"{d}/c.mp4", downscale=4),)),
            "choose multiples of 128",
        ),
        (
            lambda d: Conditions(
                references=(Reference(f"{d}/c.mp4", attention_mask=f"{d}/p.png"),)
            ),
            "wanted the same size",
        ),
        (
            lambda d: Conditions(
                references=(Reference(f"{d}/c.mp4", attention_mask=f"{d}/short.mp4"),)
            ),
            "has 2 frames",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    demo_files: DemoFiles, networks: Networks, media: Path, make: object, words: str
) -> None:
    assert callable(make)
    request = request_of(demo_files, make(media))
    loaded = len(networks.loaded)
    with pytest.raises(LtxliteError, match=words) as caught:
        check_given(request, networks)
    assert "\n" not in str(caught.value)
    assert len(networks.loaded) == loaded


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    photograph(folder / "p.png")
    clip(folder / "c.mp4", 9)
    clip(folder / "short.mp4", 2)
    clip(folder / "long.mp4", 25)
    (folder / "text.txt").write_text("not a picture at all " * 9)
    (folder / "text.png").write_text("not a picture at all " * 9)
    return folder


def test_lora_files_that_disagree_are_refused(
    demo_files: DemoFiles, networks: Networks, tmp_path: Path, media: Path
) -> None:
    tensors = {
        "diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1, 4),
        "diffusion_model.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(4, 1),
    }
    paths = tmp_path / "a-ref0.5.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, paths[0])
    save_file(tensors, paths[1], {"reference_downscale_factor": "1"})
    conditions = Conditions(references=(Reference(str(media / "c.mp4")),))
    with pytest.raises(LtxliteError, match=r"different downscale factors: a-ref0\.5"):
        check_given(request_of(demo_files, conditions, *paths), networks)
    chosen = Conditions(references=(replace(conditions.references[0], downscale=2),))
    check_given(request_of(demo_files, chosen, *paths), networks)
