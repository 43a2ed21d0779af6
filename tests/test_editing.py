"""Existing clips edited end to end on the demo checkpoint: retake, extend, v2a, v2v, a2v."""

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clip_files import read_pngs, steady, tone, write_clip, write_sound
from PIL import Image
from torch import Tensor

from ltxlite.cli import main
from ltxlite.media.audio import read_audio
from ltxlite.media.stereo import read_stereo
from ltxlite.media.timing import frames_at, read_timing
from ltxlite.media.video_reader import iter_frames, read_video, read_video_info

FILM, VIDEO = Fraction(24000, 1001), Fraction(30)
DemoFiles = tuple[Path, Path, Path]


@dataclass(frozen=True)
class Bench:
    """Runs verbs on the demo checkpoint in a folder of its own."""

    files: DemoFiles
    folder: Path
    capture: pytest.CaptureFixture[str]

    def run(self, verb: str, *words: str | Path) -> str:
        """Run a verb; return what it told on stderr."""
        assert main(self._words(verb, words)) == 0, self.capture.readouterr().err
        return self.capture.readouterr().err

    def refused(self, verb: str, *words: str | Path) -> str:
        """Run a verb that must fail; return its one line."""
        assert main(self._words(verb, words)) == 1
        lines = self.capture.readouterr().err.strip().splitlines()
        return lines[-1]

    def _words(self, verb: str, words: tuple[str | Path, ...]) -> list[str]:
        model, upscaler, encoder = self.files
        return [
            *(verb, *map(str, words), "--model", str(model), "--upscaler", str(upscaler)),
            *("--text-encoder", str(encoder), "--prompt", "rain", "--sigmas", "1,0.4,0"),
        ]


