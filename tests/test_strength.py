"""Strengths of LoRA files: texts, ranges of blocks, streams, and flags that hold a path too."""

import dataclasses
import json

import pytest

from ltxlite.errors import RequestError
from ltxlite.request import build
from ltxlite.strength import Strength, parse_lora, parse_stages, stream_of

OURS = "blocks.7.{}.self_attention.to_q"
THEIRS = "transformer_blocks.7.{}.to_q"
EARLY = Strength(0.8, 0.8, 0.8, steps=((0, 0, 0.5), (4, 7, 1.0)))
TIMED = Strength(seconds=((0.5, 2.0, 0.8), (4.0, None, 1.0)), fade=0.25)


@pytest.mark.parametrize(
    ("module", "stream"),
    [
        (OURS.format("video"), "video"),
        (OURS.format("audio"), "audio"),
        ("blocks.7.audio_to_video.to_k", "cross"),
        ("blocks.7.video_to_audio.to_out", "cross"),
        ("video.cross_adaln.linear", "cross"),
        ("audio.gate_adaln.linear_1", "cross"),
        ("audio.embed", "audio"),
        ("video.head", "video"),
        (THEIRS.format("attn1"), "video"),
        (THEIRS.format("audio_attn2"), "audio"),
        ("transformer_blocks.7.audio_ff.net.2", "audio"),
        ("transformer_blocks.7.audio_to_video_attn.to_k", "cross"),
        ("transformer_blocks.7.video_to_audio_attn.to_k", "cross"),
        ("av_ca_a2v_gate_adaln_single.linear", "cross"),
        ("audio_adaln_single.linear", "audio"),
        ("patchify_proj", "video"),
        ("audio_embeddings_connector.transformer_1d_blocks.0.attn1.to_q", "audio"),
    ],
)
def test_layers_belong_to_the_same_stream_by_our_names_and_by_those_of_files(
    module: str, stream: str
) -> None:
    assert stream_of(module) == stream


@pytest.mark.parametrize(
    ("text", "strength"),
    [
        ("0.8", Strength(0.8, 0.8, 0.8)),
        ("-.5", Strength(-0.5, -0.5, -0.5)),
        ("video=0.8,audio=0.3", Strength(0.8, 0.3, 1.0)),
        ("0.7, audio=0", Strength(0.7, 0.0, 0.7)),
        ("blocks=0-23:0.5", Strength(blocks=((0, 23, 0.5),))),
        ("2,cross=0,blocks=40-47,blocks=3:-1", Strength(2, 2, 0, ((3, 3, -1.0), (40, 47, 1.0)))),
        ("0.8,steps=4-7,steps=0:.5", EARLY),
        ("seconds=4-,seconds=0.5s-2s:0.8,fade=.25", TIMED),
        ("video=0,segments=2-3:0.5", Strength(0.0, segments=((2, 3, 0.5),))),
    ],
)
def test_a_strength_reads_back_from_its_text_and_from_json(text: str, strength: Strength) -> None:
    assert Strength.parse(text) == strength
    assert Strength.parse(str(strength)) == strength
    stored = json.loads(json.dumps(dataclasses.asdict(strength)))
    assert build(Strength, stored, "job") == strength


def test_a_factor_is_that_of_the_stream_times_that_of_the_range() -> None:
    strength = Strength.parse("video=0.8,audio=0.3,blocks=0-6:1,blocks=7-9:0.5")
    assert strength.at("blocks.6.video.feed_forward.up") == 0.8
    assert strength.at("blocks.7.audio.feed_forward.up") == 0.15
    assert strength.at("transformer_blocks.9.audio_to_video_attn.to_q") == 0.5
    assert strength.at("blocks.10.video.feed_forward.up") == 0
    assert strength.at("video.adaln.linear") == 0  # in no block
    # A connector's blocks are not the transformer's.
    assert strength.at("video_embeddings_connector.transformer_1d_blocks.7.attn1.to_q") == 0
    assert Strength.parse("audio=0").at("video.adaln.linear") == 1
    assert Strength.of(0.25).at("audio.head") == 0.25


