"""Every combination of what steers a clip, as one stage sees it: layout, positions, masks, levels.

The clip of features.md PART D: 121 frames, 16 latent frames, here of 3 x 5 places; 126 audio
latents at 24 fps, 121 at 25. Expected numbers are written out, or follow from formulas of the spec
that are restated here in plain Python.
"""

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from ltxlite import conditioning
from ltxlite.cli import extend, upscale, v2a
from ltxlite.cli.editing import Existing
from ltxlite.conditioning import LatentState, StageContext, States
from ltxlite.conditions import Conditions, Guide, Image, Sound, Source
from ltxlite.geometry import AudioGrid, ClipShape, LatentGrid, audio_positions, video_positions
from ltxlite.given import GivenReference, GivenSound, GivenSource, StageGiven
from ltxlite.media.timing import Timing
from ltxlite.steering import steer

CHANNELS, ROWS, COLUMNS, PLACES = 4, 3, 5, 15
SIGMA = 0.8


def stage_of(frames: int = 121, fps: int = 24, number: int = 0) -> StageContext:
    count, heard = (frames - 1) // 8 + 1, round(frames / fps * 25)
    shape = ClipShape(count, ROWS, COLUMNS, heard, float(fps))
    return StageContext(number, shape, frames, Fraction(fps), LatentGrid(), AudioGrid())


CLIP = stage_of()


