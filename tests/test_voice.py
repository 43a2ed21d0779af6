"""A voice that is given: tokens before the clip, the pass without them, and who hears them."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import steady, tone, write_clip, write_sound
from resume_support import every_progress, request_of, tiny_networks
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ltxlite import conditioning
from ltxlite.account import job_of
from ltxlite.cli import main
from ltxlite.conditioning import LatentState, StageContext, append_tokens, voice_positions
from ltxlite.conditions import Conditions, Reference, Sound, Voice
from ltxlite.denoise import Denoiser, Prompt, Stream
from ltxlite.errors import RequestError
from ltxlite.geometry import (
    AudioGrid,
    ClipShape,
    LatentGrid,
    audio_positions,
    patchify_audio,
    video_positions,
)
from ltxlite.given import StageGiven
from ltxlite.given.encode import check_given, encode_given
from ltxlite.given.voice import voice_sound, voice_tokens
from ltxlite.hearing import VOICE_SECONDS
from ltxlite.media.video_reader import read_video
from ltxlite.models.passes import ContextBias
from ltxlite.networks import Networks
from ltxlite.pipeline import encode, run_stages
from ltxlite.progress import Clock, Report
from ltxlite.request import Request, Stage
from ltxlite.sampling.identity import Identity
from ltxlite.sampling.settings import Guidance
from ltxlite.saved_state import conditions, encode_state, read_state
from ltxlite.steering import steer

GRID = AudioGrid()
SHAPE = ClipShape(2, 2, 3, 9, 24.0)
DemoFiles = tuple[Path, Path, Path]


def spoken(folder: Path, seconds: float, channels: int = 1, rate: int = 22_050) -> Path:
    layout = "mono" if channels == 1 else "stereo"
    sound = (tone(channels, seconds, rate), rate)
    return write_sound(folder / f"voice{channels}.wav", "pcm_s16le", sound, layout)


def streams(seed: int = 0) -> tuple[LatentState, LatentState]:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(1, 12, 4, generator=generator)
    audio = torch.randn(1, 9, 8, generator=generator)
    return (
        conditioning.start(video, video_positions((2, 2, 3), 24.0, LatentGrid())),
        conditioning.start(audio, audio_positions(9, GRID)),
    )


def context(number: int = 0) -> StageContext:
    return StageContext(number, SHAPE, 9, Fraction(24), LatentGrid(), GRID)


def test_a_voice_ends_40_ms_before_the_clip_begins() -> None:
    bounds = voice_positions(7, GRID)[0, 0]
    # features.md A5: token j starts at max(0, 4 j - 3) mel frames of 10 ms; the last one's end and
    # 40 ms more are taken off.
    last = (4 * 6 + 1) * 0.01
    for number in range(7):
        begin, end = max(0, 4 * number - 3) * 0.01, (4 * number + 1) * 0.01
        wanted = torch.tensor([begin, end]) - last - 0.04
        torch.testing.assert_close(bounds[number], wanted, rtol=0, atol=1e-7)
    assert float(bounds.max()) == pytest.approx(-0.04, abs=1e-7)
    assert audio_positions(9, GRID).min() == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_a_voice_is_appended_clean_behind_the_sounds_own_tokens(frozen: bool) -> None:
    video, audio = streams()
    audio = conditioning.freeze(audio) if frozen else audio
    latent = torch.randn(1, 2, 5, 4)
    given = StageGiven(voice=latent)
    picture, sound = steer(
        (video, audio), Conditions(voice=Voice("v.wav")), given, context(int(frozen))
    )
    assert picture is video
    assert (sound.target, sound.tokens, sound.frozen) == (9, 14, frozen)
    assert torch.equal(sound.clean[:, 9:], patchify_audio(latent))
    assert sound.mask[0, :, 0].tolist() == [float(not frozen)] * 9 + [0.0] * 5
    assert torch.equal(sound.positions[:, :, 9:], voice_positions(5, GRID))
    assert torch.equal(sound.positions[:, :, :9], audio.positions)
    # Timesteps: sigma for what is made, 0 for the voice, whatever noise the stage begins with.
    assert sound.levels().per_token().expand(1, 14, 1)[0, 9:, 0].tolist() == [0.0] * 5
    noised = sound.noised(torch.randn(1, 14, 8), 1.0)
    assert torch.equal(noised[:, 9:], sound.clean[:, 9:])
    assert conditioning.attention_weights(sound) == ()


def test_later_stages_hear_an_echo_of_what_was_made_or_nothing() -> None:
    states = streams()
    plain, echo = Voice("v.wav"), Voice("v.wav", echo=True)
    assert steer(states, Conditions(voice=plain), StageGiven(), context(1))[1] is states[1]
    _, sound = steer(states, Conditions(voice=echo), StageGiven(), context(1))
    assert torch.equal(sound.clean[:, 9:], states[1].initial)
    assert sound.tokens == 18 and not bool(sound.mask[:, 9:].any())


def stream(state: LatentState, width: int, **changes: Any) -> Stream:
    context = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(1))
    return Stream(state, Prompt(context, context.flip(1)), Guidance(), **changes)


@pytest.fixture(scope="module")
def networks() -> Networks:
    return tiny_networks()


def bound(networks: Networks, tokens: int = 5) -> tuple[Stream, Stream, Tensor, Tensor]:
    """Return both streams on the tiny model, the sound with a voice, and a noisy state of each."""
    config = networks.transformer_config()
    generator = torch.Generator().manual_seed(2)
    video = torch.randn(1, 12, config.video.channels, generator=generator)
    audio = torch.randn(1, 9, config.audio.channels, generator=generator)
    voice = torch.randn(1, tokens, config.audio.channels, generator=generator)
    shown = conditioning.start(video, video_positions((2, 2, 3), 24.0, LatentGrid()))
    heard = conditioning.start(audio, audio_positions(9, GRID))
    heard = append_tokens(heard, voice, voice_positions(tokens, GRID), 1.0)
    states = [
        state.noised(torch.randn(state.initial.shape, generator=generator), 0.8)
        for state in (shown, heard)
    ]
    widths = (config.caption_channels or item.context for item in (config.video, config.audio))
    pair = [stream(*each) for each in zip((shown, heard), widths, strict=True)]
    return pair[0], pair[1], states[0], states[1]


def test_identity_guidance_adds_what_the_voice_changes(networks: Networks) -> None:
    transformer = networks.transformer()
    video, audio, x, y = bound(networks)
    cfg = Guidance(cfg=2.0, rescale=0.5)
    video, audio = replace(video, guidance=cfg), replace(audio, guidance=cfg)
    plain = Denoiser(transformer, video, audio)((x, y), 0.8).x0
    led = Denoiser(transformer, video, replace(audio, identity=Identity(3.0)))((x, y), 0.8).x0
    # The same by hand: unguided with the voice, and without one.
    bare = replace(audio, state=conditioning.without_appended(audio.state), guidance=Guidance())
    unguided = replace(video, guidance=Guidance())
    cond = Denoiser(transformer, unguided, replace(audio, guidance=Guidance()))((x, y), 0.8).x0
    without = Denoiser(transformer, unguided, bare)((x, y[:, :9]), 0.8).x0
    for number, count in enumerate((12, 9)):
        change = 3.0 * (cond[number][:, :count] - without[number])
        assert change.abs().max() > 1e-3
        # Passes run together or alone: matrix products of the same height, the same bits.
        torch.testing.assert_close(
            led[number][:, :count], plain[number][:, :count] + change, rtol=0, atol=1e-5
        )
    assert torch.equal(led[1][:, 9:], audio.state.clean[:, 9:])


def test_all_other_passes_hear_the_voice(networks: Networks) -> None:
    transformer = networks.transformer()
    video, audio, x, y = bound(networks)
    everything = Guidance(cfg=2.0, stg=1.0, modality=2.0, stg_blocks=(0,))
    bias = ContextBias(torch.zeros(2, 7), torch.zeros(14, dtype=torch.int32))
    audio = replace(audio, guidance=everything, prompt=replace(audio.prompt, bias=bias))
    heard: list[int] = []
    run = transformer.run

    def watched(passes: Any) -> Any:
        heard.extend(given.audio.latent.shape[1] for given in passes)
        return run(passes)

    transformer.run = watched
    denoiser = Denoiser(transformer, video, replace(audio, identity=Identity(3.0, 0.0, 0.5)))
    denoiser((x, y), 0.99)
    assert heard == [14, 14, 14, 14, 9]
    heard.clear()
    denoiser((x, y), 0.5)  # place 0.91 of the schedule
    assert heard == [14, 14, 14, 14], "beyond its span it costs no pass"


def test_the_span_counts_places_as_comfyui_does() -> None:
    # ComfyUI: sigma of a place p is e^2.37 / (e^2.37 + 1 / (1 - p) - 1).
    for place in (0.1, 0.35, 0.8):
        sigma = 1 / (1 + math.exp(-2.37) * (1 / (1 - place) - 1))
        assert Identity(1.0, place - 1e-6, 1.0).active(sigma)
        assert not Identity(1.0, place + 1e-6, 1.0).active(sigma)
        assert Identity(1.0, 0.0, place + 1e-6).active(sigma)
        assert not Identity(1.0, 0.0, place - 1e-6).active(sigma)
    assert Identity(1.0).active(1.0) and Identity(1.0).active(0.0)
    assert not Identity(0.0).active(0.5)


@pytest.mark.parametrize(
    ("channels", "rate", "seconds"), [(1, 22_050, 0.7), (2, 48_000, 1.3), (1, 8_000, 0.111)]
)
def test_voices_of_any_kind_give_as_many_tokens_as_the_plan_says(
    tmp_path: Path, networks: Networks, channels: int, rate: int, seconds: float
) -> None:
    path = spoken(tmp_path, seconds, channels, rate)
    voice = Voice(str(path))
    request = request_of(tmp_path, Stage(sigmas="linq:2"), conditions=Conditions(voice=voice))
    sound = voice_sound(voice)
    assert sound.waveform.shape[0] == 2
    given = encode_given(request, networks, Clock(Report())).of(0).voice
    assert given is not None
    assert given.shape[2] == voice_tokens(request, networks, 0)
    # A latent for each 40 ms begun, and one of the mel frame at the very beginning.
    assert given.shape[2] == math.ceil((math.floor(seconds * 100 + 1e-6) + 1) / 4)
    (stage,) = job_of(request, networks).stages
    assert (stage.voice, stage.identity, stage.sound) == (given.shape[2], True, given.shape[2])
    assert stage.levels == 2 * (stage.evaluations + 1)


def test_long_voices_are_cut_and_short_ones_are_told(tmp_path: Path) -> None:
    path = spoken(tmp_path, 6.2)
    sound = voice_sound(Voice(str(path)))
    assert sound.waveform.shape[1] == round(VOICE_SECONDS * sound.rate)
    assert "its first 4.84 s are heard" in sound.remarks[0]
    assert voice_sound(Voice(str(path), seconds=30.0)).waveform.shape[1] == 6.2 * sound.rate
    later = voice_sound(Voice(str(path), start=5.0))
    assert later.waveform.shape[1] == pytest.approx(1.2 * later.rate, abs=1)
    assert "only 1.20 s" in later.remarks[0]


class Notes(Report):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_stopped_run_with_a_voice_goes_on_to_the_same_bits(
    tmp_path: Path, networks: Networks
) -> None:
    voice = Voice(str(spoken(tmp_path, 0.5)), echo=True)
    skipping = Guidance(cfg=2.0, skip_step=1)
    stages = (
        Stage(scale="1/2", sigmas="linq:3", audio=skipping),
        Stage(sigmas="0.9,0.5,0", upscaler="x2", sound="freeze"),
    )
    changes = {"width": 128, "height": 64, "conditions": Conditions(voice=voice)}
    request = request_of(tmp_path, *stages, negative="noise", **changes)
    prompts = encode(request, networks, Clock(Notes()))
    saved, path = every_progress(request, networks, prompts), tmp_path / "state"
    sampled = [step.position.carry["x"][1].shape[1] for step in saved if step.done]
    own = saved[-1].latents.audio.shape[2]
    assert sampled == [own + 13] * 3 + [own * 2] * 2
    assert torch.equal(saved[-1].latents.audio, saved[3].latents.audio), "held in stage 2"
    for step in saved[1:-1:2]:
        path.write_bytes(b"".join(encode_state(step, conditions(request, networks))))
        back = read_state(path, request, networks)
        *_, last = run_stages(request, networks, prompts, back, Clock(Report()))
        assert torch.equal(last.latents.video, saved[-1].latents.video)
        assert torch.equal(last.latents.audio, saved[-1].latents.audio)
    again = encode(replace(request, conditions=Conditions()), networks, Clock(Report()))
    other = every_progress(replace(request, conditions=Conditions()), networks, again)[-1]
    assert not torch.equal(other.latents.audio, saved[-1].latents.audio), "the voice is heard"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Voice(""), "no file name"),
        (lambda: Voice("v", seconds=0.01), "0.01 s of it, wanted 0.1 to 120"),
        (lambda: Voice("v", start=-1.0), "starts at -1"),
        (lambda: Voice("v", identity=-1.0), "identity guidance -1"),
        (lambda: Voice("v", span=(0.5, 0.5)), "the first one less"),
        (lambda: Voice("v", stages=()), "wanted numbers from 1"),
        (
            lambda: Conditions(voice=Voice("v"), sound=Sound("s")),
            "leave one of them out",
        ),
        (
            lambda: request_of(
                Path(), Stage(), conditions=Conditions(voice=Voice("v", stages=(1, 2)))
            ),
            r"voice v: stages \(1, 2\) of a job with 1",
        ),
    ],
)
def test_voices_that_cannot_be_are_refused_in_one_line(make: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_voice_of_an_instant_is_refused_before_anything_loads(
    tmp_path: Path, networks: Networks
) -> None:
    given = Conditions(voice=Voice(str(spoken(tmp_path, 0.05))))
    with pytest.raises(RequestError, match=r"0\.050 s from second 0 on; wanted 0\.1 or more"):
        check_given(request_of(tmp_path, Stage(), conditions=given), networks)


def test_flags_make_a_job_whose_later_stages_hold_the_sound(
    demo_files: DemoFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, voice = tmp_path / "job.json", spoken(tmp_path, 0.6)
    words = [
        *("generate", "--model", str(demo_files[0]), "--upscaler", str(demo_files[1])),
        *("--text-encoder", str(demo_files[2]), "--prompt", "rain", "--size", "64x64"),
        *("--frames", "9", "-o", str(tmp_path / "clip.mp4"), "--save-job", str(job)),
        *("--sigmas", "1,0.5,0", "--sigmas", "0.9,0", "--ref-audio", str(voice)),
        *("--identity-guidance", "2:0.1:0.9", "--ref-audio-start", "0.1"),
    ]
    assert main(words) == 0
    assert "without an ID-LoRA" in capsys.readouterr().err
    request = Request.from_json(job.read_text(), "job")
    assert request.conditions.voice == Voice(
        str(voice), 0.1, VOICE_SECONDS, identity=2.0, span=(0.1, 0.9)
    )
    assert [stage.sound for stage in request.stages] == ["refine", "freeze"]
    for bad, told in (
        (("--ref-audio-start", "1"), "--ref-audio-start without --ref-audio"),
        (("--identity-guidance", "3"), "--identity-guidance without"),
        (("--ref-audio", str(voice), "--identity-guidance", "3:1"), "wanted SCALE or SCALE:FROM"),
        (("--ref-audio", str(voice), "--identity-guidance", "x"), "wanted numbers"),
    ):
        assert main([*words[:13], *bad, "--quiet"]) == 1
        assert told in capsys.readouterr().err


def dub_words(demo: DemoFiles, clip: Path, lora: Path, output: Path) -> list[str]:
    return [
        *("dub", str(clip), "--prompt", "He says hello", "--model", str(demo[0])),
        *("--upscaler", str(demo[1]), "--text-encoder", str(demo[2]), "-o", str(output)),
        *("--lora", str(lora), "--sigmas", "1,0.5,0", "--sigmas", "0.9,0"),
    ]


@pytest.fixture(scope="module")
def dub_lora(demo_files: DemoFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LoRA of one layer that fits the demo checkpoint."""
    layer = "transformer_blocks.0.attn1.to_q"
    with safe_open(demo_files[0], "pt") as file:
        rows, columns = file.get_slice(f"model.diffusion_model.{layer}.weight").get_shape()
    path = tmp_path_factory.mktemp("lora") / "dub-it.safetensors"
    factors = {"lora_A": torch.randn(2, columns), "lora_B": torch.randn(rows, 2)}
    save_file({f"diffusion_model.{layer}.{k}.weight": v for k, v in factors.items()}, path)
    return path