@pytest.fixture
def bench(demo_files: DemoFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(demo_files, tmp_path, capsys)


def clip(
    bench: Bench, frames: int, fps: Fraction, size: tuple[int, int] = (96, 64), sound: bool = True
) -> Path:
    seconds = float(frames / fps)
    track = (tone(2, seconds, 44_100), 44_100) if sound else None
    return write_clip(bench.folder / "source.mp4", steady(frames, fps), size, track)


def own_frames(path: Path) -> Tensor:
    return torch.stack(list(iter_frames(path)))


def differing(made: Tensor, own: Tensor) -> list[int]:
    return [number for number in range(len(own)) if not torch.equal(made[number], own[number])]


def own_sound(path: Path, seconds: Fraction) -> Tensor:
    return read_stereo(path, -read_video_info(path).sound_delay, seconds).waveform


@pytest.mark.parametrize(
    ("fps", "size"), [(FILM, (96, 64)), (VIDEO, (101, 57)), (VIDEO, (70, 122))]
)
def test_a_retake_changes_its_part_and_returns_all_else_bit_for_bit(
    bench: Bench, fps: Fraction, size: tuple[int, int]
) -> None:
    source = clip(bench, 30, fps, size)
    output = bench.folder / "made"
    begin, end = 0.5, 0.8
    told = bench.run("retake", source, "--from", "0.5", "--to", "0.8", "-o", output)
    own = own_frames(source)
    own = own[:, : size[1] // 2 * 2, : size[0] // 2 * 2]
    made = read_pngs(output)
    assert made.shape == own.shape
    # Latents touched by the part: frames 9..16 and 17..24 at both rates (12 to 19, 15 to 24).
    changed = list(range(9, 25))
    assert differing(made, own) == changed
    assert "frames 9 to 24 of 30 are made anew" in told
    waveform, rate = read_audio(output / "audio.wav")
    assert (rate, waveform.shape[1]) == (44_100, round(30 / fps * 44_100))
    kept = own_sound(source, 30 / fps)
    # A latent of sound is 40 ms, and the part is widened to whole ones: one at each end.
    first, last = round((begin - 0.041) * rate), round((end + 0.041) * rate)
    # Written as 16 bits: half a step.
    half = 0.51 / 32768
    assert (waveform - kept)[:, :first].abs().max() <= half
    assert (waveform - kept)[:, last:].abs().max() <= half
    inside = slice(round((begin + 0.02) * rate), round((end - 0.02) * rate))
    assert (waveform - kept)[:, inside].abs().mean() > 0.01


def test_a_retake_of_the_picture_leaves_the_sound_and_the_other_way_round(bench: Bench) -> None:
    source = clip(bench, 17, VIDEO)
    own, sound = own_frames(source), own_sound(source, 17 / VIDEO)
    common = ("retake", source, "--from", "0.1", "--to", "0.2", "-o")
    bench.run(*common, bench.folder / "picture", "--only", "video")
    assert differing(read_pngs(bench.folder / "picture"), own) == list(range(1, 9))
    waveform, _ = read_audio(bench.folder / "picture" / "audio.wav")
    assert (waveform - sound).abs().max() <= 0.51 / 32768
    bench.run(*common, bench.folder / "sound", "--only", "audio")
    assert differing(read_pngs(bench.folder / "sound"), own) == []
    waveform, _ = read_audio(bench.folder / "sound" / "audio.wav")
    assert (waveform - sound).abs().max() > 0.01


def test_the_model_sees_a_window_of_a_long_clip(bench: Bench) -> None:
    source = clip(bench, 70, FILM, (64, 64))
    told = bench.run(
        *("retake", source, "--from", "1.5", "--to", "1.6", "--window", "25"),
        *("-o", bench.folder / "made"),
    )
    # Frames 36 to 38, and 12 on each side: 37 - 12.5 rounds to 25; latents 9..16 of the window.
    assert "seen by the model with frames 25 to 49" in told
    made = read_pngs(bench.folder / "made")
    assert differing(made, own_frames(source)) == list(range(34, 42))


def test_a_clip_of_variable_rate_keeps_its_frames(bench: Bench) -> None:
    times = [Fraction(n * n + 20 * n, 1000) for n in range(24)]
    source = write_clip(bench.folder / "phone.mp4", times, (64, 64))
    told = bench.run(
        *("retake", source, "--fps", "24", "--from", "0.5", "--to", "0.6"),
        *("-o", bench.folder / "made"),
    )
    assert "variable frame rate, brought to 24 fps by the nearest frames" in told
    own = torch.stack(list(frames_at(source, read_timing(source).numbers(Fraction(24)))))
    made = read_pngs(bench.folder / "made")
    assert differing(made, own) == list(range(9, 17))
    assert not (bench.folder / "made" / "audio.wav").exists()


@pytest.mark.parametrize("backward", [False, True])
def test_an_extended_clip_begins_or_ends_with_the_clip_itself(bench: Bench, backward: bool) -> None:
    source = clip(bench, 30, FILM)
    where = ("--backward",) if backward else ()
    bench.run(
        "extend", source, "--by", "0.7", "--overlap", "18", *where, "-o", bench.folder / "made"
    )
    # 0.7 s are 16.8 frames: two groups of eight; a clip's first group has one frame more.
    added = 17 if backward else 16
    own, made = own_frames(source), read_pngs(bench.folder / "made")
    assert len(made) == 30 + added
    kept = made[added:] if backward else made[:30]
    assert torch.equal(kept, own)
    waveform, rate = read_audio(bench.folder / "made" / "audio.wav")
    assert waveform.shape[1] == round((30 + added) / FILM * rate)
    sound = own_sound(source, 30 / FILM)
    margin = round(0.061 * rate)  # a latent and a fade
    if backward:
        difference = (waveform[:, -sound.shape[1] :] - sound)[:, margin:]
        # The beginning of the clip is not on a sample: one may be rounded the other way.
        assert min(difference.abs().max(), _shifted(waveform, sound, margin)) <= 0.51 / 32768
    else:
        difference = (waveform[:, : sound.shape[1]] - sound)[:, :-margin]
        assert difference.abs().max() <= 0.51 / 32768
    assert waveform[:, :1000].abs().max() > 1e-3
    # The decoder ends up to 50 ms before the clip does: silence follows.
    assert waveform[:, -5000:-3000].abs().max() > 1e-3


def _shifted(waveform: Tensor, sound: Tensor, margin: int) -> Tensor:
    length = sound.shape[1] - 1
    return (waveform[:, -length:] - sound[:, :length])[:, margin:].abs().max()


def test_video_to_audio_copies_the_picture_and_makes_the_sound(bench: Bench) -> None:
    source = clip(bench, 31, Fraction(60), (101, 57), sound=False)
    target = bench.folder / "loud.mp4"
    told = bench.run("v2a", source, "-o", target)
    assert "its picture is copied as it is stored" in told
    before, after = read_video(source), read_video(target)
    assert torch.equal(after.frames, before.frames)
    assert read_timing(target) == read_timing(source)
    assert after.waveform is not None
    assert after.waveform.abs().max() > 1e-3
    # AAC ends on a frame of 1024 samples.
    surplus = after.waveform.shape[1] - 31 / Fraction(60) * 48_000
    assert 0 <= surplus <= 1024


def test_an_upscaled_clip_has_twice_the_size_its_own_frames_and_its_own_sound(
    bench: Bench,
) -> None:
    source = clip(bench, 12, VIDEO, (70, 52))
    job = bench.folder / "job.json"
    bench.run("upscale", source, "--save-job", job, "-o", bench.folder / "made")
    stages = json.loads(job.read_text())["stages"]
    assert [(stage["scale"], stage["upscaler"]) for stage in stages] == [("1/2", None), ("1", "x2")]
    assert stages[1]["sound"] == "freeze"
    made = read_pngs(bench.folder / "made")
    assert made.shape == (12, 104, 140, 3)
    waveform, rate = read_audio(bench.folder / "made" / "audio.wav")
    assert (rate, waveform.shape[1]) == (44_100, round(12 / VIDEO * 44_100))
    assert (waveform - own_sound(source, 12 / VIDEO)).abs().max() <= 0.51 / 32768


def test_a_mask_keeps_what_lies_outside_of_its_places(bench: Bench) -> None:
    source = clip(bench, 9, VIDEO, (96, 64))
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[40:50, 70:80] = 255  # in the latent place of rows 32 to 63, columns 64 to 95
    Image.fromarray(mask.numpy()).save(bench.folder / "mask.png")
    bench.run("retake", source, "--mask", bench.folder / "mask.png", "-o", bench.folder / "made")
    own, made = own_frames(source), read_pngs(bench.folder / "made")
    changed = (made != own).any(-1)
    assert not changed[:, :32].any()
    assert not changed[:, :, :64].any()
    assert changed[:, 40:, 72:].float().mean() > 0.9
    waveform, _ = read_audio(bench.folder / "made" / "audio.wav")
    assert (waveform - own_sound(source, 9 / VIDEO)).abs().max() <= 0.51 / 32768


@pytest.mark.parametrize("sound", [True, False])
def test_video_to_video_starts_from_the_clip(bench: Bench, sound: bool) -> None:
    source = clip(bench, 9, FILM, sound=sound)
    job = bench.folder / "job.json"
    arguments = ("--init-video", source, "--size", "64x64", "--frames", "9", "--stages", "1")
    words = bench._words("generate", (*arguments, "--denoise", "0.4", "-o", bench.folder / "made"))
    assert main([*words[:-2], "--save-job", str(job)]) == 0
    saved = json.loads(job.read_text())
    assert saved["stages"][0]["sigmas"] == "simple:steps=8,denoise=0.4"
    assert saved["conditions"]["source"]["denoise"] == 0.4
    assert read_pngs(bench.folder / "made").shape == (9, 64, 64, 3)
    waveform, rate = read_audio(bench.folder / "made" / "audio.wav")
    assert waveform.shape[1] == round(Fraction(9, 24) * rate)
    # The clip's own sound, at its rate; without one, what the model made.
    assert rate == (44_100 if sound else 48_000)
    assert waveform.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "codec", "layout", "rate"),
    [
        ("mono.wav", "pcm_s16le", "mono", 44_100),
        ("stereo.wav", "pcm_s16le", "stereo", 44_100),
        ("song.mp3", "libmp3lame", "stereo", 44_100),
        ("mono.mp3", "libmp3lame", "mono", 44_100),
        ("voice.m4a", "aac", "mono", 44_100),
        ("song.m4a", "aac", "stereo", 44_100),
        ("film.wav", "pcm_s16le", "5.1", 48_000),
    ],
)
def test_given_sound_is_kept_at_exactly_the_length_of_the_clip(
    bench: Bench, name: str, codec: str, layout: str, rate: int
) -> None:
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    path = write_sound(bench.folder / name, codec, (tone(channels, 1, rate), rate), layout)
    told = bench.run(
        *("generate", "--audio", path, "--audio-start", "0.25", "--size", "64x64"),
        *("--frames", "9", "--fps", "24000/1001", "--stages", "1", "-o", bench.folder / "made"),
    )
    assert ("mixed down to stereo" in told) == (layout == "5.1")
    assert "silence follows" not in told
    waveform, kept_rate = read_audio(bench.folder / "made" / "audio.wav")
    seconds = 9 / FILM
    assert (kept_rate, waveform.shape) == (rate, (2, round(seconds * rate)))
    own = read_stereo(path, Fraction(1, 4), seconds).waveform
    assert (waveform - own).abs().max() <= 0.51 / 32768
    assert len(read_pngs(bench.folder / "made")) == 9


