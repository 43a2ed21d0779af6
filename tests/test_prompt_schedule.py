"""Prompts by the clock: how a file is read, what one clip and what windows see of it."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from resume_support import request_of
from test_relay import CLIP, clip

from ltxlite.cli import main
from ltxlite.cli.lint import prompt_remarks
from ltxlite.conditions import Conditions, Relay, Segment
from ltxlite.errors import RequestError
from ltxlite.media.container import read_metadata
from ltxlite.pipeline import JOB_TAG
from ltxlite.prompt_schedule import Schedule, parse_schedule
from ltxlite.relay import Span, passed_on
from ltxlite.request import Output, Request, Stage

OUTPUT = Output("x.mp4")
SONG = """# a song
0:00-0:12: she walks in

// the refrain
0:12-1:05.5: she sings: louder
20s-30s: close-up
2:00+: lights go out
"""


def test_lines_say_from_when_to_when() -> None:
    found = parse_schedule(SONG, "song.txt").entries
    assert found == (
        Segment("she walks in", 0.0, 12.0),
        Segment("she sings: louder", 12.0, 65.5),
        Segment("close-up", 20.0, 30.0),
        Segment("lights go out", 120.0, None),
    )


def test_the_last_line_wins_and_a_gap_keeps_the_one_before() -> None:
    parts = parse_schedule(SONG, "song.txt").parts(150.0)
    assert [(item.text, item.begin, item.end) for item in parts] == [
        ("she walks in", 0.0, 12.0),
        ("she sings: louder", 12.0, 20.0),
        ("close-up", 20.0, 30.0),
        ("she sings: louder", 30.0, 65.5),
        # The gap: of what has begun, the close-up began last.
        ("close-up", 65.5, 120.0),
        ("lights go out", 120.0, 150.0),
    ]


def test_before_the_first_line_it_holds_already_and_equal_neighbours_join() -> None:
    schedule = parse_schedule("4-6: a\n6+: a\n", "x")
    assert schedule.parts(5.0) == (Segment("a", 0.0, 5.0),)


def test_edges_snap_to_the_windows_of_the_specification() -> None:
    # features.md part D: a stride of 17.92 s, an edge at 50 s is that of window 3, 53.76 s.
    schedule = parse_schedule("0-50: a\n50-51: lost\n50+: b", "x")
    snapped = schedule.snapped(17.92)
    assert [item.end for item in snapped.entries] == [pytest.approx(53.76), None]
    shares = [schedule.at_window(k, 17.92) for k in range(5)]
    assert shares == [{"a": 1}, {"a": 1}, {"a": 1}, {"b": 1}, {"b": 1}]


def test_windows_near_an_edge_see_a_mixture() -> None:
    schedule = parse_schedule("0-8: a\n8+: b", "x")
    # A blend of 6 s around 8 s; windows begin every 2 s. u = (t - 8) / 6 + 1/2.
    for number in range(8):
        u = min(max((2 * number - 8) / 6 + 0.5, 0), 1)
        b = 0.5 * (1 - math.cos(math.pi * u))
        found = schedule.at_window(number, 2.0, 6.0)
        assert found.get("b", 0) == pytest.approx(b)
        assert sum(found.values()) == pytest.approx(1)
    # Shorter than a stride is a stride: the window at the edge has half of each.
    assert schedule.at_window(4, 2.0, 0.1) == {"a": pytest.approx(0.5), "b": pytest.approx(0.5)}
    assert schedule.at_window(3, 2.0, 0.1) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "song.txt: no prompt in it"),
        ("# nothing\n", "song.txt: no prompt in it"),
        ("0:00-0:12: a\nwalks in", "song.txt, line 2: 'walks in' says no time"),
        ("0:12-0:05: a", "12 s to 5.0 s is empty"),
    ],
)
def test_a_schedule_that_cannot_be_read_names_the_line(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse_schedule(text, "song.txt")


def test_entries_that_all_vanish_are_told() -> None:
    with pytest.raises(RequestError, match="half of 10 s"):
        Schedule((Segment("a", 1.0, 2.0),)).snapped(10.0)


# One clip.


def test_attention_passes_on_as_a_raised_cosine() -> None:
    parts = (Span(0, 6), Span(6, 10))
    at = torch.arange(16) + 0.5
    found = passed_on(parts, at, CLIP.latents, 4.0)
    shares = (-found).exp()
    torch.testing.assert_close(shares.sum(1), torch.ones(16), rtol=0, atol=1e-6)
    # (1 - cos(π u)) / 2, u = (t - 6) / 4 + 1/2; an eighth of the way: 0.0380602.
    wanted = torch.tensor([0.0, 0.0380602, 0.3086583, 0.6913417, 0.9619398, 1.0])
    torch.testing.assert_close(shares[3:9, 1], wanted, rtol=0, atol=1e-6)
    hard = (-passed_on(parts, at, CLIP.latents, 0.0)).exp()
    assert torch.equal(hard[:, 1] > 0.5, at >= 6)
    assert found.isfinite().all()


def test_a_schedule_is_a_relay_of_its_lines(
    demo_files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    song, target = tmp_path / "song.txt", tmp_path / "clip.mp4"
    song.write_text("0:00-0:00.5: stars\n0:00.5+: clouds\n", encoding="utf-8")
    soft = clip(demo_files, target, "--schedule", str(song), "--schedule-blend", "0.4")
    request = Request.from_json(read_metadata(target)[JOB_TAG], "clip")
    length = float(25 / Fraction(24))
    parts = (Segment("stars", 0.0, 0.5), Segment("clouds", 0.5, length))
    assert request.conditions.relay == Relay(parts, blend=0.4)
    hard = clip(demo_files, target, "--schedule", str(song), "--schedule-blend", "0")
    relayed = clip(demo_files, target, "--schedule", str(song))
    segments = clip(demo_files, target, "--segments", "[0s:0.5s] stars [0.5s:] clouds")
    assert torch.equal(relayed, segments)
    assert not torch.equal(soft, hard)
    assert not torch.equal(soft, relayed)
    song.write_text("0+: stars", encoding="utf-8")
    clip(demo_files, target, "--schedule", str(song))
    request = Request.from_json(read_metadata(target)[JOB_TAG], "clip")
    assert request.conditions.relay is None
    assert request.prompt.endswith(" stars")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--schedule", "{}", "--segments", "a | b"), "give one"),
        (("--schedule-blend", "1"), "--schedule-blend without --schedule"),
        (("--schedule", "{}", "--schedule-blend", "1", "--relay-eps", "0.1"), "give one"),
        (("--schedule", "{}", "--schedule-blend=-1"), "blend is -1.0 s, wanted 0 to 3600"),
        (("--schedule", "{}.not"), "cannot be read"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    more: tuple[str, ...],
    told: str,
    demo_files: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    song = tmp_path / "song.txt"
    song.write_text("0-0.5: a\n0.5+: b", encoding="utf-8")
    model, upscaler, encoder = map(str, demo_files)
    given = ("--model", model, "--upscaler", upscaler, "--text-encoder", encoder, "--size", "64x64")
    arguments = [part.format(song) for part in more]
    target = ("-o", str(tmp_path / "x.mp4"), "--frames", "25", "--quiet")
    assert main(["generate", *given, *target, "--prompt", "a lake", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert told in error
    assert len(error.splitlines()) == 1


# What prompts are told.


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("The scene opens on a quiet lake at dawn", "'The scene opens'"),
        ("a boat drifts, then we cut to a storm over the lake", "'cut to'"),
        ("the camera dollies out over a frozen lake", "'dollies out'"),
        ("0:00-0:04 a boat drifts over the lake", "'0:00-0:04'"),
        ("a lake", "a few words"),
        ("", "empty"),
    ],
)
def test_prompts_are_told_what_goes_badly(prompt: str, words: str, tmp_path: Path) -> None:
    request = Request(prompt, request_of(tmp_path, Stage()).files, OUTPUT, (Stage(),))
    (remark,) = prompt_remarks(request)
    assert words in remark


def test_good_prompts_and_times_in_brackets_are_told_nothing(tmp_path: Path) -> None:
    text = "[0-4s] a boat is drifting over the lake | [4-8s] rain is falling"
    files = request_of(tmp_path, Stage()).files
    assert not list(prompt_remarks(Request(text, files, OUTPUT, (Stage(),))))
    relay = Conditions(relay=Relay((Segment("a boat is drifting over a lake"),)))
    assert not list(prompt_remarks(Request("", files, OUTPUT, (Stage(),), conditions=relay)))