def test_a_dubbed_clip_is_its_own_reference_and_voice(
    demo_files: DemoFiles, dub_lora: Path, tmp_path: Path
) -> None:
    rate = Fraction(30000, 1001)
    track = (tone(2, 0.7, 44_100), 44_100)
    clip = write_clip(tmp_path / "talk.mp4", steady(20, rate), (100, 70), track)
    output, job = tmp_path / "dub.mp4", tmp_path / "job.json"
    words = dub_words(demo_files, clip, dub_lora, output)
    assert main([*words, "--quiet", "--save-job", str(job)]) == 0
    request = Request.from_json(job.read_text(), "job")
    assert request.conditions.references == (Reference(str(clip), stages=(1, 2)),)
    seconds = 17 * 1001 / 30000
    wanted = Voice(str(clip), seconds=seconds, identity=0.0, echo=True)
    assert request.conditions.voice == wanted
    assert [stage.sound for stage in request.stages] == ["refine", "freeze"]
    strengths = [stage.lora_strength(0).at("transformer_blocks.0.x") for stage in request.stages]
    assert strengths == [1.0, 1.0], "in both stages"
    made = read_video(output)
    assert made.frames.shape == (17, 70, 100, 3), "8n + 1 frames, the clip's own size"
    assert made.fps == rate
    assert made.waveform is not None
    assert made.waveform.shape[1] == pytest.approx(seconds * made.audio_rate, abs=1024)


def test_dubs_that_cannot_be_are_refused_in_one_line(
    demo_files: DemoFiles, dub_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_clip(tmp_path / "mute.mp4", steady(9, Fraction(24)), (64, 64))
    words = dub_words(demo_files, clip, dub_lora, tmp_path / "x.mp4")
    at = words.index("--lora")
    for arguments, told in (
        (words, "has no sound to take voices from"),
        ([*words[:at], *words[at + 2 :]], "needs the Dub-It IC-LoRA"),
        ([*words, "--stages", "1"], "has two stages"),
        ([*words, "--reference", "y.mp4"], "--reference goes with generate"),
        ([*words, "--audio", "y.wav"], "--audio goes with generate"),
        ([*words, "--ref-audio", str(spoken(tmp_path, 0.5)), "--cfg", "3"], "distilled"),
    ):
        assert main([*arguments, "--quiet"]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert told in lines[-1], lines
