"""Motion tracks as control video: the curve, the trail, the colours, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ltxlite.errors import MediaError
from ltxlite.media.tracks import TRAIL, draw_tracks, read_tracks, resample


def hermite(track: list[tuple[float, float]], place: float) -> np.ndarray:
    """The same curve by its tangents: half the difference of a point's neighbours."""
    points = np.array([track[0], *track, track[-1]])
    index = min(int(place), len(track) - 2)
    t = place - index
    before, first, last, after = points[index : index + 4]
    tangents = (last - before) / 2, (after - first) / 2
    return (
        (2 * t**3 - 3 * t**2 + 1) * first
        + (t**3 - 2 * t**2 + t) * tangents[0]
        + (3 * t**2 - 2 * t**3) * last
        + (t**3 - t**2) * tangents[1]
    )


def test_a_track_is_a_catmull_rom_curve_through_its_points() -> None:
    track = ((3.0, 5.0), (20.0, 7.0), (40.0, 31.0), (11.0, 60.0))
    for count in (4, 10, 121):
        found = resample(track, count)
        wanted = [hermite(list(track), 3 * n / (count - 1)) for n in range(count)]
        # fp64 polynomials of values below 100.
        np.testing.assert_allclose(found, wanted, atol=1e-9)
    np.testing.assert_allclose(resample(track, 4), track, atol=1e-12)


def test_two_points_are_a_line_and_one_stands_still() -> None:
    assert resample(((0.0, 10.0), (8.0, 6.0)), 5) == [(0, 10), (2, 9), (4, 8), (6, 7), (8, 6)]
    assert resample(((4.0, 9.0),), 3) == [(4.0, 9.0)] * 3
    assert resample(((1.0, 2.0), (3.0, 4.0)), 1) == [(1.0, 2.0)]


def test_the_newest_point_is_the_largest_and_lies_on_top_in_blue() -> None:
    # A clip of 540 rows is drawn twice as large. The point moves by 10 pixels a frame.
    track = ((100.0, 270.0), (100.0 + 10 * 79, 270.0))
    (frame,) = draw_tracks([track], [79], 80, (540, 960))
    assert frame.shape == (1080, 1920, 3)
    row = frame[540].int()
    # Stored as blue, green, red: red, the newest, reads as (0, 0, 255).
    assert row[2 * (100 + 790)].tolist() == [0, 0, 255]
    assert row[2 * (100 + 790) + 7].tolist() == [0, 0, 255]  # its radius is 8
    assert row[2 * (100 + 790) + 10].tolist() == [0, 0, 0]
    # Ages 49, 33 and 17 have a fiftieth, a third and two thirds: near blue, green and yellow.
    for age, wanted in ((49, (240, 15, 0)), (33, (0, 255, 5)), (17, (0, 255, 250))):
        found = row[2 * (100 + 10 * (79 - age))].tolist()
        assert found == pytest.approx(wanted, abs=1), age
    oldest = 2 * (100 + 10 * (79 - TRAIL + 1))
    assert not row[: oldest - 4].any(), "older points are gone"
    assert not frame[: 540 - 10].any()


def test_before_the_trail_is_full_it_begins_with_the_track() -> None:
    first, second = draw_tracks([((10.0, 10.0), (50.0, 10.0))], [0, 1], 2, (64, 96))
    scale = 1080 / 64
    places = [(round(10 * scale), round(x * scale)) for x in (10, 50)]
    assert first[places[0]].tolist() == [0, 0, 255]
    assert not first[places[1]].any()
    assert second[places[0]].any()
    assert second[places[1]].tolist() == [0, 0, 255]
    assert first.shape[0] == min(first.shape[:2]) == 1080


def test_a_file_of_tracks_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tracks.json"
    path.write_text(json.dumps([[{"x": 1, "y": 2.5}], [{"x": 3, "y": -4, "t": 0}]]))
    assert read_tracks(path) == (((1.0, 2.5),), ((3.0, -4.0),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "which are JSON"),
        ("{}", "wanted tracks as"),
        ("[]", "wanted tracks as"),
        ('[{"x": 1, "y": 2}]', "wanted tracks as"),
        ("[[]]", "track 1 has no points"),
        ('[[{"x": 1, "y": 2}], [{"x": 1}]]', "track 2 holds"),
        ('[[{"x": 1, "y": "2"}]]', "track 1 holds"),
        ('[[{"x": 1e9, "y": 2}]]', "track 1 holds"),
        ('[[{"x": NaN, "y": 2}]]', "track 1 holds"),
        ('[[{"x": true, "y": 2}]]', "track 1 holds"),
        ("[" * 100_000, "which are JSON"),
    ],
)
def test_what_is_no_tracks_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tracks.json"
    path.write_text(text)
    with pytest.raises(MediaError, match=said) as caught:
        read_tracks(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="no such file"):
        read_tracks(tmp_path / "none.json")


def test_frames_do_not_share_memory() -> None:
    frames = list(draw_tracks([((5.0, 5.0),)], range(3), 3, (32, 32)))
    frames[0].zero_()
    assert torch.equal(frames[1], frames[2])
    assert frames[1].any()
