"""What people train on: manifests in every spelling, buckets, and clips brought to them."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ltxlite.errors import RequestError
from ltxlite.media.output import VideoSettings
from ltxlite.media.video_writer import create_video
from ltxlite.training.data import (
    Bucket,
    Example,
    FileClips,
    WorldClips,
    choose_bucket,
    parse_buckets,
    read_manifest,
)
from ltxlite.training.measure import look
from ltxlite.training.world import every_fact


def test_manifests_of_every_kind_say_the_same(tmp_path: Path) -> None:
    wanted = [Example(tmp_path / "a.mp4", "one, two"), Example(tmp_path / "b.mp4", "three")]
    rows = [{"video": "a.mp4", "caption": "one, two"}, {"media_path": "b.mp4", "caption": "three"}]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "m.csv").write_text('video_path,caption\na.mp4,"one, two"\nb.mp4,three\n')
    for name in ("m.json", "m.jsonl", "m.csv"):
        assert read_manifest(tmp_path / name) == wanted
    for example in wanted:
        example.video.touch()
        example.video.with_suffix(".txt").write_text(f"{example.caption}\n")
    assert read_manifest(tmp_path) == wanted


def test_a_line_without_a_caption_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('[{"video": "a.mp4", "caption": "x"}, {"video": "b.mp4"}]')
    with pytest.raises(RequestError, match="entry 2"):
        read_manifest(path)
    path.write_text("[{")
    with pytest.raises(RequestError, match="JSON"):
        read_manifest(path)
    (tmp_path / "c.mp4").touch()
    with pytest.raises(RequestError, match=r"wanted c\.txt"):
        read_manifest(tmp_path)


def test_buckets_off_the_grid_are_refused_with_the_nearest_one() -> None:
    assert parse_buckets("960x544x49; 512x512x1") == (Bucket(960, 544, 49), Bucket(512, 512, 1))
    with pytest.raises(RequestError, match="640x352x33"):
        parse_buckets("640x360x40")
    with pytest.raises(RequestError, match="WIDTHxHEIGHTxFRAMES"):
        parse_buckets("640x352")


def test_shape_then_length_choose_the_bucket() -> None:
    wide, long, tall = Bucket(96, 64, 9), Bucket(96, 64, 17), Bucket(64, 96, 17)
    buckets = (wide, long, tall)
    assert choose_bucket(buckets, (1920, 1080, 100)) == long
    assert choose_bucket(buckets, (1920, 1080, 16)) == wide
    assert choose_bucket(buckets, (1080, 1920, 17)) == tall
    assert choose_bucket(buckets, (1920, 1080, 8)) is None


def test_a_clip_of_a_file_comes_at_its_buckets_size_with_trigger_and_sound(tmp_path: Path) -> None:
    facts = every_fact()[10]
    scenes = WorldClips([facts], Bucket(96, 64, 17), 16.0)
    given = scenes[0]
    path = tmp_path / "clip.mp4"
    settings = VideoSettings(width=96, height=64, fps=Fraction(16), audio_rate=16000, crf=10)
    assert given.waveform is not None
    with create_video(path, settings) as writer:
        writer.write_audio(given.waveform)
        writer.write(given.pixels.transpose(0, 1))
    examples = [Example(path, facts.caption())]
    clips = FileClips(examples, parse_buckets("64x64x9;96x64x25"), "zx")
    assert clips.rejected == []
    clip = clips[0]
    assert clip.caption == f"zx {facts.caption()}"
    assert clip.pixels.shape == (3, 9, 64, 64)
    assert clip.waveform is not None and clip.waveform.shape[1] == 9 * 1000
    sight = look(clip.pixels.transpose(0, 1), clip.fps)
    assert (sight.colour, sight.background) == (facts.colour, facts.background)
    short = FileClips(examples, parse_buckets("64x64x25"))
    assert len(short) == 0 and "too few" in short.rejected[0]


def test_a_world_clip_is_the_same_whenever_it_is_asked_for() -> None:
    clips = WorldClips(every_fact()[:3], Bucket(64, 32, 9), 12.0, seed=5)
    assert torch.equal(clips[1].pixels, clips[1].pixels)
    assert not torch.equal(clips[0].pixels, clips[1].pixels)
