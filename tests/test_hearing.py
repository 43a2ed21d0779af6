"""Given sound in its details: what follows its end, who hears what, rushing, loudness."""

import argparse
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import tone, write_sound
from resume_support import every_progress, request_of, tiny_networks
from torch import Tensor

from ltxlite import conditioning
from ltxlite.account import Component, Levers, StageJob, job_of
from ltxlite.account.stage import stage_phases
from ltxlite.cli import main
from ltxlite.cli.steering import add_steering, with_media
from ltxlite.conditioning import StageContext
from ltxlite.conditions import Conditions, Sound, Voice
from ltxlite.errors import RequestError
from ltxlite.geometry import (
    AudioGrid,
    ClipShape,
    LatentGrid,
    audio_positions,
    patchify_audio,
    video_positions,
)
from ltxlite.given import GivenSound, StageGiven
from ltxlite.given.ambience import pink_noise, with_ambience
from ltxlite.given.encode import check_given, encode_given
from ltxlite.given.sound import delivered_original, known_latents
from ltxlite.media.stereo import read_stereo
from ltxlite.media.video_reader import read_video
from ltxlite.models.transformer_config import StreamConfig, TransformerConfig
from ltxlite.networks import Networks
from ltxlite.pipeline import encode, run_stages
from ltxlite.progress import Clock, Report
from ltxlite.request import Request, Stage
from ltxlite.sampling.contract import Prediction, State, Tools
from ltxlite.sampling.samplers import sample
from ltxlite.saved_state import conditions, encode_state, read_state
from ltxlite.steering import steer
from ltxlite.steering.sound_norm import SoundNorm

GRID = AudioGrid()
RATE = 22_050
DemoFiles = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def networks() -> Networks:
    return tiny_networks()


def file_of(folder: Path, name: str, seconds: float) -> str:
    sound = (tone(1, seconds, RATE), RATE)
    return str(write_sound(folder / f"{name}.wav", "pcm_s16le", sound, "mono"))


def job(folder: Path, sound: Sound, *stages: Stage, **changes: Any) -> Request:
    stages = stages or (Stage(sigmas="linq:2"),)
    given = Conditions(sound=sound)
    return request_of(folder, *stages, frames=25, conditions=given, **changes)


class Notes(Report):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_short_sound_is_a_prefix_whose_rest_is_made(tmp_path: Path, networks: Networks) -> None:
    # 0.5 s are 50 mel frames; latent j needs 4 j + 1 of them, so 13 latents (j = 0 to 12) are full.
    request = job(tmp_path, Sound(file_of(tmp_path, "short", 0.5), pad="prefix"))
    notes = Notes()
    given = encode_given(request, networks, Clock(notes)).of(0).sound
    assert given is not None
    assert (given.latent.shape[2], given.known) == (26, 13)
    assert any("lasts 0.50 s from second 0 on" in line for line in notes.lines)
    assert any("the rest is made" in line for line in notes.lines)
    for pad in ("silence", "prefix"):
        whole = job(tmp_path, Sound(file_of(tmp_path, "long", 1.2), pad=pad))
        found = encode_given(whole, networks, Clock(Report())).of(0).sound
        assert found is not None and found.known == 26


@pytest.mark.parametrize(("samples", "known"), [(0.009, 0), (0.0101, 1), (0.0499, 1), (0.0501, 2)])
def test_a_latent_is_known_when_the_file_fills_it(
    tmp_path: Path, samples: float, known: int
) -> None:
    request = job(tmp_path, Sound(file_of(tmp_path, "tiny", samples), pad="prefix"))
    assert known_latents(request, GRID) == known


def test_a_short_sound_may_be_an_error(tmp_path: Path, networks: Networks) -> None:
    request = job(tmp_path, Sound(file_of(tmp_path, "short", 0.5), pad="error"))
    with pytest.raises(RequestError, match=r"lasts 0\.50 s .* --audio-pad says") as caught:
        check_given(request, networks)
    assert "\n" not in str(caught.value)
    check_given(job(tmp_path, Sound(file_of(tmp_path, "long", 1.05), pad="error")), networks)


