"""One sampling stage: from the previous stage's latents and a prompt to this stage's latents.

Between two steps a stage is nothing but its `Progress`: it can be saved, and gone on with in
another process or on another transformer, to the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ltxlite import conditioning
from ltxlite.conditioning import LatentState, StageContext, States
from ltxlite.denoise import Denoiser, Evaluation, Prompt, Stream, refuse_nonfinite
from ltxlite.encode import Contexts
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.geometry import (
    ClipShape,
    LatentGrid,
    audio_positions,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
    video_positions,
)
from ltxlite.given import Given
from ltxlite.lora_times import StageLoras
from ltxlite.models.passes import Avoided, BranchScales, Moments
from ltxlite.models.transformer import Transformer
from ltxlite.models.upscaler import upscale_normalised
from ltxlite.network_configs import missing_parts, needed_parts
from ltxlite.networks import Networks
from ltxlite.relay import relayed
from ltxlite.request import Request, Stage
from ltxlite.sampling.contract import NoiseKind, Position, State, Tools
from ltxlite.sampling.identity import Identity
from ltxlite.sampling.noise import SdeNoise, initial_noise, sde_seed, stage_seed
from ltxlite.sampling.samplers import SAMPLERS, continue_sampling, evaluation_sigmas
from ltxlite.sampling.schedule_text import parse
from ltxlite.sampling.schedules import Schedule
from ltxlite.sampling.statistics import ChannelControl
from ltxlite.stage_shapes import stage_shape
from ltxlite.steering import steer
from ltxlite.steering.sound_norm import SoundNorm
from ltxlite.steering.statistics import channel_control, controlled
from ltxlite.upscalers import find_upscaler, missing_upscalers

SDE_KINDS: tuple[NoiseKind, ...] = ("step", "sub")


@dataclass(frozen=True, slots=True)
class Latents:
    """What goes from stage to stage: normalised latents (1, C, F, Y, X) and (1, C, T, M), fp32.

    Contiguous, for the reason told at `Position`.
    """

    video: Tensor
    audio: Tensor
    shape: ClipShape

    def __post_init__(self) -> None:
        object.__setattr__(self, "video", self.video.contiguous())
        object.__setattr__(self, "audio", self.audio.contiguous())


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job stands: in stage number `stage`, from 0, with `position.done` steps finished.

    latents: what the stage is given, at its own size once a step is done; beyond the last stage,
    what came out of it.  position, predictions, drawn: what sampler, denoiser and noise generators
    carry from step to step; empty before the first.
    """

    stage: int
    latents: Latents
    position: Position = field(default_factory=lambda: Position(0, {}))
    predictions: Mapping[str, Tensor] = field(default_factory=dict)
    drawn: Mapping[NoiseKind, int] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Finished steps of the stage."""
        return self.position.done


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the encoders made of a job.

    positive, negative: contexts; the negative ones are there when some stage needs them.
    given: images, clips and sound that steer it.  avoided: what picture and sound lead away from.
    passages: the context's rows of each segment of a relayed prompt.
    """

    positive: Contexts
    negative: Contexts | None
    given: Given = field(default_factory=Given)
    avoided: tuple[Avoided | None, Avoided | None] = (None, None)
    passages: tuple[slice, ...] = ()

    def of(self, sound: bool) -> Prompt:
        """Return one stream's part."""
        pair = (self.positive, self.negative)
        video = [None if contexts is None else contexts.video for contexts in pair]
        audio = [None if contexts is None else contexts.audio for contexts in pair]
        positive, negative = audio if sound else video
        assert positive is not None
        return Prompt(positive, negative, avoided=self.avoided[sound])


def needs_negative(stage: Stage) -> bool:
    """Tell whether a stage evaluates the negative prompt in any of its steps."""
    scales = (guidance.cfg for guidance in (stage.video, stage.audio))
    listed = [value for cfg in scales for value in (cfg if isinstance(cfg, tuple) else (cfg,))]
    return SAMPLERS[stage.sampler].needs_uncond or any(value != 1 for value in listed)


def refuse_missing(stages: Sequence[Stage], networks: Networks) -> None:
    """Raise CheckpointError naming every file that the stages need and nobody gave."""
    lines = missing_parts(networks.files, needed_parts(networks.sound_alone))
    ways = (stage.upscaler for stage in stages)
    lines += missing_upscalers((way for way in ways if way not in (None, "pixels")), networks)
    if lines:
        raise CheckpointError("missing files:\n  " + "\n  ".join(lines))


def stage_sigmas(stage: Stage, shape: ClipShape) -> Schedule:
    """Return a stage's noise levels."""
    return parse(stage.sigmas, shape.video_tokens if stage.real_tokens else None)