def test_short_sound_is_continued_with_silence_and_that_is_told(bench: Bench) -> None:
    path = write_sound(bench.folder / "a.wav", "pcm_s16le", (tone(1, 0.2, 16_000), 16_000), "mono")
    told = bench.run(
        *("generate", "--audio", path, "--size", "64x64", "--frames", "17", "--stages", "1"),
        *("-o", bench.folder / "made"),
    )
    assert "lasts 0.20 s from second 0 on, the clip 0.71 s; silence follows it" in told
    waveform, rate = read_audio(bench.folder / "made" / "audio.wav")
    assert (rate, waveform.shape[1]) == (16_000, round(17 / 24 * 16_000))
    assert waveform[:, 3300:].abs().max() == 0


def test_sound_and_image_steer_one_clip_through_two_stages(bench: Bench) -> None:
    path = write_sound(bench.folder / "a.wav", "pcm_s16le", (tone(2, 1, 44_100), 44_100), "stereo")
    picture = torch.randint(0, 256, (50, 90, 3), dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(bench.folder / "a.png")
    bench.run(
        *("generate", "--audio", path, "--image", bench.folder / "a.png", "--size", "64x64"),
        *("--frames", "9", "--stages", "2", "-o", bench.folder / "made"),
    )
    waveform, _ = read_audio(bench.folder / "made" / "audio.wav")
    own = read_stereo(path, 0, Fraction(9, 24)).waveform
    assert (waveform - own).abs().max() <= 0.51 / 32768


def test_wrong_use_is_answered_in_one_line(bench: Bench) -> None:
    source = clip(bench, 17, VIDEO, (64, 64))
    silent = bench.folder / "silent.wav"
    write_sound(silent, "pcm_s16le", (tone(1, 0.1, 16_000), 16_000), "mono")
    output = ("-o", bench.folder / "made")
    assert "nothing lies between" in bench.refused("retake", source, "--from", "2", *output)
    assert "ends at 0.567 s" in bench.refused("retake", source, "--to", "3", *output)
    few = ("--from", "0", "--to", "0.5", "--window", "9")
    assert "the part has 15 frames" in bench.refused("retake", source, *few, *output)
    assert "wanted more than 0 seconds" in bench.refused("extend", source, "--by", "0", *output)
    assert "--overlap 0" in bench.refused("extend", source, "--by", "1", "--overlap", "0", *output)
    assert "would be overwritten" in bench.refused("extend", source, "--by", "1", "-o", source)
    assert "no such file" in bench.refused("v2a", bench.folder / "none.mp4", *output)
    assert "has no pictures" in bench.refused("v2a", silent, *output)
    moving = bench.folder / "a.gif"
    Image.new("L", (64, 64)).save(
        moving, save_all=True, append_images=[Image.new("L", (64, 64), 9)]
    )
    assert "gif pictures cannot" in bench.refused("v2a", moving, "-o", bench.folder / "a.mp4")
    late = ("generate", "--audio", silent, "--audio-start", "4", "--size", "64x64", "--frames", "9")
    assert "has no sound from second 4 on" in bench.refused(*late, *output)
    assert "--frames goes with generate" in bench.refused("v2a", source, "--frames", "9", *output)
    masked = ("extend", source, "--by", "1", "--mask", "m.png")
    assert "--mask goes with retake" in bench.refused(*masked, *output)
    Image.new("L", (32, 32)).save(bench.folder / "mask.png")
    line = bench.refused("retake", source, "--mask", bench.folder / "mask.png", *output)
    assert "mask" in line and "is 32x32, the clip 64x64" in line


def test_wrong_media_are_refused_before_anything_is_loaded(bench: Bench) -> None:
    source = clip(bench, 9, FILM, (64, 64))
    voice = write_sound(bench.folder / "a.wav", "pcm_s16le", (tone(1, 1, 16_000), 16_000), "mono")
    job = bench.folder / "job.json"
    output = ("-o", bench.folder / "made")
    bench.run("retake", source, "--to", "0.1", "--save-job", job, *output)
    good = json.loads(job.read_text())
    for change, line in (
        ({"source": {**good["conditions"]["source"], "held": [2]}}, "held in stages (2,) of 1"),
        ({"source": {**good["conditions"]["source"], "video": [9, 10]}}, "video from 9 s on"),
        ({"source": {**good["conditions"]["source"], "magnify": "7"}}, "magnify '7'"),
        ({"source": {**good["conditions"]["source"], "path": "gone.mp4"}}, "no such file"),
        ({"sound": {"path": str(voice)}}, "leave --audio out"),
    ):
        conditions = {**good["conditions"], **change}
        job.write_text(json.dumps({**good, "conditions": conditions}))
        assert main(["generate", "--job", str(job), "-o", str(bench.folder / "other")]) == 1
        told = bench.capture.readouterr().err.strip().splitlines()
        assert line in told[-1]
        assert not any("text_encoder" in note for note in told)
