"""Sound files to waveforms and back."""

import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ltxlite.errors import MediaError
from ltxlite.media.audio import as_stereo, fit_length, read_audio, write_wav


def write_pcm(path: Path, codes: bytes, width: int, channels: int, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(codes)


def random_codes(bits: int) -> NDArray[np.int64]:
    codes = np.random.default_rng(bits).integers(-(1 << (bits - 1)), 1 << (bits - 1), 4321)
    codes[:2] = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return codes


@pytest.mark.parametrize("bits", [8, 16, 24])
def test_integer_samples_become_their_exact_share_of_full_scale(tmp_path: Path, bits: int) -> None:
    codes = random_codes(bits)
    if bits == 8:  # WAV stores 8 bits unsigned around 128
        stored = (codes + 128).astype(np.uint8).tobytes()
    else:
        stored = b"".join(int(code).to_bytes(bits // 8, "little", signed=True) for code in codes)
    write_pcm(tmp_path / "x.wav", stored, bits // 8, channels=1, rate=44_100)
    waveform, rate = read_audio(tmp_path / "x.wav")
    assert rate == 44_100
    # A division by a power of two, of at most 24 bits: exact in fp32.
    assert torch.equal(waveform, torch.from_numpy(codes / (1 << (bits - 1))).float()[None])


def test_a_span_is_cut_to_the_sample_and_silence_stands_before_the_start(tmp_path: Path) -> None:
    codes = random_codes(16)
    write_pcm(tmp_path / "x.wav", codes.astype("<i2").tobytes(), 2, channels=1, rate=8000)
    whole, _ = read_audio(tmp_path / "x.wav")
    part, _ = read_audio(tmp_path / "x.wav", start=0.125, duration=Fraction(1, 3))
    assert torch.equal(part, whole[:, 1000 : 1000 + 2667])
    early, _ = read_audio(tmp_path / "x.wav", start=-0.01, duration=0.5)
    assert torch.equal(early, torch.cat([torch.zeros(1, 80), whole[:, :3920]], dim=1))
    tail, _ = read_audio(tmp_path / "x.wav", start=0.5, duration=60)
    assert torch.equal(tail, whole[:, 4000:])


def test_a_written_wav_reads_back_within_half_a_step(tmp_path: Path) -> None:
    waveform = torch.rand(2, 999, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    write_wav(tmp_path / "x.wav", waveform, 48_000)
    back, rate = read_audio(tmp_path / "x.wav")
    assert rate == 48_000 and back.shape == (2, 999)
    # Rounding: half a step; written times 32767 but read over 32768: one step at full scale.
    assert (back - waveform.clamp(-1, 1)).abs().max() <= 1.5 / 32767 + 1e-6
    assert list(tmp_path.iterdir()) == [tmp_path / "x.wav"]


def test_files_without_usable_sound_are_named(tmp_path: Path) -> None:
    write_wav(tmp_path / "x.wav", torch.zeros(1, 8000), 8000)
    content = (tmp_path / "x.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[:5000])
    (tmp_path / "text.wav").write_bytes(b"not a sound" * 100)
    for name, message in [
        ("cut.wav", "ends in the middle"),
        ("text.wav", "no video or sound file"),
        ("absent.wav", "no such file"),
    ]:
        with pytest.raises(MediaError, match=message):
            read_audio(tmp_path / name)
    with pytest.raises(MediaError, match="no sound from second 2 on"):
        read_audio(tmp_path / "x.wav", start=2)


def test_mono_is_doubled_and_surround_refused() -> None:
    mono = torch.rand(1, 7)
    assert torch.equal(as_stereo(mono), torch.cat([mono, mono]))
    with pytest.raises(MediaError, match="stereo"):
        as_stereo(torch.rand(6, 7))


def test_length_is_cut_or_continued_with_silence() -> None:
    waveform = torch.arange(1.0, 6.0).view(1, 5)
    assert fit_length(waveform, 3).tolist() == [[1, 2, 3]]
    assert fit_length(waveform, 7).tolist() == [[1, 2, 3, 4, 5, 0, 0]]