@pytest.mark.parametrize("denoise", [0.0, 0.3])
def test_the_mask_of_a_prefix_is_that_of_the_sound_and_then_one(denoise: float) -> None:
    shape = ClipShape(2, 2, 3, 9, 24.0)
    video = conditioning.start(
        torch.zeros(1, 12, 4), video_positions((2, 2, 3), 24.0, LatentGrid())
    )
    audio = conditioning.start(torch.full((1, 9, 8), 7.0), audio_positions(9, GRID))
    latent = torch.randn(1, 2, 9, 4)
    given = StageGiven(sound=GivenSound(latent, 4))
    asked = Conditions(sound=Sound("a", denoise=denoise, output="decoded", pad="prefix"))
    for number in range(2):
        stage = StageContext(number, shape, 9, Fraction(24), LatentGrid(), GRID)
        _, sound = steer((video, audio), asked, given, stage)
        wanted = torch.tensor([denoise] * 4 + [1.0] * 5)
        assert torch.equal(sound.mask[0, :, 0], wanted)
        assert not sound.frozen
        assert torch.equal(sound.clean, patchify_audio(latent))
        assert torch.equal(sound.initial, audio.initial if number else patchify_audio(latent))
    held = conditioning.freeze(audio)
    stage = StageContext(1, shape, 9, Fraction(24), LatentGrid(), GRID)
    assert steer((video, held), asked, given, stage)[1] is held, "what stage 1 made is kept"


def test_the_clip_has_the_files_sound_and_then_what_was_made(tmp_path: Path) -> None:
    path = file_of(tmp_path, "short", 0.5)
    made = (torch.rand(2, 50_000) - 0.5, 48_000)
    delivered = delivered_original(job(tmp_path, Sound(path, pad="prefix")), made)
    assert delivered is not None
    waveform, rate = delivered
    own = read_stereo(Path(path)).waveform
    assert (rate, waveform.shape[1]) == (RATE, round(25 / 24 * RATE))
    fade = round(rate / 50)
    assert torch.equal(waveform[:, : own.shape[1] - fade], own[:, :-fade])
    assert waveform[:, own.shape[1] :].abs().mean() > 0.1, "no silence follows"
    silent = delivered_original(job(tmp_path, Sound(path)), made)
    assert silent is not None and not bool(silent[0][:, own.shape[1] :].any())


def test_one_file_is_heard_by_the_model_and_another_by_people(
    tmp_path: Path, networks: Networks
) -> None:
    voice, song = file_of(tmp_path, "vocals", 1.1), str(tmp_path / "song.wav")
    write_sound(Path(song), "pcm_s16le", (tone(2, 1.1, 48_000) * 0.5, 48_000), "stereo")
    request = job(tmp_path, Sound(voice, 0.05, heard=song))
    plain = job(tmp_path, Sound(voice, 0.05))
    given, alone = (
        encode_given(each, networks, Clock(Report())).of(0).sound for each in (request, plain)
    )
    assert given is not None and alone is not None
    assert torch.equal(given.latent, alone.latent)
    delivered = delivered_original(request, (torch.zeros(2, 9), 48_000))
    assert delivered is not None
    wanted = read_stereo(Path(song), 0.05, Fraction(25, 24)).waveform
    assert delivered[1] == 48_000
    assert torch.equal(delivered[0][:, : wanted.shape[1]], wanted)
    assert request.conditions.media() == (voice, song)
    with pytest.raises(Exception, match="no such file"):
        check_given(job(tmp_path, Sound(voice, heard=str(tmp_path / "none.wav"))), networks)


def test_ambience_is_pink_as_loud_as_said_and_never_delivered(
    tmp_path: Path, networks: Networks
) -> None:
    silence = torch.zeros(2, 96_001)
    noise = with_ambience(silence, 0.01, seed=3)
    level = 20 * noise.square().mean(1).sqrt().log10()
    torch.testing.assert_close(level, torch.full((2,), -40.0), rtol=0, atol=1e-3)
    assert torch.equal(noise, with_ambience(silence, 0.01, seed=3))
    assert not torch.equal(noise, with_ambience(silence, 0.01, seed=4))
    assert with_ambience(silence, 0.0, seed=3) is silence
    power = torch.fft.rfft(pink_noise(1 << 17, 0)).abs().square().sum(0)
    octaves = [float(power[1 << n : 1 << (n + 1)].sum()) for n in range(8, 16)]
    # Equal power in each octave, up to what 256 and more random values scatter: 1 / 16 each.
    assert max(octaves) / min(octaves) < 1.3
    assert not math.isnan(float(pink_noise(1, 0).sum()))
    path = file_of(tmp_path, "speech", 1.1)
    quiet, rushing = (job(tmp_path, Sound(path, ambience=level)) for level in (0.0, 0.05))
    given = [encode_given(each, networks, Clock(Report())).of(0).sound for each in (quiet, rushing)]
    assert given[0] is not None and given[1] is not None
    assert (given[0].latent - given[1].latent).abs().max() > 1e-3
    nothing = (torch.zeros(2, 9), 48_000)
    first, second = (delivered_original(each, nothing) for each in (quiet, rushing))
    assert first is not None and second is not None and torch.equal(first[0], second[0])