def step_count(request: Request, networks: Networks, number: int) -> int:
    """Return how many sampling steps a stage has."""
    stage = request.stages[number]
    return len(stage_sigmas(stage, stage_shape(request, stage, networks))) - 1


def latent_sizes(networks: Networks, shape: ClipShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of a stage's latents: (1, C, F, Y, X) and (1, C, T, M)."""
    channels, bins = networks.transformer_config(), networks.audio_bins()
    video = (1, channels.video.channels, shape.frames, shape.rows, shape.columns)
    return video, (1, channels.audio.channels // bins, shape.audio_frames, bins)


def token_sizes(
    networks: Networks, shape: ClipShape, appended: int = 0, voiced: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes (1, T, C) of what a stage samples, picture and sound.

    appended, voiced: tokens that are appended to the one and to the other.
    """
    channels = networks.transformer_config()
    video = (1, shape.video_tokens + appended, channels.video.channels)
    return video, (1, shape.audio_frames + voiced, channels.audio.channels)


def first_latents(networks: Networks, shape: ClipShape) -> Latents:
    """Return the zeros that the first stage's noise is mixed into."""
    video, audio = (torch.zeros(size) for size in latent_sizes(networks, shape))
    return Latents(video.to(networks.device), audio.to(networks.device), shape)


def beginning(request: Request, networks: Networks) -> Progress:
    """Return the progress of a run that has done nothing yet."""
    return Progress(0, first_latents(networks, stage_shape(request, request.stages[0], networks)))


def enlarge(networks: Networks, latents: Latents, shape: ClipShape, kind: str) -> Latents:
    """Bring the picture to a stage's size with the upscaler of that kind; sound stays.

    Raises CheckpointError if no such upscaler is among the files or it gives another size.
    """
    upscaler = find_upscaler(networks, kind)
    mean, std = networks.latent_statistics()
    video = upscale_normalised(upscaler, latents.video.to(networks.dtype), mean, std).float()
    wanted = (shape.frames, shape.rows, shape.columns)
    if tuple(video.shape[2:]) != wanted:
        raise RequestError(
            f"the {kind} upscaler turns {list(latents.video.shape[2:])} into "
            f"{list(video.shape[2:])}, the next stage needs {list(wanted)}; choose another size"
        )
    return replace(latents, video=video, shape=shape)


class StageRun:
    """Runs one stage of a job on a loaded transformer.

    `progress` follows the finished steps. After an error, out of memory say, or an interruption,
    call it again, or make another one of its progress and a transformer that takes less room: it
    goes on behind the last finished step.
    """

    def __init__(
        self, request: Request, progress: Progress, networks: Networks, transformer: Transformer
    ) -> None:
        self.request, self.number, self.progress = request, progress.stage, progress
        self.stage = request.stages[self.number]
        self.networks, self.transformer = networks, transformer
        self.shape = progress.latents.shape
        self.sigmas = stage_sigmas(self.stage, self.shape)

    @property
    def steps(self) -> int:
        """Sampling steps of the stage."""
        return len(self.sigmas) - 1

    def __call__(self, prompts: Prompts, finished: Callable[[Progress], None]) -> Latents:
        """Noise the latents of `progress`, which have this stage's size, and denoise them.

        finished: told the progress after each step, before the next one begins.
        """
        video, audio = self._states(prompts.given)
        loras = StageLoras(self.request, self.number, self.transformer)
        moments = loras.begin((video, audio), self.networks.latent_grid())
        loras.to_step(self.progress.done)
        self._tabulate(video, audio)
        control = self._control(prompts.given)
        denoiser = self._denoiser(video, audio, prompts, control, moments)
        denoiser.restore(self.progress.done, self.progress.predictions)
        noise = self._sde_noise([state.initial.shape for state in (video, audio)])

        def step_done(position: Position) -> None:
            denoiser.step = position.done
            if loras.to_step(min(position.done, self.steps - 1)):
                self._tabulate(video, audio)
            self.progress = Progress(
                self.number,
                self.progress.latents,
                position,
                denoiser.predictions(),
                dict(noise.drawn),
            )
            finished(self.progress)

        tools = Tools(denoiser, noise, denoiser.hold, step_done)
        if self.stage.audio_norm:
            norm = SoundNorm(self.stage.audio_norm, (video, audio), self._noises(video, audio))
            tools = norm.within(tools)
        position = self.progress.position
        if not position.done:
            position = Position(0, {"x": self._start(video, audio)})
        options = self.stage.sampler_options
        final = continue_sampling(self.stage.sampler, position, self.sigmas, tools, options)
        return self._latents((controlled(control, final[0], video), *final[1:]))

    def _tabulate(self, video: LatentState, audio: LatentState) -> None:
        if self.networks.memory is not None:  # AdaLN weights are on the host
            self.transformer.tabulate(self._levels(video, audio))

    def _levels(self, video: LatentState, audio: LatentState) -> Tensor:
        """Return every noise level that a token or a whole stream will have, computed alike."""
        asked = evaluation_sigmas(self.stage.sampler, self.sigmas, self.stage.sampler_options)
        masks = torch.cat([state.levels().values for state in (video, audio)])
        tokens = [masks * sigma for sigma in asked]
        streams = torch.tensor([0.0, *asked], device=masks.device)
        levels: Tensor = torch.cat([*tokens, streams]).unique()
        return levels

    def _latents(self, final: State) -> Latents:
        sound = self.progress.latents.audio
        if self.stage.sound != "keep" or self.number == 0:
            sound = unpatchify_audio(final[1], self.shape.audio_frames, sound.shape[1])
        return Latents(unpatchify_video(final[0], self.shape), sound, self.shape)

    def _states(self, steering: Given) -> States:
        device, shape, given = self.networks.device, self.shape, self.progress.latents
        grid: LatentGrid = self.networks.latent_grid()
        latent = (shape.frames, shape.rows, shape.columns)
        positions = video_positions(latent, shape.fps, grid).to(device)
        video = conditioning.start(patchify_video(given.video), positions)
        positions = audio_positions(shape.audio_frames, self.networks.audio_grid()).to(device)
        audio = conditioning.start(patchify_audio(given.audio), positions)
        if self.stage.sound == "freeze" and self.number > 0:
            audio = conditioning.freeze(audio)
        conditions, stage = self.request.conditions, self._context()
        video, audio = steer((video, audio), conditions, steering.of(self.number), stage)
        mixed = self.request.tuning.masks == "comfy"
        return replace(video, mixed=mixed), replace(audio, mixed=mixed)

    def _control(self, given: Given) -> ChannelControl | None:
        begun, conditions = self.progress.latents.video, self.request.conditions
        own, stage = given.of(self.number), self._context()
        return channel_control(self.stage.statistics, conditions, own, begun, stage)

    def _context(self) -> StageContext:
        grids = self.networks.latent_grid(), self.networks.audio_grid()
        request = self.request
        return StageContext(self.number, self.shape, request.frames, request.rate, *grids)

    def _start(self, video: LatentState, audio: LatentState) -> State:
        pairs = zip((video, audio), self._noises(video, audio), strict=True)
        scale = self.sigmas[0] if self.stage.noise is None else self.stage.noise
        return tuple(state.noised(noise, scale) for state, noise in pairs)

    def _noises(self, video: LatentState, audio: LatentState) -> State:
        seed = stage_seed(self.request.seed, self.number, self.stage.seed)
        shapes = [state.initial.shape for state in (video, audio)]
        return initial_noise(shapes, seed, self.networks.device)

    def _sde_noise(self, shapes: list[torch.Size]) -> SdeNoise:
        seeds = {kind: sde_seed(self.request.seed, self.number, kind) for kind in SDE_KINDS}
        standardised = SAMPLERS[self.stage.sampler].standardised
        device, drawn = self.networks.device, self.progress.drawn
        return SdeNoise(shapes, seeds, standardised=standardised, device=device, drawn=drawn)

    def _prompt(self, prompts: Prompts, state: LatentState, sound: bool) -> Prompt:
        prompt, relay = prompts.of(sound), self.request.conditions.relay
        if relay is None:
            return prompt
        return relayed(prompt, prompts.passages, relay, state, self._context())

    def _identity(self) -> Identity | None:
        voice = self.request.conditions.voice
        if voice is None or not voice.identity or self.number + 1 not in voice.stages:
            return None
        return Identity(voice.identity, *voice.span)

    def _scales(self, sound: bool) -> BranchScales:
        tuning = self.request.tuning
        pairs = (tuning.video, tuning.audio_to_video), (tuning.audio, tuning.video_to_audio)
        return BranchScales(*pairs[sound], tuning.covered())

    def _denoiser(
        self,
        video: LatentState,
        audio: LatentState,
        prompts: Prompts,
        control: ChannelControl | None,
        moments: tuple[Moments | None, Moments | None],
    ) -> Denoiser:
        def first_is_finite(evaluation: Evaluation) -> None:
            # Only once a stage: looking at values makes the host wait for the device.
            if evaluation.sigma == self.sigmas[0]:
                refuse_nonfinite(evaluation, self.transformer)

        return Denoiser(
            self.transformer,
            Stream(
                video,
                self._prompt(prompts, video, sound=False),
                self.stage.video,
                control,
                moments=moments[0],
                scales=self._scales(sound=False),
            ),
            Stream(
                audio,
                self._prompt(prompts, audio, sound=True),
                self.stage.audio,
                identity=self._identity(),
                moments=moments[1],
                scales=self._scales(sound=True),
            ),
            first_is_finite,
            SAMPLERS[self.stage.sampler].needs_uncond,
        )
