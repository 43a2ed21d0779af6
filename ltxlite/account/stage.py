"""The account of a sampling stage: the denoiser, guidance and two steps of the sampler."""

import itertools
from dataclasses import replace

import torch
from torch import Tensor, nn

from ltxlite import conditioning
from ltxlite.account.job import Extent, StageJob
from ltxlite.account.phase import (
    META,
    Blank,
    Components,
    Levers,
    Phase,
    blank,
    metered,
    on_card,
)
from ltxlite.conditioning import LatentState
from ltxlite.denoise import Denoiser, Prompt, Stream
from ltxlite.geometry import AudioGrid, LatentGrid, audio_positions, video_positions
from ltxlite.linear import QuantLinear
from ltxlite.low_rank import LowRankLinear, OverTime
from ltxlite.math_mode import set_math
from ltxlite.memory.blank import stored_bytes
from ltxlite.models.connector import CONTEXT_LENGTH
from ltxlite.models.passes import Avoided, ContextBias, Moments
from ltxlite.models.transformer import AdaLN, Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.sampling.contract import Prediction, State, Tools
from ltxlite.sampling.identity import Identity
from ltxlite.sampling.samplers import SAMPLERS, sample
from ltxlite.sampling.settings import Guidance

_SIGMAS = (1.0, 0.75, 0.5, 0.0)


def stage_phases(
    components: Components, number: int, stage: StageJob, levers: Levers
) -> list[Phase]:
    """Return the phases of a stage: its modulation is tabulated, then it samples."""
    made: Blank[Transformer] = blank(
        "transformer", components["transformer"], Transformer, levers.dtype
    )
    transformer = made.network
    transformer.chunk = levers.chunk
    set_math(transformer, levers.math, levers.capability)
    if stage.timed:
        for module in transformer.modules():
            if isinstance(module, LowRankLinear):
                times = OverTime(torch.ones(1, device=META), 1.0)
                module.times = [times for _ in module.sources]
    with torch.inference_mode():
        denoiser = make_denoiser(transformer, stage, levers.dtype)  # on the CPU: it looks at values
        with metered(levers) as meter:
            move_denoiser(denoiser)
            transformer.tabulate(torch.empty(stage.levels, device=META))
            tabulated = made.phase(f"levels of stage {number}", meter)
            sample_steps(denoiser, stage)
            sampled = made.phase(f"stage {number}", meter)
    kept = len(made.units) * max(_row_scales(block) for block in transformer.blocks)
    largest = max(stored_bytes(m) for m in transformer.modules() if isinstance(m, AdaLN))
    return [
        replace(tabulated, fixed_bytes=made.fixed_bytes + largest, units=()),
        replace(sampled, fixed_bytes=made.fixed_bytes + kept, walks=stage.evaluations),
    ]


def _row_scales(block: nn.Module) -> int:
    """Return the bytes that linears of a block keep of their weights, however often it leaves."""
    linears = (module for module in block.modules() if isinstance(module, QuantLinear))
    return sum(4 * linear.rows for linear in linears if linear.scales is not None)


def make_denoiser(transformer: Transformer, stage: StageJob, dtype: torch.dtype) -> Denoiser:
    """Bind a transformer to a stage as `StageRun` does, inputs on the CPU, contexts of zeros."""
    config, needs = transformer.config, SAMPLERS[stage.sampler].needs_uncond
    guidances = (_in_first_block(stage.video), _in_first_block(stage.audio))
    negative = needs or any("uncond" in guidance.passes(0) for guidance in guidances)
    prompts = _prompts(config, stage, negative, dtype)
    streams = [
        Stream(state, prompt, guidance, moments=_moments(stage, state), identity=identity)
        for state, prompt, guidance, identity in zip(
            _states(config, stage), prompts, guidances, (None, _identity(stage)), strict=True
        )
    ]
    return Denoiser(transformer, streams[0], streams[1], needs_uncond=needs)


def _moments(stage: StageJob, state: LatentState) -> Moments | None:
    """Put all tokens into one moment: the linears of each are alike, and come one by one."""
    if not stage.timed:
        return None
    return Moments(torch.zeros(state.tokens, dtype=torch.int32), (((0, state.tokens),),))


