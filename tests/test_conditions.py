"""Records of what steers a clip: places, strengths, flags, refusals; no file is opened."""

import argparse
from fractions import Fraction

import pytest

from ltxlite.cli.steering import Spec, add_steering, parse_picture, with_media
from ltxlite.conditions import (
    Conditions,
    Guide,
    Image,
    Nag,
    Reference,
    Relay,
    Segment,
    Sound,
    Source,
    frame_at,
    of_stage,
)
from ltxlite.errors import RequestError
from ltxlite.request import Files, Output, Request, Stage

RATE = Fraction(24)


def request_with(conditions: Conditions) -> Request:
    return Request("x", Files("m"), Output("o.mp4"), (Stage(),), conditions=conditions)


@pytest.mark.parametrize(
    ("at", "frame"),
    [
        ("0", 0),
        ("17", 17),
        ("last", 120),
        ("-1", 120),  # as ComfyUI's image guide: Python's way (features.md PART D)
        ("-121", 0),
        ("2.5s", 60),
        ("0.99s", 23),  # int(s fps)
        ("50%", 60),
        ("100%", 120),
        ("12.5%", 15),
        ("0.5%", 1),  # round(0.6)
    ],
)
def test_places_are_frames_seconds_and_shares(at: str, frame: int) -> None:
    assert frame_at(at, 121, RATE, "image") == frame


def test_seconds_follow_an_odd_rate_exactly() -> None:
    # 4.004 s at 23.976 fps are 96 frames; in floating point they may come out as 95.
    assert frame_at("4.004s", 121, Fraction(24000, 1001), "image") == 96


@pytest.mark.parametrize("at", ["121", "-122", "6s", "100.9%"])
def test_a_place_beyond_the_clip_is_refused_with_the_clips_frames(at: str) -> None:
    with pytest.raises(RequestError, match=r"outside the clip, whose 121 frames are 0 to 120"):
        frame_at(at, 121, RATE, "image a.png")


def test_the_last_strength_serves_the_stages_without_one() -> None:
    assert [of_stage((0.7, 1.0), number) for number in range(4)] == [0.7, 1.0, 1.0, 1.0]


def test_every_record_comes_back_from_a_job_file() -> None:
    everything = Conditions(
        images=(Image("a.png", "50%", (0.7, 1.0), 18), Image("b.png")),
        guides=(Guide("c.mp4", "-1", (0.5,), 0.25, 0), Guide("d.png", "ref")),
        references=(Reference("e.mp4", 0.9, 0.5, "m.mp4", 2, 3, (1, 2), "canny"),),
        sound=Sound("f.wav", 1.5, 0.25, "decoded"),
        source=Source("g.mp4", (1.0, 2.5), None, "m.png", 0.5),
        nag=Nag("cartoon", None, 5.0, 0.5, 2.0),
        relay=Relay((Segment("one", 0.0, 1.5), Segment("two")), 0.1),
    )
    request = Request(
        *("x", Files("m"), Output("o.mp4"), (Stage(), Stage())), conditions=everything
    )
    assert Request.from_json(request.to_json(), "job") == request