def latent(value: float, frames: int = 1, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.full((1, CHANNELS, frames, rows, columns), value)


def sound(value: float, stage: StageContext = CLIP) -> Tensor:
    return torch.full((1, 2, stage.shape.audio_frames, 3), value)


def source(stage: StageContext = CLIP) -> GivenSource:
    return GivenSource(latent(5.0, stage.shape.frames), sound(6.0, stage))


def steered(conditions: Conditions, given: StageGiven, stage: StageContext = CLIP) -> States:
    """Steer states in which 7 stands for what the stage begins from."""
    shape = stage.shape
    extent = (shape.frames, shape.rows, shape.columns)
    tokens = torch.full((1, shape.video_tokens, CHANNELS), 7.0)
    heard = torch.full((1, shape.audio_frames, 6), 7.0)
    video = conditioning.start(tokens, video_positions(extent, shape.fps, stage.grid))
    audio = conditioning.start(heard, audio_positions(shape.audio_frames, stage.audio_grid))
    return steer((video, audio), conditions, given, stage)


def by_frame(state: LatentState, values: Tensor) -> list[float]:
    """Return one value of each latent frame of the clip; all its places have it."""
    frames = values[0, : state.target].reshape(-1, PLACES)
    assert torch.equal(frames, frames[:, :1].expand_as(frames))
    return [round(value, 6) for value in frames[:, 0].tolist()]


def levels(state: LatentState) -> Tensor:
    """Return the noise level (1, T) of every token at sigma 0.8."""
    timesteps = state.levels()
    per_token = type(timesteps)(timesteps.values * SIGMA, timesteps.index).per_token()
    return per_token[..., 0].expand(1, state.tokens)


def freed(state: LatentState) -> list[int]:
    """Return the latent frames, or audio latents, that are made anew."""
    per = PLACES if state.positions.shape[1] == 3 else 1
    masks = state.mask[0, : state.target, 0].reshape(-1, per)
    assert set(masks.flatten().tolist()) <= {0.0, 1.0}
    return masks[:, 0].nonzero().flatten().tolist()


@dataclass(frozen=True)
class Appended:
    """A group as it should be: its tokens, the pixel frames of its first and last ones, a level."""

    tokens: int
    first: tuple[float, float]
    last: tuple[float, float]
    level: float = 0.0


@dataclass(frozen=True)
class Case:
    """A combination, and the masks by latent frame, groups and attention rows that it gives."""

    conditions: Conditions
    given: StageGiven
    masks: dict[int, float]
    groups: tuple[Appended, ...] = ()
    rows: int = 0
    audio: float = 1.0


STILL, OTHER = latent(1.0), latent(2.0)
HALF = GivenReference(latent(3.0, 16, 1, 2), 1.0, downscale=2)
WHOLE = GivenReference(latent(4.0, 16), 0.75)
# Every second of 121 frames: 61, of which 57 make 8 latent frames.
SPARSE = GivenReference(latent(4.0, 8), 1.0, temporal=2)
HEARD = GivenSound(sound(6.0))
FULL = ((0.0, 1.0), (113.0, 121.0))

CASES = {
    "first and last frame in place": Case(
        Conditions(images=(Image("a"), Image("b", "-1"))),
        StageGiven(images=(STILL, OTHER)),
        {0: 0.0, 15: 0.0},
    ),
    "first and last frame beside the clip": Case(
        Conditions(guides=(Guide("a", "0"), Guide("b", "last"))),
        StageGiven(guides=(STILL, OTHER)),
        {},
        (Appended(15, (0, 1), (0, 1)), Appended(15, (120, 121), (120, 121))),
    ),
    "first frame in place, last one beside": Case(
        Conditions(images=(Image("a"),), guides=(Guide("b", "last", (0.6,)),)),
        StageGiven(images=(STILL,), guides=(OTHER,)),
        {0: 0.0},
        (Appended(15, (120, 121), (120, 121), 0.32),),
    ),
    "reference before the first frame, and that frame at 0.7": Case(
        Conditions(images=(Image("a", "0", (0.7, 1.0)),), guides=(Guide("b", "ref"),)),
        StageGiven(images=(STILL,), guides=(OTHER,)),
        {0: 0.3},
        (Appended(15, (-8, -7), (-8, -7)),),
    ),
    "the same image in place and twice beside": Case(
        Conditions(images=(Image("a"),), guides=(Guide("a", "0"), Guide("a", "0"))),
        StageGiven(images=(STILL,), guides=(STILL, STILL)),
        {0: 0.0},
        (Appended(15, (0, 1), (0, 1)),) * 2,
    ),
    "a clip beside the clip from frame 17 on": Case(
        Conditions(guides=(Guide("a", "17"),)),
        StageGiven(guides=(latent(2.0, 3),)),
        {},
        (Appended(45, (17, 25), (33, 41)),),
    ),
    "a control clip at half size": Case(
        Conditions(), StageGiven(references=(HALF,)), {}, (Appended(32, *FULL),)
    ),
    "a sparse reference, and one of strength 0.75": Case(
        Conditions(),
        StageGiven(references=(SPARSE, WHOLE)),
        {},
        # Fewer frames: time twice as fast, one frame earlier, no less than 0.
        (Appended(120, (0, 1), (97, 113)), Appended(240, *FULL, 0.2)),
    ),
    "control clip, first frame, last frame and given sound": Case(
        Conditions(images=(Image("a"),), guides=(Guide("b", "last"),), sound=Sound("c.wav")),
        StageGiven(images=(STILL,), guides=(OTHER,), references=(HALF,), sound=HEARD),
        {0: 0.0},
        (Appended(15, (120, 121), (120, 121)), Appended(32, *FULL)),
        audio=0.0,
    ),
    "groups with and without attention": Case(
        Conditions(guides=(Guide("a", "ref", attention=0.5), Guide("b", "last"))),
        StageGiven(guides=(STILL, OTHER), references=(HALF, WHOLE)),
        {},
        (
            Appended(15, (-8, -7), (-8, -7)),
            Appended(15, (120, 121), (120, 121)),
            Appended(32, *FULL),
            Appended(240, *FULL, 0.2),
        ),
        rows=5,
    ),
    "sound alone": Case(Conditions(sound=Sound("c.wav")), StageGiven(sound=HEARD), {}, audio=0.0),
    "sound, partly made anew, and a first frame": Case(
        Conditions(images=(Image("a"),), sound=Sound("c.wav", denoise=0.25, output="decoded")),
        StageGiven(images=(STILL,), sound=HEARD),
        {0: 0.0},
        audio=0.25,
    ),
    "a clip made anew from 0.4 on, with a first frame and a control clip": Case(
        Conditions(images=(Image("a"),), source=Source("x", denoise=0.4)),
        StageGiven(images=(STILL,), references=(HALF,), source=source()),
        {0: 0.0},
        (Appended(32, *FULL),),
        audio=0.0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_combination_gives_the_stated_tokens_positions_masks_and_levels(name: str) -> None:
    case = CASES[name]
    video, audio = steered(case.conditions, case.given)
    masks = [case.masks.get(frame, 1.0) for frame in range(16)]
    assert by_frame(video, video.mask[..., 0]) == masks
    wanted = [round(mask * SIGMA, 6) for mask in masks]
    assert by_frame(video, levels(video)) == wanted
    assert (video.target, len(video.groups)) == (240, len(case.groups))
    start = 240
    for group, expected in zip(video.groups, case.groups, strict=True):
        assert (group.start, group.stop) == (start, start + expected.tokens)
        spans = video.positions[0, 0, group.start : group.stop] * 24
        # Frames of seconds in fp32.
        assert spans[0].tolist() == pytest.approx(expected.first, abs=1e-4)
        assert spans[-1].tolist() == pytest.approx(expected.last, abs=1e-4)
        own = levels(video)[0, group.start : group.stop]
        assert own.tolist() == pytest.approx([expected.level] * expected.tokens)
        start = group.stop
    assert video.tokens == start
    assert len(conditioning.attention_weights(video)) == case.rows
    assert levels(audio)[0].tolist() == pytest.approx([case.audio * SIGMA] * 126)
    assert audio.frozen == (case.audio == 0)


def test_the_clips_own_positions_are_those_of_the_formula_whatever_is_appended() -> None:
    case = CASES["control clip, first frame, last frame and given sound"]
    video, audio = steered(case.conditions, case.given)
    for token in range(240):
        frame, row, column = token // 15, token // 5 % 3, token % 5
        # features.md A5: [8k - 7, 8k + 1), the first [0, 1); places of 32 pixels.
        begin = max(0, 8 * frame - 7) / 24
        found = video.positions[0, :, token].tolist()
        assert found[0] == pytest.approx([begin, (8 * frame + 1) / 24], abs=1e-6)
        assert found[1:] == [[32 * row, 32 * row + 32], [32 * column, 32 * column + 32]]
    for token in range(126):
        edges = [max(0, 4 * j - 3) / 100 for j in (token, token + 1)]
        assert audio.positions[0, 0, token].tolist() == pytest.approx(edges, abs=1e-6)
    places = video.positions[0, 1:, 255:257].tolist()
    # The reference at half size: places of 64 pixels.
    assert places == [[[0, 64], [0, 64]], [[0, 64], [64, 128]]]


@pytest.mark.parametrize(
    ("frames", "fps", "times", "latents"),
    [
        (121, 25, (2, 4), (8, 13)),
        (121, 24, (2, 4), (7, 12)),
        (121, 25, (0, 5), (0, 16)),
        (497, 25, (1.0, 19.88), (4, 63)),
    ],
)
def test_a_retake_inward_frees_the_published_latents(
    frames: int, fps: int, times: tuple[float, float], latents: tuple[int, int]
) -> None:
    stage = stage_of(frames, fps)
    retake = Source("x", video=times, audio=times, edge="inward")
    video, audio = steered(Conditions(source=retake), StageGiven(source=source(stage)), stage)
    assert freed(video) == list(range(*latents))
    # features.md I3: rounded to latents, the last one included, cut at the end.
    heard = range(round(times[0] * 25), min(round(times[1] * 25) + 1, stage.shape.audio_frames))
    assert freed(audio) == list(heard)


@pytest.mark.parametrize("what", ["video", "audio", "both"])
def test_a_retake_outward_frees_what_it_touches_and_freezes_a_stream_without_a_part(
    what: str,
) -> None:
    times = (2.0, 4.0)
    retake = Source(
        "x", video=None if what == "audio" else times, audio=None if what == "video" else times
    )
    video, audio = steered(Conditions(source=retake), StageGiven(source=source()))
    touched = [k for k in range(16) if 8 * k + 1 > 48 and max(0, 8 * k - 7) < 96]
    heard = [j for j in range(126) if 4 * j + 1 > 200 and max(0, 4 * j - 3) < 400]
    assert freed(video) == ([] if what == "audio" else touched)
    assert freed(audio) == ([] if what == "video" else heard)
    assert (video.frozen, audio.frozen) == (what == "audio", what == "video")
    assert video.clean.unique().tolist() == [5.0]
    assert video.initial.unique().tolist() == [5.0]
    assert audio.clean.unique().tolist() == [6.0]
    assert video.tokens == 240


def existing(frames: int = 121) -> Existing:
    rate = Fraction(24)
    timing = Timing(tuple(n / rate for n in range(frames)), frames / rate, rate)
    return Existing("x.mp4", timing, rate, 160, 96, True)


@dataclass
class Flags:
    """What `extend` reads of its flags."""

    by: float
    backward: bool
    overlap: int = 25
    color_match: bool = False


@pytest.mark.parametrize("backward", [False, True])
def test_an_extension_keeps_the_frames_that_both_clips_show(backward: bool) -> None:
    job = extend.plan(Flags(4.0, backward), existing())
    # 96 frames more: behind 25 of them (latents 0 to 3), or before 24 (the last three).
    assert job.frames == 121
    assert job.source.offset == (-97 if backward else 96)
    video, audio = steered(Conditions(source=job.source), StageGiven(source=source()))
    kept = [13, 14, 15] if backward else [0, 1, 2, 3]
    assert freed(video) == [frame for frame in range(16) if frame not in kept]
    begin, end = (0, 97 / 24) if backward else (25 / 24, 121 / 24)
    heard = [
        j for j in range(126) if 4 * j + 1 > begin * 100 and max(0, 4 * j - 3) < end * 100 - 1e-6
    ]
    assert freed(audio) == heard


def test_sound_for_a_clip_freezes_the_picture_at_level_0() -> None:
    job = v2a.plan(existing())
    video, audio = steered(Conditions(source=job.source), StageGiven(source=source()))
    assert video.frozen
    assert levels(video).unique().tolist() == [0.0]
    assert freed(audio) == list(range(126))


def test_an_upscaled_clip_is_held_then_freed_but_for_its_first_frame() -> None:
    for first, kept in ((True, [0]), (False, [])):
        job = upscale.plan(existing(), first=first)
        conditions = Conditions(source=job.source)
        video, audio = steered(conditions, StageGiven(source=source()))
        assert (video.frozen, audio.frozen) == (True, True)
        video, audio = steered(conditions, StageGiven(source=source()), stage_of(number=1))
        assert freed(video) == [frame for frame in range(16) if frame not in kept]
        assert video.initial.unique().tolist() == [7.0], "it goes on from the enlarged latent"
        assert audio.frozen


def test_a_detailer_begins_from_the_clip_and_sees_it_at_the_same_places() -> None:
    clip = GivenReference(latent(5.0, 16), 1.0)
    conditions = Conditions(source=Source("x", video=(0.0, 5.1)))
    video, _ = steered(conditions, StageGiven(source=source(), references=(clip,)))
    assert freed(video) == list(range(16))
    assert video.initial[0, :240].unique().tolist() == [5.0]
    assert torch.equal(video.positions[:, :, 240:], video.positions[:, :, :240])
    assert levels(video)[0, 240:].unique().tolist() == [0.0]


def test_a_region_frees_places_of_the_clip_and_nothing_of_what_is_appended() -> None:
    region = torch.zeros(16, ROWS, COLUMNS)
    region[4:, 1, 2] = 1
    given = StageGiven(
        source=GivenSource(latent(5.0, 16), sound(6.0), region), guides=(STILL,), references=(HALF,)
    )
    conditions = Conditions(source=Source("x", mask="m.png"), guides=(Guide("a", "last", (0.5,)),))
    video, audio = steered(conditions, given)
    assert video.mask[0, :240, 0].nonzero().flatten().tolist() == [
        15 * frame + 7 for frame in range(4, 16)
    ]
    assert video.mask[0, 240:255, 0].unique().tolist() == [0.5]
    assert video.mask[0, 255:, 0].unique().tolist() == [0.0]
    assert audio.frozen


def test_each_stage_has_its_own_strength_and_its_own_references() -> None:
    conditions = Conditions(images=(Image("a", "0", (0.7, 1.0)),), guides=(Guide("b", "ref"),))
    first, _ = steered(conditions, StageGiven((STILL,), (OTHER,), (HALF,)))
    second, _ = steered(conditions, StageGiven((STILL,), (OTHER,)), stage_of(number=1))
    assert (first.tokens, second.tokens) == (240 + 15 + 32, 240 + 15)
    assert first.levels().values.tolist() == pytest.approx([0.0, 0.3, 1.0])
    assert second.levels().values.tolist() == [0.0, 1.0]


def test_many_groups_cost_a_row_each_and_never_a_matrix() -> None:
    weighted = [GivenReference(latent(1.0, 16), 1.0, weight=torch.full((240,), 0.5))] * 3
    video, _ = steered(Conditions(), StageGiven(references=(*weighted, HALF)))
    rows = conditioning.attention_weights(video)
    assert video.tokens == 240 * 4 + 32
    assert [tuple(row.weights.shape) for row in rows] == [(1, 1, video.tokens)] * 5
    dense = conditioning.dense_weights(video)[0]
    groups = [(group.start, group.stop) for group in video.groups]
    for start, stop in groups:
        assert dense[start:stop, start:stop].unique().tolist() == [1.0]
        for other, end in groups:
            if other != start:
                assert dense[start:stop, other:end].unique().tolist() == [0.0]