def _prompts(
    config: TransformerConfig, stage: StageJob, negative: bool, dtype: torch.dtype
) -> list[Prompt]:
    """Make the prompts of picture and sound, with what they avoid and who sees what."""
    shape, found = stage.shape, []
    frames = (shape.frames, shape.audio_frames)
    for sound, stream in enumerate((config.video, config.audio)):
        width = config.caption_channels or stream.context
        positive, other, away = (
            torch.zeros(1, CONTEXT_LENGTH, width, dtype=dtype) for _ in range(3)
        )
        bias = None
        if stage.relayed:
            tokens = shape.audio_frames + stage.voice if sound else stage.tokens
            rows = torch.zeros(frames[sound] + 1, CONTEXT_LENGTH)
            bias = ContextBias(rows, torch.zeros(tokens, dtype=torch.int32))
        avoided = Avoided(away) if stage.avoided[sound] else None
        found.append(Prompt(positive, other if negative else None, bias, avoided))
    return found


def move_denoiser(denoiser: Denoiser, device: torch.device = META) -> None:
    """Bring what a denoiser was made with to a device."""
    known: dict[int, tuple[Tensor, Tensor]] = {}
    voiceless = () if denoiser._unvoiced is None else (denoiser._unvoiced,)
    for item in (*denoiser._streams, *voiceless):
        vars(item).update(
            {name: on_card(value, known, device) for name, value in vars(item).items()}
        )


def sample_steps(denoiser: Denoiser, stage: StageJob) -> None:
    """Run the second of three steps for real: what the first one left stands beside it."""
    start = _noised([item.stream.state for item in denoiser._streams])
    evaluations = SAMPLERS[stage.sampler].per_step
    numbers = itertools.count()

    def noise(_: object) -> State:
        return tuple(torch.empty_like(x) for x in start)

    def denoise(x: State, sigma: float) -> Prediction:
        real = next(numbers) // evaluations == 1
        return denoiser(x, sigma) if real else Prediction(noise(None), noise(None))

    sample(stage.sampler, start, _SIGMAS, Tools(denoise, noise, denoiser.blend))


def _in_first_block(guidance: Guidance) -> Guidance:
    """Let the perturbed pass part where the account has a block."""
    return replace(guidance, stg_blocks=(0,)) if guidance.stg_blocks else guidance


def _states(config: TransformerConfig, stage: StageJob) -> tuple[LatentState, LatentState]:
    """Make both streams' states as `StageRun` does."""
    shape = stage.shape
    latent = (shape.frames, shape.rows, shape.columns)
    initial = torch.zeros(1, shape.video_tokens, config.video.channels)
    video = conditioning.start(initial, video_positions(latent, shape.fps, LatentGrid()))
    if held := stage.images or int(stage.held):
        image = torch.zeros(1, config.video.channels, held, shape.rows, shape.columns)
        video = conditioning.place_image(video, image, 0, 1.0)
    for extent in stage.appended:
        video = _appended(video, extent, stage.weighted)
    initial = torch.zeros(1, shape.audio_frames, config.audio.channels)
    audio = conditioning.start(initial, audio_positions(shape.audio_frames, AudioGrid()))
    if stage.voice:
        voice = torch.zeros(1, stage.voice, config.audio.channels)
        positions = conditioning.voice_positions(stage.voice, AudioGrid())
        audio = conditioning.append_tokens(audio, voice, positions, 1.0)
    return video, audio


def _identity(stage: StageJob) -> Identity | None:
    return Identity(1.0) if stage.identity else None


def _appended(state: LatentState, extent: Extent, weighted: bool) -> LatentState:
    """Append a latent of zeros; where it stands makes no difference."""
    latent = torch.zeros(1, state.clean.shape[2], *extent)
    positions = video_positions(extent, 24.0, LatentGrid())
    weight = torch.full((positions.shape[2],), 0.5) if weighted else None
    return conditioning.append(state, latent, positions, 1.0, weight)


def _noised(states: list[LatentState]) -> State:
    return tuple(state.noised(torch.empty_like(state.initial), 1.0) for state in states)
