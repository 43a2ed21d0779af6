"""Guides where ComfyUI's nodes put them: videos that snap, images behind references, twice one."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clip_files import write_clip
from test_given_pictures import DemoFiles, files_of, photograph, request_of
from test_steer_images import latent, spans, steered

from ltxlite import conditioning
from ltxlite.conditions import Conditions, Guide, Reference
from ltxlite.errors import RequestError
from ltxlite.given import GivenReference, StageGiven
from ltxlite.given.encode import encode_given
from ltxlite.given.takes import stage_takes
from ltxlite.media.image import fit_cover
from ltxlite.media.video_reader import read_video
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.progress import Clock, Report
from ltxlite.request import Request
from ltxlite.stage_shapes import stage_shape


@pytest.fixture(scope="module")
def networks(demo_files: DemoFiles) -> Networks:
    return open_networks(files_of(demo_files), "cpu", "float32")


def film(path: Path, frames: int) -> str:
    return str(write_clip(path, [n / Fraction(24) for n in range(frames)], (80, 48)))


def takes(request: Request, networks: Networks):  # type: ignore[no-untyped-def]
    shape = stage_shape(request, request.stages[0], networks)
    return stage_takes(request, networks, 0, shape)


@pytest.mark.parametrize(
    ("frames", "at", "chosen", "kept"),
    [
        (9, "1", (0, *range(8)), 1),  # one latent frame of eight, not of nine
        (16, "1", (0, *range(16)), 2),
        (15, "5", (0, *range(8)), 1),
        (9, "0", tuple(range(9)), 2),  # at the clip's beginning nothing is to be done
        (8, "5", (0,), 1),  # too short for a clip: its first frame, a still
    ],
)
def test_a_video_is_encoded_behind_its_first_frame(
    demo_files: DemoFiles,
    networks: Networks,
    tmp_path: Path,
    frames: int,
    at: str,
    chosen: tuple[int, ...],
    kept: int,
) -> None:
    guide = Guide(film(tmp_path / "film.mp4", frames), at, comfy=True)
    found = takes(request_of(demo_files, Conditions(guides=(guide,))), networks)
    (take,) = found.guides
    assert take.chosen == chosen
    assert take.kept[0] == kept
    assert found.tokens == kept * take.extent[1] * take.extent[2]


def test_its_latents_are_those_behind_the_first(
    demo_files: DemoFiles, networks: Networks, tmp_path: Path
) -> None:
    path = film(tmp_path / "film.mp4", 9)
    request = request_of(demo_files, Conditions(guides=(Guide(path, "5", comfy=True),)))
    (found,) = encode_given(request, networks, Clock(Report())).of(0).guides
    frames = read_video(Path(path)).frames
    pixels = torch.stack([fit_cover(frames[n], 64, 128) for n in (0, *range(8))], dim=1)[None]
    # The same arithmetic; only the sizes of groups may round.
    torch.testing.assert_close(found, networks.video_encoder()(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("at", "latents", "begin"),
    [("20", 3, 17), ("17", 3, 17), ("9", 3, 9), ("20", 2, 20), ("0", 2, 0)],
)
def test_videos_snap_to_a_latent_frame(at: str, latents: int, begin: int) -> None:
    # ((i - 1) // 8) 8 + 1 where what is left has more than one latent frame: features.md E4.
    guide = Guide("a", at, comfy=True)
    state = steered(Conditions(guides=(guide,)), StageGiven(guides=(latent(1.0, latents),)))
    left = latents - (at != "0")
    assert state.tokens == 240 + 15 * left
    found = spans(state, slice(240, None)).reshape(left, 15, 2)[:, 0]
    wanted = [[begin + 8 * n, begin + 8 * n + 8] for n in range(left)]
    if at == "0":
        wanted = [[0, 1], [1, 9]]  # as the clip's own
    torch.testing.assert_close(found, torch.tensor(wanted).float())
    assert torch.equal(state.clean[:, 240:], torch.ones_like(state.clean[:, 240:]))


def test_stills_are_where_they_are_without() -> None:
    given = StageGiven(guides=(latent(1.0),))
    plain, comfy = (
        steered(Conditions(guides=(Guide("a", "20", comfy=comfy),)), given)
        for comfy in (False, True)
    )
    assert torch.equal(plain.positions, comfy.positions)


def test_images_behind_references_come_before_them_in_the_sequence() -> None:
    # features.md E9: [clip | images | reference]; images at the reference's length, eight frames.
    guides = (Guide("a", "after"), Guide("b", "after"))
    given = StageGiven(
        guides=(latent(1.0), latent(2.0)), references=(GivenReference(latent(3.0, 4), 1.0),)
    )
    conditions = Conditions(guides=guides, references=(Reference("c"),))
    state = steered(conditions, given)
    assert [(g.start, g.stop) for g in state.groups] == [(240, 255), (255, 270), (270, 330)]
    for tokens in (slice(240, 255), slice(255, 270)):
        wanted = torch.tensor([25.0, 33.0]).expand(15, 2)  # 4 latent frames are 25
        torch.testing.assert_close(spans(state, tokens), wanted)
    assert state.mask[:, 240:].max() == 0
    assert conditioning.attention_weights(state) == (), "all see all"
    alone = steered(conditions, StageGiven(guides=given.guides))
    torch.testing.assert_close(spans(alone, slice(240, 241)), torch.tensor([[121.0, 129.0]]))


def test_the_same_image_twice_is_two_guides_and_more_than_1_is_seen_more() -> None:
    guides = (Guide("a", "8", attention=2.5), Guide("a", "8", attention=2.5))
    state = steered(Conditions(guides=guides), StageGiven(guides=(latent(1.0), latent(1.0))))
    assert len(state.groups) == 2
    assert torch.equal(state.clean[:, 240:255], state.clean[:, 255:270])
    assert torch.equal(state.positions[:, :, 240:255], state.positions[:, :, 255:270])
    dense = conditioning.dense_weights(state)[0]
    assert dense[0, 240:].unique().tolist() == [2.5]
    assert dense[240, :240].unique().tolist() == [2.5]
    assert dense[240, 240:255].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("at", "frames", "references", "words"),
    [
        ("after", 9, True, "behind references there is room for a still"),
        ("after", 1, False, "after which reference"),
        ("5", 25, False, "its 24 frames run past the end"),
    ],
)
def test_what_does_not_fit_is_refused(
    demo_files: DemoFiles,
    networks: Networks,
    tmp_path: Path,
    at: str,
    frames: int,
    references: bool,
    words: str,
) -> None:
    still = str(photograph(tmp_path / "a.png"))
    path = film(tmp_path / "film.mp4", frames) if frames > 1 else still
    seen = (Reference(still),) if references else ()
    conditions = Conditions(guides=(Guide(path, at, comfy=True),), references=seen)
    with pytest.raises(RequestError, match=words):
        takes(request_of(demo_files, conditions), networks)
