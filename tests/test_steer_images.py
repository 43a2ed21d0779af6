"""What images, guides and references make of a state: layout, positions, masks, timesteps."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from ltxlite import conditioning
from ltxlite.conditioning import LatentState, StageContext
from ltxlite.conditions import Conditions, Guide, Image
from ltxlite.geometry import (
    AudioGrid,
    ClipShape,
    LatentGrid,
    audio_positions,
    unpatchify_video,
    video_positions,
)
from ltxlite.given import GivenReference, StageGiven
from ltxlite.steering import steer
from ltxlite.steering.images import guide_frame, image_frame

FRAMES, FPS, CHANNELS = 121, 24, 5
SHAPE = ClipShape(16, 3, 5, 126, float(FPS))
STAGE = StageContext(0, SHAPE, FRAMES, Fraction(FPS), LatentGrid(), AudioGrid())
PER_FRAME = 15


def latent(value: float, frames: int = 1, rows: int = 3, columns: int = 5) -> Tensor:
    return torch.full((1, CHANNELS, frames, rows, columns), value)


def steered(conditions: Conditions, given: StageGiven, stage: StageContext = STAGE) -> LatentState:
    extent = (SHAPE.frames, SHAPE.rows, SHAPE.columns)
    tokens = torch.zeros(1, SHAPE.video_tokens, CHANNELS)
    video = conditioning.start(tokens, video_positions(extent, SHAPE.fps, STAGE.grid))
    audio = conditioning.start(torch.zeros(1, 126, 8), audio_positions(126, STAGE.audio_grid))
    result, sound = steer((video, audio), conditions, given, stage)
    assert sound is audio, "pictures leave the sound alone"
    return result


def spans(state: LatentState, tokens: slice) -> Tensor:
    """Return the pixel frames (n, 2) at which tokens begin and end."""
    return state.positions[0, 0, tokens] * FPS


def test_without_anything_given_states_are_untouched() -> None:
    state = steered(Conditions(), StageGiven())
    assert state.tokens == state.target == 240
    assert state.groups == ()
    assert state.levels().values.tolist() == [1.0]


def test_an_image_replaces_clean_tokens_of_its_frame_and_nothing_else() -> None:
    images = (Image("a", "0", (0.75,)), Image("b", "last"))
    state = steered(Conditions(images=images), StageGiven(images=(latent(2.0), latent(3.0))))
    assert state.tokens == 240, "no token is added"
    assert torch.equal(state.initial, torch.zeros_like(state.initial))
    frames = state.clean[0, :, 0].reshape(16, PER_FRAME)
    assert frames[:, 0].tolist() == [2.0] + [0.0] * 14 + [3.0]
    masks = state.mask[0, :, 0].reshape(16, PER_FRAME)
    assert masks[:, 7].tolist() == [0.25] + [1.0] * 14 + [0.0]
    # Noise levels of a step at sigma 0.8: mask x sigma.
    assert (state.levels().values * 0.8).tolist() == pytest.approx([0.0, 0.2, 0.8])


def test_where_two_images_meet_the_later_one_wins() -> None:
    images = (Image("a", "0"), Image("b", "0", (0.5,)))
    state = steered(Conditions(images=images), StageGiven(images=(latent(2.0), latent(3.0))))
    assert state.clean[0, 0, 0] == 3.0
    assert state.mask[0, 0, 0] == 0.5


@pytest.mark.parametrize(
    ("at", "expected"), [("0", 0), ("7", 0), ("8", 1), ("9", 1), ("120", 15), ("-1", 15)]
)
def test_images_stand_where_kjs_node_puts_them(at: str, expected: int) -> None:
    # features.md PART D: InplaceKJ idx 120 -> 15, idx 9 -> 1, where the rule of guides gives 2.
    assert image_frame(Image("a", at), STAGE) == expected


@pytest.mark.parametrize(
    ("at", "frame"), [("-1", 120), ("last", 120), ("ref", -8), ("17", 17), ("9", 9), ("0", 0)]
)
def test_guides_stand_at_pixel_frames_and_ref_before_the_first(at: str, frame: int) -> None:
    # features.md PART D: core -1 with 121 frames -> 120 -> latent 15; latent guide -1 -> -8.
    assert guide_frame(Guide("a", at), StageGiven(), STAGE) == frame
    if at != "ref":
        assert STAGE.grid.latent_index(frame) == {120: 15, 17: 3, 9: 2, 0: 0}[frame]


def test_guides_are_appended_one_group_each_and_span_one_frame() -> None:
    guides = tuple(Guide(at, at) for at in ("last", "ref", "0", "9"))
    given = StageGiven(guides=tuple(latent(float(n)) for n in range(4)))
    state = steered(Conditions(guides=guides), given)
    assert state.target == 240
    assert [(group.start, group.stop) for group in state.groups] == [
        (240 + PER_FRAME * n, 255 + PER_FRAME * n) for n in range(4)
    ]
    wanted = ([120, 121], [-8, -7], [0, 1], [9, 10])
    for group, span in zip(state.groups, wanted, strict=True):
        found = spans(state, slice(group.start, group.stop))
        # Frames of seconds in fp32.
        torch.testing.assert_close(found, torch.tensor(span).float().expand(15, 2))
    # The middle of their time is the middle of the frame that they stand for.
    assert conditioning.attention_weights(state) == ()
    assert torch.equal(state.mask[0, 240:, 0], torch.zeros(60))
    assert torch.equal(state.initial[0, 240:], torch.zeros(60, CHANNELS))


def test_the_frame_of_a_guide_at_0_reads_as_the_clips_own_first_frame() -> None:
    state = steered(Conditions(guides=(Guide("a", "0"),)), StageGiven(guides=(latent(1.0),)))
    assert torch.equal(state.positions[:, :, 240:], state.positions[:, :, :15])


def test_a_clip_as_guide_keeps_whole_latent_frames() -> None:
    given = StageGiven(guides=(latent(1.0, 3),))
    state = steered(Conditions(guides=(Guide("a", "8", (0.8,)),)), given)
    begins = spans(state, slice(240, 285)).reshape(3, PER_FRAME, 2)[:, 0]
    # model.md 7.2: latent frames of 8, without the causal rule, from pixel frame 8 on.
    torch.testing.assert_close(begins, torch.tensor([[8.0, 16.0], [16.0, 24.0], [24.0, 32.0]]))
    assert state.mask[0, 240:].unique().tolist() == pytest.approx([0.2])


def test_strengths_go_by_stage() -> None:
    conditions = Conditions(
        images=(Image("a", "0", (0.7, 1.0)),), guides=(Guide("b", "last", (0.5, 0.25)),)
    )
    given = StageGiven(images=(latent(1.0),), guides=(latent(2.0),))
    second = StageContext(1, SHAPE, FRAMES, Fraction(FPS), LatentGrid(), AudioGrid())
    for stage, image, guide in ((STAGE, 0.3, 0.5), (second, 0.0, 0.75)):
        state = steered(conditions, given, stage)
        assert state.mask[0, 0, 0] == pytest.approx(image)
        assert state.mask[0, 240, 0] == pytest.approx(guide)


def test_references_at_half_size_lie_over_the_clips_own_pixels() -> None:
    reference = GivenReference(latent(4.0, 16, 1, 2), 1.0, downscale=2)
    state = steered(Conditions(), StageGiven(references=(reference,)))
    own, theirs = state.positions[:, :, :240], state.positions[:, :, 240:]
    assert theirs.shape[2] == 32
    per_frame = theirs[0, :, :2]
    # features.md F1: intervals [k j 32, k (j + 1) 32) in rows and columns, times as the clip's.
    assert per_frame[1].tolist() == [[0.0, 64.0], [0.0, 64.0]]
    assert per_frame[2].tolist() == [[0.0, 64.0], [64.0, 128.0]]
    assert torch.equal(theirs[0, 0, ::2], own[0, 0, ::15])


def test_groups_with_attention_do_not_see_each_other_and_the_matrix_is_never_built() -> None:
    mask = torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0, 0.0])
    references = (
        GivenReference(latent(1.0, 1, 2, 3), 1.0, weight=mask),
        GivenReference(latent(2.0, 1, 2, 3), 1.0),
    )
    conditions = Conditions(guides=(Guide("a", "last", attention=0.5),))
    state = steered(conditions, StageGiven(guides=(latent(0.5),), references=references))
    rows = conditioning.attention_weights(state)
    # The clip, the guide, three weights of the first reference, the second one.
    assert [item.weights.shape[1] for item in rows] == [1] * 6
    assert [item.stop - item.start for item in rows] == [240, 15, 2, 2, 2, 6]
    dense = conditioning.dense_weights(state)[0]
    assert torch.equal(dense[240:255, :240], torch.full((15, 240), 0.5))
    assert torch.equal(dense[:240, 255:261].unique(), torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(dense, dense.T)
    assert float(dense[255:261, 261:].max()) == float(dense[240:255, 255:].max()) == 0.0


def test_tokens_of_a_mask_move_with_their_positions_and_weights() -> None:
    values = torch.arange(6.0).reshape(1, 1, 1, 2, 3).expand(1, CHANNELS, 1, 2, 3)
    mask = torch.tensor([1.0, 0.0, 0.5, 0.25, 1.0, 0.0])
    reference = GivenReference(values, 1.0, weight=mask)
    state = steered(Conditions(), StageGiven(references=(reference,)))
    (group,) = state.groups
    assert group.weight is not None
    order = state.clean[0, 240:, 0].long()
    plain = video_positions((1, 2, 3), FPS, LatentGrid())
    assert torch.equal(group.weight, mask[order])
    assert torch.equal(state.positions[:, :, 240:], plain[:, :, order])
    assert group.weight.tolist() == sorted(mask.tolist())


def test_only_the_clips_own_tokens_become_its_latent() -> None:
    given = StageGiven(images=(latent(2.0),), guides=(latent(9.0),))
    conditions = Conditions(images=(Image("a"),), guides=(Guide("b", "ref"),))
    state = steered(conditions, given)
    picture = unpatchify_video(state.blend(torch.ones_like(state.clean)), SHAPE)
    assert picture.shape == (1, CHANNELS, 16, 3, 5)
    assert picture.unique().tolist() == [1.0, 2.0], "what was appended is gone"
