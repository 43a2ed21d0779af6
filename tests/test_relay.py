"""Prompt relay: who sees which part of the prompt, and how people write it."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ltxlite import conditioning
from ltxlite.cli import main
from ltxlite.conditioning import LatentState, StageContext
from ltxlite.conditions import Relay, Segment
from ltxlite.denoise import Prompt
from ltxlite.errors import RequestError
from ltxlite.geometry import (
    AudioGrid,
    ClipShape,
    LatentGrid,
    audio_positions,
    video_positions,
)
from ltxlite.media.container import read_metadata
from ltxlite.media.video_reader import read_video
from ltxlite.models.tokenizer import MAX_TOKENS
from ltxlite.opening import open_networks
from ltxlite.pipeline import JOB_TAG
from ltxlite.prompts import prompt_texts
from ltxlite.relay import Clip, Span, costs, passages, relayed, spans
from ltxlite.relay_text import Extent, parse_segments, whole_text
from ltxlite.request import Files, Request

CLIP = Clip(121, 24.0, LatentGrid())  # 16 latent frames
EXTENT = Extent(121, Fraction(24))
FrozenFiles = tuple[Path, Path, Path]


def segments(*times: tuple[float | None, float | None]) -> tuple[Segment, ...]:
    return tuple(Segment(f"part {i}", *pair) for i, pair in enumerate(times))


def test_costs_are_those_of_the_specification() -> None:
    at = torch.arange(16.0)
    hard = costs([Span(4, 8)], at, 1e-3)[:, 0]
    assert hard[6:11].eq(0).all()  # 2 frames around the middle, 8
    # 1 / (2 .1448²) a frame beyond, squared; the specification gives three digits.
    torch.testing.assert_close(hard[11:13], torch.tensor([23.9, 95.4]), rtol=0, atol=0.05)
    assert torch.equal(hard[3:6], hard[11:14].flip(0))
    soft = costs([Span(4, 8)], at, 0.1)[:, 0]
    torch.testing.assert_close(soft[11:13], torch.tensor([2.65, 10.6]), rtol=0, atol=5e-3)


def test_short_segments_cost_nothing_where_they_are_best() -> None:
    at = torch.arange(11) * (16 / 11)  # tokens of sound; none lies on a middle
    found = costs([Span(0, 1), Span(1, 3), Span(4, 12)], at, 1e-3)
    assert found.amin(0).eq(0).all()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        # 16 frames in three: 5 each, one over.
        (segments((None, None), (None, None), (None, None)), [(0, 6), (6, 11), (11, 16)]),
        # Latent frame j > 0 has its middle at pixel frame 8 j - 3: 48 has 0..6 before it.
        (segments((0, 2), (2, 4), (4, None)), [(0, 7), (7, 13), (13, 16)]),
        (segments((None, 2), (None, None)), [(0, 7), (7, 16)]),
        (segments((None, None), (None, None), (4, 99)), [(0, 7), (7, 13), (13, 16)]),
        (segments((1, 2), (3, 4)), [(4, 7), (10, 13)]),  # free between them
        (segments((0, 4), (2, None)), [(0, 13), (7, 16)]),  # both, where they overlap
    ],
)
def test_segments_become_latent_frames(
    given: tuple[Segment, ...], wanted: list[tuple[int, int]]
) -> None:
    assert [(s.start, s.start + s.length) for s in spans(given, CLIP)] == wanted


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (segments((0, 2), (6, None)), "begins at 6 s, the clip ends at 5.04"),
        (segments((0, 0.01), (0.01, None)), "no latent frame"),
        (segments(*[(None, None)] * 17), "use fewer segments"),
    ],
)
def test_segments_without_room_are_refused(given: tuple[Segment, ...], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        spans(given, CLIP)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a | b c |d", [("a", None, None), ("b c", None, None), ("d", None, None)]),
        ("[0s:2s] a [2s:] b", [("a", 0, 2), ("b", 2, None)]),
        ("[0%:50%] a | [50%:100%] b", [("a", 0, 121 / 48), ("b", 121 / 48, 121 / 24)]),
        ("[0:01:0:02.5] a [0:03:] b", [("a", 1, 2.5), ("b", 3, None)]),
        ("[1:24] a [25:121] b", [("a", 0, 1), ("b", 1, 121 / 24)]),  # frames from 1, both there
        ("[:1.5s] a [1.5s:] b", [("a", 0, 1.5), ("b", 1.5, None)]),
        ("[0-4s] stays | [hero] too", [("[0-4s] stays", None, None), ("[hero] too", None, None)]),
    ],
)
def test_segments_are_read(text: str, wanted: list[tuple[str, float, float]]) -> None:
    before, found = parse_segments(text, EXTENT)
    assert before == ""
    assert [item.text for item in found] == [item[0] for item in wanted]
    for item, (_, begin, end) in zip(found, wanted, strict=True):
        assert item.begin == (None if begin is None else pytest.approx(begin))
        assert item.end == (None if end is None else pytest.approx(end))


def test_what_stands_before_the_first_marker_is_for_all_times() -> None:
    assert parse_segments("a lake. [0s:1s] rain", EXTENT)[0] == "a lake."


@pytest.mark.parametrize("text", ["", "a | | b", "[0s:2s] [2s:] b", "[0:9] a", "[1:122] a"])
def test_segments_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"^(--segments|segment)"):
        parse_segments(text, EXTENT)


def test_rows_of_segments_hold_their_tokens(demo_files: FrozenFiles) -> None:
    tokenizer = demo_networks(demo_files).tokenizer()
    relay = Relay((Segment("rain falls"), Segment("the sun comes out"), Segment("night")))
    prompt = " a quiet lake "
    text = whole_text(prompt, relay)
    assert text == "a quiet lake rain falls the sun comes out night"
    ids = tokenizer.encode(text).ids
    found = passages(tokenizer, prompt, relay)
    for rows, segment in zip(found, relay.segments, strict=True):
        alone = tokenizer.encode(f"lake {segment.text}").ids  # with the space before it
        assert ids[rows] == alone[len(tokenizer.encode("lake").ids) :]
    assert found[0].start == len(tokenizer.encode(prompt).ids)
    assert found[-1].stop == len(ids)


def test_text_longer_than_a_context_is_refused(demo_files: FrozenFiles) -> None:
    tokenizer = demo_networks(demo_files).tokenizer()
    relay = Relay((Segment("rain " * MAX_TOKENS), Segment("sun")))
    with pytest.raises(RequestError, match=f"a context holds {MAX_TOKENS}; shorten"):
        passages(tokenizer, "a lake", relay)


ROWS = (slice(3, 5), slice(5, 9))
RELAY = Relay((Segment("a", None, 1.0), Segment("b")), 0.05, 0.5, 2.0)
STAGE = StageContext(0, ClipShape(7, 2, 3, 50, 25.0), 49, Fraction(25), LatentGrid(), AudioGrid())


def by_hand(latents: list[float], strength: float) -> Tensor:
    """Write the bias of tokens at these latent frames (-1: free) out; (T, 12)."""
    mask = torch.zeros(len(latents), 12, dtype=torch.float64)
    width = 1 / torch.tensor(0.05, dtype=torch.float64).log().neg()
    for rows, (start, length) in zip(ROWS, ((0, 4), (4, 3)), strict=True):  # 25 frames are 4
        far = [max(abs(f - (start + length // 2)) - max(length // 2 - 2, 0), 0) for f in latents]
        cost = [float(f * f / (2 * width**2)) for f in far]
        least = min(c for c, f in zip(cost, latents, strict=True) if f >= 0)
        for token, f in enumerate(latents):
            mask[token, rows] = 0 if f < 0 else -strength * (cost[token] - least)
    return mask.float()


def spread(prompt: Prompt) -> Tensor:
    assert prompt.bias is not None
    assert len(prompt.bias.rows) < 60, "one row for each latent frame"
    return prompt.bias.rows[prompt.bias.row_ids.long()]


def picture() -> LatentState:
    grid = LatentGrid()
    return conditioning.start(torch.zeros(1, 42, 4), video_positions((7, 2, 3), 25.0, grid))


def test_tokens_of_the_picture_see_the_part_of_their_frame() -> None:
    state = picture()
    for frame in (17, -8):  # a guide for pixel frame 17, and one before the clip
        place = conditioning.keyframe_positions((1, 2, 3), frame, 1, 25.0, LatentGrid())
        state = conditioning.append(state, torch.zeros(1, 4, 1, 2, 3), place, 1.0)
    found = relayed(Prompt(torch.zeros(1, 12, 8)), ROWS, RELAY, state, STAGE)
    latents = [float(q // 6) for q in range(42)] + [3.0] * 6 + [-1.0] * 6
    # Both hold fp32; by hand it is rounded once.
    torch.testing.assert_close(spread(found), by_hand(latents, 0.5), rtol=1e-5, atol=0)


def test_tokens_of_the_sound_see_the_part_of_their_time() -> None:
    state = conditioning.start(torch.zeros(1, 50, 4), audio_positions(50, AudioGrid()))
    found = relayed(Prompt(torch.zeros(1, 12, 8)), ROWS, RELAY, state, STAGE)
    latents = [q * 7 / 50 for q in range(50)]
    # Differences of fp32 times, squared and divided by .22: 1e-6 of 36 / .22 at most.
    torch.testing.assert_close(spread(found), by_hand(latents, 2.0), rtol=1e-5, atol=2e-4)


def test_no_bias_where_nothing_is_told_apart() -> None:
    prompt = Prompt(torch.zeros(1, 12, 8))
    for relay in (replace(RELAY, video=0.0), Relay((Segment("a", 0.0, 9.0), Segment("b", 0.0)))):
        assert relayed(prompt, ROWS, relay, picture(), STAGE) is prompt


# Whole clips.


def demo_networks(files: FrozenFiles):  # type: ignore[no-untyped-def]
    model, upscaler, encoder = files
    named = Files(str(model), upscalers=(str(upscaler),), text_encoder=str(encoder))
    return open_networks(named, "cpu", "float32")


def clip(files: FrozenFiles, target: Path, *more: str) -> Tensor:
    model, upscaler, encoder = files
    given = [
        *("generate", "--model", str(model), "--upscaler", str(upscaler)),
        *("--text-encoder", str(encoder), "--prompt", "a lake rain falls sun shines"),
        *("--size", "64x64", "--frames", "25", "-o", str(target), "--quiet", "--steps", "2"),
        *("--stages", "1", "--crf", "0", *more),
    ]
    assert main(given) == 0
    return read_video(target).frames


def test_nag_and_relay_change_a_clip_and_travel_with_its_job(
    demo_files: FrozenFiles, tmp_path: Path
) -> None:
    target = tmp_path / "clip.mp4"
    plain = clip(demo_files, target)
    off = clip(demo_files, target, "--nag", "fog", "--nag-params", "1,0.25,2.5")
    assert torch.equal(off, plain), "a scale of 1 is off"
    nag = ("--nag", "fog", "--nag-audio", "music")
    relay = ("--segments", "[0s:0.5s] stars [0.5s:] clouds", "--relay-eps", "0.1")
    found = [plain]
    for more in (("--nag", "fog"), nag, relay, (*nag, *relay)):
        frames = clip(demo_files, target, *more)
        assert not any(torch.equal(frames, other) for other in found)
        found.append(frames)
    request = Request.from_json(read_metadata(target)[JOB_TAG], "clip")
    assert request.conditions.relay is not None
    assert request.conditions.relay.epsilon == 0.1
    assert len(prompt_texts(request)) == 3
    again = tmp_path / "again.mp4"
    assert main(["generate", "--job", str(target), "-o", str(again), "--quiet"]) == 0
    assert torch.equal(read_video(again).frames, found[-1])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--nag-params", "11,0.25,2.5"), "--nag-params without --nag"),
        (("--nag", "fog", "--nag-params", "11,a"), "wanted numbers such as"),
        (("--nag", "fog", "--nag-params", "11,2"), "wanted three numbers"),
        (("--nag", "fog", "--nag-params", "0.5,0.25,2.5"), "scale 0.5"),
        (("--relay-eps", "0.1"), "--relay-eps without --segments"),
        (("--segments", "a | b", "--relay-eps", "2"), "epsilon is 2"),
        (("--segments", "a | b", "--relay-strength", "1:2:3"), "wanted V or V:A"),
        (("--segments", "a | b", "--relay-strength=-1"), "strengths are -1"),
        (("--segments", "a | b | c | d | e"), "use fewer segments"),
        (("--segments", "[7s:] a"), "begins at 7 s"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    more: tuple[str, ...],
    told: str,
    demo_files: FrozenFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, upscaler, encoder = demo_files
    given = ("--model", str(model), "--upscaler", str(upscaler), "--text-encoder", str(encoder))
    size = ("--size", "128x64", "--frames", "25", "-o", str(tmp_path / "x.mp4"), "--quiet")
    assert main(["generate", *given, "--prompt", "a lake", *size, *more]) == 1
    error = capsys.readouterr().err.strip()
    assert told in error
    assert len(error.splitlines()) == 1
