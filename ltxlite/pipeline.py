"""From a request to a clip: encode, then stage by stage noise, denoise and upscale, then decode.

Only what a step needs is in memory: each network is loaded where it is used and gone after it;
contexts and latents are all that is carried on.
Source of the recipes: LTX-2 400fd31, ltx_pipelines; restated in model.md 5.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltxlite.checkpoint.files import open_models
from ltxlite.checkpoint.lora import Lora, attach, other_generation, read_lora, set_strengths
from ltxlite.encode import encode_prompts
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.media.audio import write_wav
from ltxlite.media.frame_writer import FrameWriter, create_frames
from ltxlite.media.output import VideoSettings
from ltxlite.media.video_writer import VideoWriter, create_video
from ltxlite.models.rolling import decode_frames
from ltxlite.models.transformer import Transformer
from ltxlite.networks import Networks
from ltxlite.progress import Clock, Report
from ltxlite.request import Request
from ltxlite.stages import (
    Latents,
    Prompts,
    StageRun,
    enlarge,
    first_latents,
    needs_negative,
    refuse_missing,
    stage_shape,
    stage_sigmas,
)

JOB_TAG = "ltxlite_job"


@dataclass(frozen=True, slots=True)
class Result:
    """What a run made, and the seconds that its parts took."""

    path: Path
    frames: int
    seconds: dict[str, float]


@torch.inference_mode()
def generate(request: Request, networks: Networks, report: Report) -> Result:
    """Make the clip that a request describes; its file appears when everything is done.

    Raises LtxliteError for anything the user can mend, most of it before weights are loaded.
    """
    check(request, networks)
    networks.on_load = lambda loaded: report.note(loaded.line())
    clock = Clock(report)
    clock.begin("encode prompt", 1)
    prompts = encode(request, networks, clock)
    latents = first_latents(networks, stage_shape(request, request.stages[0], networks))
    for stage_latents in run_stages(request, networks, prompts, latents, clock):
        latents = stage_latents
    clock.begin("decode sound", 1)
    waveform, rate = decode_sound(networks, latents.audio)
    clock.begin("decode picture", request.frames)
    write_clip(request, decode_picture(networks, latents.video), (waveform, rate), clock)
    return Result(Path(request.output.path), request.frames, clock.finish())


def check(request: Request, networks: Networks) -> None:
    """Refuse, before anything is loaded, what cannot work: missing parts, sizes, schedules.

    Raises CheckpointError naming every missing file and its repository, or RequestError.
    """
    refuse_missing(request.stages, networks)
    networks.check_families()
    for path in request.files.loras:
        read_loras(path)
    layers = networks.transformer_config().layers
    for number, stage in enumerate(request.stages, start=1):
        stage_sigmas(stage, stage_shape(request, stage, networks))
        for block in (*stage.video.stg_blocks, *stage.audio.stg_blocks):
            if block >= layers:
                raise RequestError(
                    f"stage {number}: stg block {block} of a transformer with {layers} blocks"
                )


def encode(request: Request, networks: Networks, clock: Clock) -> Prompts:
    """Encode the prompt, and the negative one where some stage needs it."""
    texts = [request.prompt]
    if any(needs_negative(stage) for stage in request.stages):
        texts.append(request.negative or "")
    contexts = encode_prompts(networks, texts, clock.note)
    clock.advance(1)
    return Prompts(contexts[0], contexts[1] if len(contexts) > 1 else None)


def run_stages(
    request: Request, networks: Networks, prompts: Prompts, latents: Latents, clock: Clock
) -> Iterator[Latents]:
    """Yield the latents after each stage; one transformer serves them all."""
    clock.begin("load transformer", 1)
    transformer = networks.transformer()
    loras = attach_loras(request, networks, transformer, clock)
    for number, stage in enumerate(request.stages):
        run = StageRun(request, number, networks, transformer)
        if stage.upscaler is not None:
            clock.begin(f"upscale {stage.upscaler}", 1)
            latents = enlarge(networks, latents, run.shape, stage.upscaler)
        set_strengths(
            transformer, {lora.source: stage.lora_strength(i) for i, lora in enumerate(loras)}
        )
        clock.begin(f"stage {number + 1} of {len(request.stages)}", run.steps)
        latents = run(latents, prompts, clock.advance)
        yield latents


def read_loras(path: str) -> list[Lora]:
    """Read a LoRA file. Raises CheckpointError for anything else."""
    models = open_models(Path(path))
    if "lora" not in models[0].components:
        raise CheckpointError(
            f"{path}: given as a LoRA, but it holds {', '.join(models[0].components)}"
        )
    return [read_lora(model) for model in models]


def attach_loras(
    request: Request, networks: Networks, transformer: Transformer, clock: Clock
) -> list[Lora]:
    """Hang the job's LoRA files beside the transformer and tell what of them fitted."""
    loras = [lora for path in request.files.loras for lora in read_loras(path)]
    for report in attach(transformer, loras, networks.naming("transformer")):
        clock.note(report.line())
    for lora in loras:
        if warning := other_generation(lora, networks.version()):
            clock.note(warning)
    transformer.to(networks.device)
    return loras


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
    for frames in decode_frames(decoder, latent):
        if not bool(frames.isfinite().all()):
            raise CheckpointError(
                "the decoded picture holds NaN: the video VAE is damaged, or float16 overflows in "
                "it; use --dtype bfloat16 or download it again"
            )
        yield frames[0].transpose(0, 1)


def write_clip(
    request: Request, frames: Iterator[Tensor], sound: tuple[Tensor, int], clock: Clock
) -> None:
    """Write frames and sound where the request says, as they come."""
    waveform, rate = sound
    done = 0
    with _writer(request, rate) as writer:
        writer.write_audio(waveform)
        for piece in frames:
            writer.write(piece)
            done += len(piece)
            clock.advance(done)
    if request.output.wav is not None:
        write_wav(Path(request.output.wav), waveform, rate)


def _writer(request: Request, rate: int) -> AbstractContextManager[VideoWriter | FrameWriter]:
    output = request.output
    width, height = output.crop or (request.width, request.height)
    settings = VideoSettings(
        width=width,
        height=height,
        fps=request.rate,
        audio_rate=rate,
        crf=output.crf,
        metadata={JOB_TAG: request.to_json(), "comment": request.prompt[:200]},
    )
    path = Path(output.path)
    if path.suffix:
        return create_video(path, settings)
    return create_frames(path, settings)
