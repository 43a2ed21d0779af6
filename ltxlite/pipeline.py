"""From a request to a clip: encode, then stage by stage noise, denoise and upscale, then decode.

Only what a step needs is in memory: each network is loaded where it is used and gone after it;
contexts and latents are all that is carried on.
Source of the recipes: LTX-2 400fd31, ltx_pipelines; restated in model.md 5.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ltxlite.checkpoint.lora import (
    Lora,
    attach,
    open_lora,
    other_generation,
    read_lora,
)
from ltxlite.context_cache import ContextCache
from ltxlite.delivery import Grids
from ltxlite.errors import BudgetError, CheckpointError, RequestError
from ltxlite.given.encode import check_given, encode_given
from ltxlite.lora_times import check_strengths
from ltxlite.memory import place
from ltxlite.memory.budget import Budget
from ltxlite.models.rolling import GROUP_BYTES
from ltxlite.models.tiled_window import decode_window
from ltxlite.models.transformer import Transformer
from ltxlite.networks import Networks
from ltxlite.planning import RUNGS, plan_job, smaller_window, window_of
from ltxlite.progress import Clock, Report
from ltxlite.prompts import check_texts, encode_texts
from ltxlite.repainting import enlarge_pixels
from ltxlite.request import Request
from ltxlite.resume import SavedRun
from ltxlite.stage_shapes import stage_shape
from ltxlite.stages import (
    Latents,
    Progress,
    Prompts,
    StageRun,
    beginning,
    enlarge,
    refuse_missing,
    stage_sigmas,
    step_count,
)
from ltxlite.steering.statistics import check_statistics
from ltxlite.writing import JOB_TAG as JOB_TAG
from ltxlite.writing import Made, Written, check_output, write_clip, write_sound_alone

Save = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Means:
    """What a run may use; nothing of it is part of the job.

    budget: memory; without one every network is loaded whole.  cache: contexts of earlier runs.
    fresh: do not continue an earlier run of the job.
    """

    budget: Budget | None = None
    cache: ContextCache | None = None
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What a run made, (width, height) of it, and the seconds that its parts took."""

    path: Path
    frames: int
    seconds: dict[str, float]
    size: tuple[int, int]


@torch.inference_mode()
def generate(
    request: Request, networks: Networks, report: Report, means: Means | None = None
) -> Result:
    """Make the clip that a request describes; its file appears when everything is done.

    An earlier run of the same job that was stopped is continued.
    Raises LtxliteError for anything the user can mend, most of it before weights are loaded.
    """
    means = means or Means()
    check(request, networks)
    networks.on_load = lambda loaded: report.note(loaded.line())
    clock = Clock(report)
    make_plan(request, networks, means, clock)
    with closing(networks), SavedRun(request, networks, report.note) as saved:
        progress = (None if means.fresh else saved.load()) or beginning(request, networks)
        latents = sample_latents(request, networks, progress, clock, saved.save, means)
        written = decode(request, networks, latents, clock)
        saved.discard()
    return Result(Path(request.output.path), written.frames, clock.finish(), written.size)


def check(request: Request, networks: Networks) -> None:
    """Refuse, before anything is loaded, what cannot work: missing parts, sizes, schedules.

    Raises CheckpointError naming every missing file and its repository, RequestError, or
    MediaError.
    """
    networks.sound_alone = not request.picture
    check_output(request)
    refuse_missing(request.stages, networks)
    networks.check_families()
    open_loras(request, networks)
    check_texts(request, networks)
    layers = networks.transformer_config().layers
    for number, stage in enumerate(request.stages, start=1):
        stage_sigmas(stage, stage_shape(request, stage, networks))
        for block in (*stage.video.stg_blocks, *stage.audio.stg_blocks):
            if block >= layers:
                raise RequestError(
                    f"stage {number}: stg block {block} of a transformer with {layers} blocks"
                )
    check_given(request, networks)
    check_statistics(request)
    steps = [step_count(request, networks, number) for number in range(len(request.stages))]
    check_strengths(request, steps, networks.latent_grid())


def make_plan(
    request: Request, networks: Networks, means: Means, clock: Clock, rung: int = 0
) -> None:
    """Decide where blocks live, say so, and have networks loaded accordingly.

    rung: how often memory ran out before.  Raises BudgetError for what cannot fit, with the
    nearest requests that would.
    """
    if means.budget is None:
        networks.window = window_of(networks, request, GROUP_BYTES)
        return
    plan = plan_job(networks, request, means.budget, open_loras(request, networks), rung)
    for line in plan.lines():
        clock.note(line)
    networks.close()  # whatever an earlier plan used
    networks.memory, networks.window = plan.memory(networks.device), plan.window


def encode(
    request: Request, networks: Networks, clock: Clock, cache: ContextCache | None = None
) -> Prompts:
    """Encode all texts that stages need, and all media."""
    clock.begin("encode prompt", 1)
    prompts = encode_texts(request, networks, clock.note, cache)
    clock.advance(1)
    return replace(prompts, given=encode_given(request, networks, clock))


def sample_latents(
    request: Request,
    networks: Networks,
    progress: Progress,
    clock: Clock,
    save: Save,
    means: Means | None = None,
) -> Latents:
    """Take a job from where it stands through what is left of its stages.

    Where memory runs out, although a plan said that it would do, another program may have taken
    some: the job goes on behind its last finished step, with a smaller plan.
    """
    means = means or Means()
    prompts: Prompts | None = None

    def keep(step: Progress) -> None:
        nonlocal progress
        progress = step
        save(step)

    for rung in range(1, RUNGS + 1):
        try:
            if progress.stage < len(request.stages):
                prompts = prompts or encode(request, networks, clock, means.cache)
                *_, progress = run_stages(request, networks, prompts, progress, clock, keep)
            return progress.latents
        except (torch.OutOfMemoryError, BudgetError) as error:
            if means.budget is None or rung == RUNGS:
                raise
            clock.note(f"out of memory ({_first_line(error)}); going on with a smaller plan")
        _free_unused(networks.device)
        make_plan(request, networks, means, clock, rung)
    raise AssertionError("the last rung returns or raises")


