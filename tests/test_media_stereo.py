"""Sound of any layout, rate and container as stereo; resampling; splicing."""

import math
from pathlib import Path

import pytest
import torch
from clip_files import tone, write_sound

from ltxlite.errors import MediaError
from ltxlite.media.audio import read_audio, write_wav
from ltxlite.media.stereo import change_rate, mix_down, read_stereo, splice


@pytest.mark.parametrize(
    ("name", "codec", "layout"),
    [("a.wav", "pcm_s16le", "stereo"), ("a.mp3", "libmp3lame", "stereo"), ("a.m4a", "aac", "mono")],
)
def test_the_usual_files_become_stereo_at_their_own_rate(
    tmp_path: Path, name: str, codec: str, layout: str
) -> None:
    given = tone(1 if layout == "mono" else 2, 1, 44_100)
    sound = read_stereo(write_sound(tmp_path / name, codec, (given, 44_100), layout))
    assert (sound.rate, sound.remarks) == (44_100, ())
    # MP3 and AAC end on a frame of theirs, of 1152 and 1024 samples.
    assert 0 <= sound.waveform.shape[1] - 44_100 <= 1152
    middle = slice(2000, 40_000)
    wanted = torch.from_numpy(given)[:, middle].expand(2, -1)
    # Coding at 128 kbit/s: a few percent; half of the tone itself would be 0.12.
    assert (sound.waveform[:, middle] - wanted).square().mean().sqrt() < 0.02


def test_surround_is_mixed_down_and_said(tmp_path: Path) -> None:
    given = (tone(6, 1, 48_000), 48_000)
    sound = read_stereo(write_sound(tmp_path / "s.wav", "pcm_s16le", given, "5.1"))
    assert sound.remarks == ("6 channels (FL FR FC LFE BL BR) are mixed down to stereo",)
    voices, side = torch.from_numpy(given[0]), math.sqrt(0.5)
    left = voices[0] + side * (voices[2] + voices[4])
    right = voices[1] + side * (voices[2] + voices[5])
    wanted = torch.stack([left, right])
    wanted /= wanted.abs().max().clamp(min=1)
    # 16-bit rounding of three channels.
    assert (sound.waveform - wanted).abs().max() < 3 / 32768


def test_a_loud_mix_is_made_quieter_instead_of_clipping() -> None:
    mixed = mix_down(torch.ones(3, 7), ("FL", "FR", "FC"))
    assert torch.equal(mixed, torch.ones(2, 7))


def test_a_rate_that_files_cannot_hold_is_resampled_and_said(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", "pcm_s16le", (tone(1, 1, 37_000), 37_000), "mono")
    sound = read_stereo(path)
    assert sound.rate == 48_000
    assert sound.waveform.shape == (2, 48_000)
    assert sound.remarks == ("37000 Hz, resampled to 48000 Hz",)


def test_resampling_keeps_pitch_time_and_length() -> None:
    slow, fast = (torch.from_numpy(tone(2, 1, rate)) for rate in (44_100, 48_000))
    resampled = change_rate(slow, 44_100, 48_000)
    assert resampled.shape == (2, 48_000)
    # In the middle: the filter's stop band of -100 dB; at the ends it sees the sound stop.
    assert (resampled - fast)[:, 200:-200].abs().max() < 1e-4
    assert change_rate(slow, 44_100, 44_100) is slow


def test_a_splice_leaves_everything_outside_alone_and_fades_inside() -> None:
    original, made = torch.full((2, 100), 0.5), torch.full((2, 30), -0.5)
    result = splice(original, made, 40, 10)
    assert torch.equal(result[:, :40], original[:, :40])
    assert torch.equal(result[:, 70:], original[:, 70:])
    assert torch.equal(result[:, 50:60], made[:, 10:20])
    falling = 0.5 - (torch.arange(10) + 0.5) / 10
    # fp32 arithmetic on values of a half.
    assert torch.allclose(result[:, 40:50], falling.expand(2, -1), atol=1e-6)
    assert torch.equal(original, torch.full((2, 100), 0.5))


def test_a_splice_does_not_fade_at_the_ends_of_the_clip() -> None:
    original, made = torch.zeros(2, 20), torch.ones(2, 50)
    assert torch.equal(splice(original, made, 0, 4), torch.ones(2, 20))


def test_16_bit_sound_is_written_back_as_the_same_codes(tmp_path: Path) -> None:
    path = write_sound(
        tmp_path / "a.wav", "pcm_s16le", (tone(2, 0.1, 48_000) * 3, 48_000), "stereo"
    )
    waveform, rate = read_audio(path)
    write_wav(tmp_path / "b.wav", waveform, rate)
    assert torch.equal(read_audio(tmp_path / "b.wav")[0], waveform)


def test_sound_that_begins_after_the_file_ends_is_an_error(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", "pcm_s16le", (tone(1, 1, 48_000), 48_000), "mono")
    with pytest.raises(MediaError, match="no sound from second 2 on"):
        read_stereo(path, 2)
