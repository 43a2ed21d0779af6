"""LoRA files that act from step to step and from moment to moment, beside networks run moment by
moment."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steered_text_support import SIZE, inputs, network, outputs
from torch import Tensor, nn

from ltxlite import conditioning
from ltxlite.account import Component, Levers, StageJob
from ltxlite.account.stage import stage_phases
from ltxlite.checkpoint.lora import set_strengths, set_times
from ltxlite.conditioning import States
from ltxlite.conditions import Conditions, Relay, Segment
from ltxlite.errors import RequestError
from ltxlite.geometry import AudioGrid, ClipShape, LatentGrid, audio_positions, video_positions
from ltxlite.lora_times import check_strengths, clip_times, windows_of
from ltxlite.low_rank import LowRankLinear, LowRankTerm, OverTime
from ltxlite.math_mode import set_math
from ltxlite.memory.blank import Weights
from ltxlite.models import block as block_module
from ltxlite.models.attention import Attention, KeyValue
from ltxlite.models.block import Block, StreamBlock, StreamState
from ltxlite.models.passes import Moments, StreamInput
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import StreamConfig, TransformerConfig
from ltxlite.over_time import Window, rise
from ltxlite.request import Files, Output, Request, Stage
from ltxlite.strength import Strength

GRID = LatentGrid()
STYLE, OTHER = "style.safetensors", "other.safetensors"
FACTORS = {STYLE: [0.0, 0.6, 1.0], OTHER: [0.5, 0.5, -0.3]}
# Moments of 30 video tokens, frame by frame, a guide among them, and of 11 tokens of sound.
VIDEO = torch.tensor([0, 0, 1, 2, 2]).repeat_interleave(6)
AUDIO = torch.tensor([0] * 4 + [1] * 2 + [2] * 5)


def hung(only: str = "") -> Transformer:
    """Return a network with terms of two files beside its linears of that name."""
    transformer = network()
    random = torch.Generator().manual_seed(4)
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and only in name:
            terms = [
                LowRankTerm(
                    torch.randn(rank, module.in_features, generator=random) / 8,
                    torch.randn(module.out_features, rank, generator=random) / 8,
                    0.7,
                    source,
                )
                for source, rank in ((STYLE, 3), (OTHER, 5))
            ]
            parent, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(parent), leaf, LowRankLinear(module, terms))
    set_strengths(transformer, {STYLE: 0.9, OTHER: 0.9})
    return transformer


def over_time(means: float = 0.0) -> dict[str, OverTime]:
    return {name: OverTime(torch.tensor(values), means) for name, values in FACTORS.items()}


def timed(given: tuple[StreamInput, StreamInput]) -> tuple[StreamInput, StreamInput]:
    ids = (VIDEO, AUDIO)
    video, audio = (
        replace(stream, moments=Moments.of(own, torch.device("cpu")))
        for stream, own in zip(given, ids, strict=True)
    )
    return video, audio


@contextmanager
def moment_by_moment(transformer: Transformer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have every part of the blocks run once a moment, at one strength for all of it, and take
    each token from its own moment's run."""

    now = 0

    def become(moment: int) -> None:
        nonlocal now
        now = moment
        set_strengths(transformer, {name: 0.9 * v[moment] for name, v in FACTORS.items()})

    def each(run: Callable[[], Tensor]) -> Tensor:
        found, before = [], now
        for moment in range(3):
            become(moment)
            found.append(run())
        become(before)  # one inside of another
        ids = {30: VIDEO, 11: AUDIO}[found[0].shape[1]]
        rows = [found[int(own)][:, place] for place, own in enumerate(ids)]
        return torch.stack(rows, dim=1)

    keys_values, attend_text, heard = (
        Attention.keys_values,
        StreamBlock.attend_text,
        Block._audio_update,
    )

    def keys(self: Attention, source: Any, tokens: int, *rest: Any) -> KeyValue:
        if tokens == SIZE.text_rows or tokens == 9:  # a prompt: inside of one moment's run
            return keys_values(self, source, tokens, *rest)
        pairs = []

        def run(part: str) -> Callable[[], Tensor]:
            return lambda: getattr(keys_values(self, source, tokens, *rest), part)

        pairs = [each(run("key")), each(run("value"))]
        return KeyValue(*pairs)

    def add_rows(x: Tensor, update: Callable[[slice, Tensor], Tensor], size: int) -> Tensor:
        return each(lambda: update(slice(0, x.shape[1]), x.clone()))

    def text(self: StreamBlock, state: StreamState, chunk: int) -> None:
        def run() -> Tensor:
            alone = copy.copy(state)
            alone.x = state.x.clone()
            with monkeypatch.context() as inner:
                inner.setattr(block_module, "add_rows", plain_rows)
                attend_text(self, alone, chunk)
            return alone.x

        state.x = each(run)

    plain_rows = block_module.add_rows
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "keys_values", keys)
        patch.setattr(StreamBlock, "attend_text", text)
        patch.setattr(Block, "_audio_update", lambda *given: each(lambda: heard(*given)))
        patch.setattr(block_module, "add_rows", add_rows)
        yield


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("steered", [False, True], ids=["plain", "nag and relay"])
def test_each_token_is_computed_at_its_own_strength(
    chunk: int, steered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(bias=steered, avoided=steered, weights=steered)
    reference = hung("blocks.")
    with moment_by_moment(reference, monkeypatch):
        wanted = outputs(reference, given)
    transformer = hung("blocks.")
    transformer.chunk = chunk
    set_times(transformer, over_time())
    found = outputs(transformer, timed(given))
    # What the issue asks for; fp32 sums of 64 products in two blocks, and terms as large.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    steady = outputs(hung("blocks."), given)
    assert (steady - wanted).abs().max() > 1e-2, "what is tested changes nothing"


def test_the_ends_of_a_stream_act_by_moment_too() -> None:
    given, transformer = inputs(bias=False, avoided=False), hung(".embed")
    outside = {}
    for moment in range(3):
        set_strengths(transformer, {n: 0.9 * v[moment] for n, v in FACTORS.items()})
        outside[moment] = transformer.video.embed(given[0].latent)
    set_strengths(transformer, {STYLE: 0.9, OTHER: 0.9})
    set_times(transformer, over_time())
    state = transformer.begin(SimpleNamespace(video=timed(given)[0], audio=timed(given)[1])).video
    assert state is not None
    for place, moment in enumerate(VIDEO.tolist()):
        # Sums of 12 products, in another order.
        expected = outside[moment][:, place]
        torch.testing.assert_close(state.x[:, place], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["bf16", "int8", "fp16"])
def test_one_moment_for_all_is_a_plain_strength(mode: str) -> None:
    given, transformer = inputs(), hung()
    set_math(transformer, mode, None)
    set_strengths(transformer, {STYLE: 0.45, OTHER: -0.27})
    for module in transformer.modules():
        if isinstance(module, LowRankLinear):
            module.method = "beside"  # as what changes over time always is
    wanted = outputs(transformer, given)
    set_strengths(transformer, {STYLE: 0.9, OTHER: 0.9})
    set_times(
        transformer,
        {STYLE: OverTime(torch.tensor([0.5]), 0.5), OTHER: OverTime(torch.tensor([-0.3]), -0.3)},
    )
    same = [
        replace(s, moments=Moments.of(torch.zeros(s.latent.shape[1]).long(), torch.device("cpu")))
        for s in given
    ]
    found = outputs(transformer, (same[0], same[1]))
    # Codes are rounded alike but where fp32's last bit tips one: a step of 1 in 127 of a row.
    limit = {"bf16": 1e-5, "fp16": 1e-3, "int8": 2e-2}[mode]
    assert float((found - wanted).norm() / wanted.norm()) < limit


def test_what_is_told_no_moment_takes_the_mean() -> None:
    transformer = hung("video.adaln")
    set_times(transformer, over_time(means=0.25))
    level = torch.tensor([0.3])
    found = transformer.video.adaln(level, torch.float32)[0]
    set_times(transformer, {})
    set_strengths(transformer, {STYLE: 0.9 * 0.25, OTHER: 0.9 * 0.25})
    assert torch.equal(found, transformer.video.adaln(level, torch.float32)[0])


# Windows of time.


def test_windows_fade_in_and_out_and_add_up_to_one() -> None:
    assert [rise(x, 0) for x in (-0.1, 0.0, 0.1)] == [0, 1, 1]
    # A raised cosine: a half in the middle, (1 - cos 45°) / 2 a quarter of the way.
    assert [rise(x, 2) for x in (-1, -0.5, 0, 0.5, 1)] == pytest.approx(
        [0, 0.1464466, 0.5, 0.8535534, 1]
    )
    first, second = Window.within(0, 2, 5), Window.within(2, 5, 5)
    assert (first, second) == (Window(None, 2), Window(2, None))
    for at in (0, 1.6, 2, 2.3, 5):
        assert first.share(at, 1) + second.share(at, 1) == pytest.approx(1)
    assert Window(1, 2).share(1.5, 4) < 1  # shorter than its edges


def request_of(strengths: tuple[Strength, ...], relay: Relay | None = None) -> Request:
    return Request(
        prompt="rain",
        files=Files("m", loras=tuple(f"{n}.safetensors" for n in range(len(strengths)))),
        output=Output("x.mp4"),
        stages=(Stage(sigmas="linq:8", loras=strengths), Stage(sigmas="0.9,0", loras=strengths)),
        frames=49,
        fps="25",
        conditions=Conditions(relay=relay),
    )


def states(request: Request) -> States:
    """Return 7 latent frames of 2 x 3, 50 tokens of sound, and a guide at 1.5 s, one before 0."""
    video = conditioning.start(torch.zeros(1, 42, 4), video_positions((7, 2, 3), 25.0, GRID))
    for frame in (37, -8):
        place = conditioning.keyframe_positions((1, 2, 3), frame, 1, 25.0, GRID)
        video = conditioning.append(video, torch.zeros(1, 4, 1, 2, 3), place, 1.0)
    return video, conditioning.start(torch.zeros(1, 50, 4), audio_positions(50, AudioGrid()))


def test_tokens_act_by_the_middle_of_their_time() -> None:
    request = request_of((Strength.parse("seconds=0-1:0.5,seconds=1.5-"),))
    found = clip_times({STYLE: request.stages[0].loras[0]}, request, states(request), GRID)
    assert found is not None
    factors = found.files[STYLE].factors
    # Frames 0, 1-8, ..., 41-48 of 25 a second: their middles are 0.02, 0.2, 0.52, ..., 1.8 s.
    middles = [0.02, *(((8 * j - 3) / 25) for j in range(1, 7)), 37.5 / 25, 0.0]
    wanted = [0.5 if t < 1 else float(t >= 1.5) for t in middles]
    assert factors[found.moments[0].ids.long()][::6].tolist() == wanted
    sound = factors[found.moments[1].ids.long()].tolist()
    bounds = states(request)[1].positions[0, 0].mean(-1).tolist()
    assert sound == [0.5 if t < 1 else float(t >= 1.5) for t in bounds]
    assert len(factors) == 3
    assert found.files[STYLE].mean == pytest.approx(sum(wanted[:7]) / 7)


def test_a_clip_of_sound_alone_has_its_own_mean() -> None:
    request = request_of((Strength.parse("seconds=0-1"),))
    video, audio = states(request)
    none = replace(
        video,
        **{n: getattr(video, n)[:, :0] for n in ("initial", "clean", "mask")},
        positions=video.positions[:, :, :0],
        target=0,
    )
    found = clip_times({STYLE: request.stages[0].loras[0]}, request, (none, audio), GRID)
    assert found is not None
    inside = [float(t < 1) for t in audio.positions[0, 0].mean(-1).tolist()]
    assert found.files[STYLE].mean == pytest.approx(sum(inside) / 50)


def test_runs_are_the_tokens_of_a_moment_and_can_be_cut() -> None:
    found = Moments.of(torch.tensor([1, 1, 0, 2, 1]), torch.device("cpu"))
    assert found.runs == (((2, 3),), ((0, 2), (4, 5)), ((3, 4),))
    assert Moments.of(torch.zeros(0).long(), torch.device("cpu")).runs == ()
    first = found.first(3)
    assert first.runs == (((2, 3),), ((0, 2),), ())
    assert first.ids.tolist() == [1, 1, 0]


def test_segments_of_the_prompt_are_windows_in_time() -> None:
    relay = Relay((Segment("a", None, 1.0), Segment("b"), Segment("c", 1.5)))
    request = request_of((Strength.parse("segments=2-3:0.5"),), relay)
    found = windows_of(request.stages[0].loras[0], request, GRID)
    # 1 s is pixel frame 25: latents 0..3 begin before, so b begins with latent 4, at frame 25.
    # 1.5 s is frame 37.5, latent 5 has its middle at 37: c begins with latent 6, frame 41.
    assert found == [(Window(1.0, 41 / 25), 0.5), (Window(41 / 25, None), 0.5)]


@pytest.mark.parametrize(
    ("text", "relay", "words"),
    [
        ("seconds=2-3", None, "from 2 s on: the clip ends at 1.96 s"),
        ("segments=1", None, "the prompt has none"),
        ("segments=2", Relay((Segment("a"),)), "the prompt has 1 to 1"),
        ("steps=8-9", None, "steps 8-9 of stages with 8"),
    ],
)
def test_times_and_steps_that_are_not_there_are_refused(
    text: str, relay: Relay | None, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        check_strengths(request_of((Strength.parse(text),), relay), (8, 1), GRID)


def test_steps_that_one_stage_has_are_enough() -> None:
    check_strengths(request_of((Strength.parse("steps=7"),)), (8, 1), GRID)


SHAPE = ClipShape(3, 5, 7, 11, float(Fraction(24)))


def test_the_account_holds_what_terms_beside_take() -> None:
    streams = (
        StreamConfig(12, 12, 4, 32, 128, (20, 64, 64)),
        StreamConfig(10, 10, 4, 16, 64, (20,)),
    )
    config = TransformerConfig(*streams, 1, 64)
    ranks = {"blocks.0.video.feed_forward.up": (8,), "blocks.0.video.feed_forward.down": (8,)}

    def peak(stage: StageJob) -> int:
        levers = Levers(torch.float32, chunk=64)
        parts = {"transformer": Component(config, Weights({}, ranks))}
        return stage_phases(parts, 1, stage, levers)[1].activation_bytes

    plain, timed = peak(StageJob(SHAPE)), peak(StageJob(SHAPE, timed=True))
    # At 64 rows both are computed beside; over time a row of factors and the ids come to it.
    assert 0 <= timed - plain <= 4 * (105 + 11) + 4 * 64 * 8