def test_media_are_every_file_that_is_named_in_order() -> None:
    conditions = Conditions(
        images=(Image("a"),),
        guides=(Guide("b"),),
        references=(Reference("c", attention_mask="d"), Reference("e")),
        sound=Sound("f"),
        source=Source("g", mask="h", denoise=1.0),
    )
    assert sorted(conditions.media()) == list("abcdefgh")
    assert Conditions().media() == ()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Image("a", strengths=(1.5,)), "strength is 1.5, wanted 0 to 1"),
        (lambda: Image("a", strengths=()), "no strength"),
        (lambda: Image("a", "ref"), "wanted a frame"),
        (lambda: Image("a", "soon"), "wanted a frame"),
        (lambda: Image("a", crf=52), "CRF 52"),
        (lambda: Image(""), "no file name"),
        (lambda: Guide("a", attention=-0.1), "attention is -0.1, wanted 0 to 10"),
        (lambda: Guide("a", attention=10.5), "attention is 10.5, wanted 0 to 10"),
        (lambda: Image("a", "after"), "wanted a frame"),
        (lambda: Guide("a", "1.5"), "ref"),
        (lambda: Reference("a", downscale=0), "downscale is 0"),
        (lambda: Reference("a", stages=()), "stages"),
        (lambda: Reference("a", stages=(1, 1)), "each once"),
        (lambda: Sound("a", denoise=2.0), "denoise is 2.0"),
        (lambda: Source("a", video=(2.0, 2.0)), "is empty"),
        (lambda: Nag(), "no text"),
        (lambda: Relay(()), "no segments"),
        (lambda: request_with(Conditions(references=(Reference("a", stages=(2,)),))), "a job with"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(RequestError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.png", Spec("a.png", None, (1.0,), None)),
        ("a.png@0:0.7", Spec("a.png", "0", (0.7,), None)),
        ("a.png:.7,1", Spec("a.png", None, (0.7, 1.0), None)),
        ("a.png@last:1:0.5", Spec("a.png", "last", (1.0,), 0.5)),
        (r"C:\x\a b.png@2.5s:0.7,1.0", Spec(r"C:\x\a b.png", "2.5s", (0.7, 1.0), None)),
        (r"C:\x.png", Spec(r"C:\x.png", None, (1.0,), None)),
        ("/me@home/x.png@-1", Spec("/me@home/x.png", "-1", (1.0,), None)),
        ("a.png@50%", Spec("a.png", "50%", (1.0,), None)),
        ("take:2.mp4@ref", Spec("take:2.mp4", "ref", (1.0,), None)),
    ],
)
def test_picture_flags_are_read_with_paths_of_any_kind(text: str, spec: Spec) -> None:
    assert parse_picture(text, "--guide") == spec


def flags(*arguments: str) -> Conditions:
    parser = argparse.ArgumentParser()
    add_steering(parser)
    return with_media(Conditions(), parser.parse_args(arguments))


def test_flags_become_records_in_their_order() -> None:
    conditions = flags(
        *("--image", "a.png@0:0.7,1", "--guide", "b.png@last", "--image", "c.png@-1"),
        *("--image-crf", "18", "--reference", "canny:C:\\d.mp4:0.9:0.5", "--reference", "e.mp4"),
        *("--reference-mask", "m.png", "--reference-downscale", "2", "--reference-stages", "1,2"),
    )
    assert conditions.images == (
        Image("a.png", "0", (0.7, 1.0), 18),
        Image("c.png", "-1", (1.0,), 18),
    )
    assert conditions.guides == (Guide("b.png", "last", (1.0,), 1.0, 18),)
    assert conditions.references == (
        Reference("C:\\d.mp4", 0.9, 0.5, "m.png", 2, None, (1, 2), "canny"),
        Reference("e.mp4", 1.0, 1.0, None, 2, None, (1, 2)),
    )
    assert flags() == Conditions()


def test_as_in_comfyui_one_strength_is_two() -> None:
    conditions = flags(
        *("--guide-mode", "comfy", "--guide", "a.png@9:1.5", "--guide", "b.mp4@9:0.5"),
        *("--guide", "c.png@after:1,0.5:2"),
    )
    assert conditions.guides == (
        Guide("a.png", "9", (1.0,), 1.5, comfy=True),
        Guide("b.mp4", "9", (0.5,), 0.5, comfy=True),
        Guide("c.png", "after", (1.0, 0.5), 2.0, comfy=True),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--image", "a.png@0:1:0.5"),
        ("--reference", "a.mp4@3"),
        ("--reference", "a.mp4:1,1"),
        ("--reference-mask", "m.png"),
        ("--reference-downscale", "2"),
        ("--reference-stages", "1", "--image", "a.png"),
        ("--reference", "a.mp4", "--reference-stages", "one"),
        ("--audio-start", "1"),
        ("--denoise", "0.5"),
        ("--mask", "m.png"),
        ("--guide-mode", "comfy", "--guide", "a.png:0.5,0.7"),
        ("--guide-mode", "comfy", "--guide", "a.png:10.5"),
        ("--guide", "a.png:1.5"),
    ],
)
def test_flags_that_say_nothing_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(RequestError):
        flags(*arguments)