def test_ranges_of_steps_are_off_beside_them() -> None:
    assert [EARLY.at_step(step) for step in range(6)] == [0.5, 0, 0, 0, 1, 1]
    assert [TIMED.at_step(step) for step in (0, 9)] == [1, 1]
    assert (EARLY.varies, TIMED.varies) == (False, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no number"),
        ("loud", "'loud' is no number"),
        ("vidoe=0.8", "'vidoe=0.8' is amiss"),
        ("0.8,0.3,video=1", "'0.3' is amiss"),
        ("video=1,video=2", "'video=2' is amiss"),
        ("video", "'video' is no number"),
        ("blocks=a-b:1", "'a-b:1' is no range"),
        ("blocks=5-3:1", "ranges go upwards"),
        ("blocks=0-5:1,blocks=5-9:2", "do not overlap"),
        ("steps=3-1", "steps 3-1: ranges go upwards"),
        ("steps=0-3,steps=3-4", "do not overlap"),
        ("segments=0-1", "they count from 1"),
        ("seconds=4-2", "seconds 4-2: ranges go upwards"),
        ("seconds=0-,seconds=3-4", "do not overlap"),
        ("seconds=3", "'3' is no range of seconds"),
        ("seconds=0-1,segments=1", "both seconds and segments"),
        ("fade=1", "fade without seconds"),
        ("seconds=0-1,fade=1,fade=2", "'fade=2' is amiss"),
        ("seconds=0-1,fade=5000", "fade is 5000.0 s, wanted 0 to 3600"),
        ("1e9", "'1e9' is no number"),
        ("101", "wanted -100 to 100"),
        ("nan", "'nan' is no number"),
    ],
)
def test_a_strength_that_cannot_be_read_is_told_in_a_line(text: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        Strength.parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_none_are_refused_in_records_too() -> None:
    with pytest.raises(RequestError, match="nan"):
        Strength(video=float("nan"))


def test_stages_are_numbers_with_commas_or_strengths_with_semicolons() -> None:
    of = Strength.of
    assert parse_stages("0.8,.5") == (of(0.8), of(0.5))
    assert parse_stages("0;1") == (of(0), of(1))
    assert parse_stages("0;video=1,audio=0") == (of(0), Strength(audio=0))
    assert parse_stages("0.5,audio=0") == (Strength(0.5, 0, 0.5),)


@pytest.mark.parametrize(
    ("text", "path", "strengths"),
    [
        ("style.safetensors", "style.safetensors", "1"),
        ("a/b.safetensors:0.8,.5", "a/b.safetensors", "0.8,.5"),
        (r"C:\x\y.safetensors", r"C:\x\y.safetensors", "1"),
        (r"C:\x\y.safetensors:-1", r"C:\x\y.safetensors", "-1"),
        ("C:/x/y.safetensors:0;1", "C:/x/y.safetensors", "0;1"),
        ("odd:name.safetensors:2", "odd:name.safetensors", "2"),
        ("s.safetensors:blocks=0-23:0.5", "s.safetensors", "blocks=0-23:0.5"),
        ("s.safetensors:seconds=0-4:0.8;steps=0", "s.safetensors", "seconds=0-4:0.8;steps=0"),
        ("folder:1/s.safetensors", "folder:1/s.safetensors", "1"),
        ("no-suffix:0.5", "no-suffix", "0.5"),
    ],
)
def test_a_path_keeps_its_colons(text: str, path: str, strengths: str) -> None:
    assert parse_lora(text) == (path, parse_stages(strengths))


def test_a_mistyped_strength_is_no_part_of_the_path() -> None:
    with pytest.raises(RequestError, match="vidoe"):
        parse_lora("style.safetensors:vidoe=0.8")