class Halver:
    """A denoiser that is easy to follow by hand: it predicts half of what it sees."""

    def __call__(self, state: State, sigma: float) -> Prediction:
        return Prediction(tuple(x / 2 for x in state))


def test_after_each_step_the_sound_is_scaled_and_its_noise_mixed_in_anew() -> None:
    video = conditioning.start(torch.zeros(1, 2, 3), torch.zeros(1, 3, 2, 2))
    audio = conditioning.start(torch.zeros(1, 4, 5), torch.zeros(1, 1, 4, 2))
    mask = torch.tensor([1.0, 1.0, 0.5, 0.0])[None, :, None]
    audio = replace(audio, mask=mask, clean=torch.full((1, 4, 5), 3.0))
    noises = torch.randn(1, 2, 3), torch.randn(1, 4, 5)
    start = tuple(s.noised(n, 1.0) for s, n in zip((video, audio), noises, strict=True))
    tools = Tools(Halver(), lambda _: noises, lambda state: state)
    normed = SoundNorm((1.0, 0.25), (video, audio), noises).within(tools)
    sigmas = (1.0, 0.8, 0.5, 0.0)
    shown, heard = sample("euler", start, sigmas, normed)

    def again(x0: Tensor, state: conditioning.LatentState, noise: Tensor, sigma: float) -> Tensor:
        mixed = (1 - sigma) * x0 + sigma * noise
        return state.clean * (1 - state.mask) + mixed * state.mask

    x, y = start
    x, y = (each + (0.8 - 1.0) * (each - each / 2) / 1.0 for each in (x, y))  # factor 1: as ever
    for following in (0.5, 0.0):  # the last factor serves the rest
        x = again(x / 2, video, noises[0], following)
        y = again(y / 2 * (0.25 * mask + 1 - mask), audio, noises[1], following)
    torch.testing.assert_close(shown, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(heard, y, rtol=0, atol=1e-6)
    assert torch.equal(heard[:, 3], torch.full((1, 5), 3.0)), "kept sound stays"


def test_factors_of_one_change_no_bit_and_a_stopped_run_goes_on(
    tmp_path: Path, networks: Networks
) -> None:
    plain = request_of(tmp_path, Stage(sigmas="linq:3", sampler="euler_ancestral"))
    ones = replace(plain, stages=(replace(plain.stages[0], audio_norm=(1.0,)),))
    quiet = replace(plain, stages=(replace(plain.stages[0], audio_norm=(1.0, 0.25, 1.0)),))
    prompts = encode(plain, networks, Clock(Report()))
    first, second, third = (every_progress(r, networks, prompts) for r in (plain, ones, quiet))
    assert torch.equal(first[-1].latents.audio, second[-1].latents.audio)
    assert torch.equal(first[0].position.carry["x"][1], third[0].position.carry["x"][1])
    assert not torch.equal(first[-1].latents.audio, third[-1].latents.audio)
    path = tmp_path / "state"
    for step in third[:-1]:
        path.write_bytes(b"".join(encode_state(step, conditions(quiet, networks))))
        back = read_state(path, quiet, networks)
        *_, last = run_stages(quiet, networks, prompts, back, Clock(Report()))
        assert torch.equal(last.latents.audio, third[-1].latents.audio)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Sound("a", ambience=0.5), "ambience 0.5"),
        (lambda: Sound("a", heard=""), "no file name"),
        (lambda: Sound("a", heard="b", output="decoded"), "people hear b"),
        (lambda: Stage(audio_norm=(-1.0,)), "factors from 0 to 10"),
        (lambda: Stage(audio_norm=(1.0,), sampler="dpmpp_2m"), "which dpmpp_2m cannot"),
        (lambda: Stage(audio_norm=(1.0,), sampler="res_2s"), "which res_2s cannot"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        make()
    assert "\n" not in str(caught.value)


def flags(*arguments: str) -> Conditions:
    parser = argparse.ArgumentParser()
    add_steering(parser)
    return with_media(Conditions(), parser.parse_args(arguments))


def test_flags_become_records_that_come_back_from_a_job_file() -> None:
    found = flags(
        *("--audio", "song.mp3", "--audio-cond", "vocals.wav", "--audio-start", "2.5"),
        *("--audio-ambience", "0.01", "--audio-pad", "prefix"),
    )
    assert found.sound == Sound("vocals.wav", 2.5, heard="song.mp3", ambience=0.01, pad="prefix")
    spoken = flags("--ref-audio", "v.wav", "--ref-audio-seconds", "3", "--identity-guidance", "0")
    assert spoken.voice == Voice("v.wav", seconds=3.0, identity=0.0)
    stage = Stage(audio_norm=(1.0, 0.25))
    for given in (found, spoken):
        request = request_of(Path(), stage, conditions=given)
        assert Request.from_json(request.to_json(), "job") == request


@pytest.mark.parametrize("name", ["cond", "ambience", "pad", "start"])
def test_flags_without_a_sound_are_refused(name: str) -> None:
    value = {"cond": "x.wav", "ambience": "0.1", "pad": "error", "start": "1"}[name]
    with pytest.raises(RequestError, match=f"--audio-{name} without --audio"):
        flags(f"--audio-{name}", value)


def test_the_account_counts_levels_of_sound_that_is_partly_made(tmp_path: Path) -> None:
    networks = tiny_networks()
    path = file_of(tmp_path, "short", 0.5)
    plain, kept, prefix, mixed = (
        job_of(job(tmp_path, sound), networks).stages[0]
        for sound in (
            Sound(path, denoise=1.0, output="decoded"),
            Sound(path),
            Sound(path, pad="prefix"),
            Sound(path, denoise=0.4, output="decoded"),
        )
    )
    assert plain.partly and mixed.partly and prefix.partly and not kept.partly
    steps = kept.evaluations + 1
    assert kept.levels == steps
    assert prefix.levels == mixed.levels == 2 * steps


def test_a_voice_costs_its_tokens_and_one_more_pass() -> None:
    small = TransformerConfig(
        StreamConfig(12, 12, 4, 32, 128, (20, 64, 64)),
        StreamConfig(10, 10, 4, 16, 64, (20,)),
        3,
        64,
    )
    shape = ClipShape(3, 5, 7, 11, 24.0)

    def activations(**changes: Any) -> int:
        stage = StageJob(shape, **changes)
        found = stage_phases({"transformer": Component(small)}, 1, stage, Levers(torch.float32))
        return found[1].activation_bytes

    plain, voiced, led = activations(), activations(voice=7), activations(voice=7, identity=True)
    assert plain < voiced < led
    assert activations(relayed=True) < activations(voice=7, relayed=True)
    # A second residual stream of both widths, and what the picture's latent is.
    assert led - voiced >= 4 * (105 * 128 + 11 * 64)


def test_a_short_song_becomes_a_clip_with_made_sound_behind_it(
    demo_files: DemoFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song, target = file_of(tmp_path, "song", 0.4), tmp_path / "clip.mp4"
    words = [
        *("generate", "--model", str(demo_files[0]), "--text-encoder", str(demo_files[2])),
        *("--prompt", "rain", "--size", "64x64", "--frames", "25", "--stages", "1"),
        *("--sigmas", "1,0.5,0", "-o", str(target), "--audio", song, "--audio-pad"),
    ]
    assert main([*words, "prefix", "--audio-norm", "0.5,1"]) == 0
    assert "the rest is made" in capsys.readouterr().err
    clip = read_video(target)
    assert clip.waveform is not None
    tail = clip.waveform[:, round(0.5 * clip.audio_rate) : round(0.95 * clip.audio_rate)]
    assert tail.abs().mean() > 1e-3
    assert main([*words, "error", "--quiet"]) == 1
    assert "--audio-pad says what follows it" in capsys.readouterr().err
    assert main([*words, "prefix", "--audio-norm", "x", "--quiet"]) == 1
    assert "wanted numbers such as 1,1,0.25" in capsys.readouterr().err