def _free_unused(device: torch.device) -> None:
    """Give back what a failed step held; behind its handler, whose traceback held it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def run_stages(
    request: Request,
    networks: Networks,
    prompts: Prompts,
    progress: Progress,
    clock: Clock,
    save: Save = lambda _: None,
) -> Iterator[Progress]:
    """Yield the progress after each stage that is left; one transformer serves them all.

    save: told the progress after each step and each stage.
    """
    clock.begin("load transformer", 1)
    transformer = networks.transformer(
        lambda network: attach_loras(request, networks, network, clock)
    )

    def finished(step: Progress) -> None:
        clock.advance(step.done)
        save(step)

    for number in range(progress.stage, len(request.stages)):
        stage = request.stages[number]
        if stage.upscaler is not None:
            place.rest(transformer)  # its slots make room for the upscaler
        progress = at_stage_size(request, networks, progress, clock)
        run = StageRun(request, progress, networks, transformer)
        clock.begin(f"stage {number + 1} of {len(request.stages)}", run.steps)
        clock.advance(progress.done)
        progress = Progress(number + 1, run(prompts, finished))
        save(progress)
        yield progress
    place.close(transformer)


def at_stage_size(
    request: Request, networks: Networks, progress: Progress, clock: Clock
) -> Progress:
    """Return the progress with latents of its stage's size, upscaled if they are not yet."""
    stage = request.stages[progress.stage]
    if stage.upscaler is None or progress.done:
        return progress
    clock.begin(f"upscale {stage.upscaler}", 1)
    shape = stage_shape(request, stage, networks)
    if stage.upscaler == "pixels":
        larger = enlarge_pixels(request, networks, progress.latents, shape)
    else:
        larger = enlarge(networks, progress.latents, shape, stage.upscaler)
    return Progress(progress.stage, larger)


def open_loras(request: Request, networks: Networks) -> list[Lora]:
    """Read the headers of the job's LoRA files. Raises CheckpointError for anything else."""
    paths = [Path(path) for path in request.files.loras]
    if [model.path for model in networks.lora_models] != paths:
        networks.lora_models = [open_lora(path) for path in paths]
    return [read_lora(model) for model in networks.lora_models]


def attach_loras(
    request: Request, networks: Networks, transformer: Transformer, clock: Clock
) -> None:
    """Hang the job's LoRA files beside the transformer and tell what of them fitted."""
    loras = open_loras(request, networks)
    for report in attach(transformer, loras, networks.naming("transformer")):
        clock.note(report.count() if networks.sound_alone else report.line())
    version = networks.version() or networks.family_version()
    for lora in loras:
        if warning := other_generation(lora, version):
            clock.note(warning)


def decode(request: Request, networks: Networks, latents: Latents, clock: Clock) -> Written:
    """Decode sound and picture and write the clip; return what it is like.

    Where the card runs out of memory the picture is decoded again, through a smaller window: the
    same frames, as long as no tiles are needed.
    """
    sound: tuple[Tensor, int] | None = None
    grids = Grids(networks.latent_grid(), networks.audio_grid())
    for attempt in range(1, RUNGS + 1):
        try:
            if sound is None:
                clock.begin("decode sound", 1)
                sound = decode_sound(networks, latents.audio)
            if not request.picture:
                return write_sound_alone(request, sound)
            clock.begin("decode picture", request.frames)
            made = Made(decode_picture(networks, latents.video), sound)
            return write_clip(request, made, grids, clock)
        except torch.OutOfMemoryError as error:
            if attempt == RUNGS:
                raise
            reason = _first_line(error)
        _free_unused(networks.device)
        if sound is not None:  # the sound's decoding has nothing that could be made smaller
            frames, rows, columns = latents.video.shape[2:]
            with suppress(BudgetError):  # the smallest one may still fit a little later
                networks.window = smaller_window(networks, (frames, rows, columns))
        tiles = "" if networks.window.is_whole else ", in tiles"
        clock.note(f"out of memory ({reason}); decoding anew, with less{tiles}")
    raise AssertionError("the last rung returns or raises")


def decode_sound(networks: Networks, latent: Tensor) -> tuple[Tensor, int]:
    """Decode an audio latent (1, C, T, M) to a waveform (2, N) fp32 and its rate."""
    spectrogram = networks.audio_decoder()(latent.to(networks.dtype))
    vocoder = networks.vocoder()
    with torch.backends.cudnn.flags(allow_tf32=False):  # fp32 is what its sound needs
        waveform: Tensor = vocoder(spectrogram.float())[0]
    if not bool(waveform.isfinite().all()):
        raise CheckpointError("the decoded sound holds NaN: audio VAE or vocoder are damaged")
    return waveform, vocoder.sample_rate


def decode_picture(networks: Networks, latent: Tensor) -> Iterator[Tensor]:
    """Yield decoded frames (f, 3, H, W) in about [-1, 1] as they are finished."""
    decoder = networks.video_decoder()
    for frames in decode_window(decoder, latent, networks.window):
        if not bool(frames.isfinite().all()):
            raise CheckpointError(
                "the decoded picture holds NaN: the video VAE is damaged, or float16 overflows in "
                "it; use --dtype bfloat16 or download it again"
            )
        yield frames[0].transpose(0, 1)
