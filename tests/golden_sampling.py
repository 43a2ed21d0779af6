"""Runners of the reference cases that sample: guidance, samplers, conditioning, whole pipelines."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import torch
from golden_support import Case, Outputs
from torch import Tensor

from ltxlite import conditioning
from ltxlite.conditioning import LatentState, StageContext, States
from ltxlite.conditions import Conditions, Guide, Image
from ltxlite.denoise import Denoiser, Evaluation, Prompt, Stream
from ltxlite.geometry import (
    ClipShape,
    audio_positions,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
    video_positions,
)
from ltxlite.given import GivenReference, StageGiven
from ltxlite.media.colour import to_uint8_rgb
from ltxlite.models.upscaler import upscale_normalised
from ltxlite.networks import Networks
from ltxlite.sampling.contract import NoiseKind, Position, State, Tools
from ltxlite.sampling.guidance import apg, cfg_star, combine
from ltxlite.sampling.samplers import sample
from ltxlite.sampling.schedules import TABLES
from ltxlite.sampling.settings import Guidance, Options
from ltxlite.steering import steer
from ltxlite.steering.images import attention_weight

GUIDANCE_FIELDS = {
    "cfg_scale": "cfg",
    "stg_scale": "stg",
    "rescale_scale": "rescale",
    "modality_scale": "modality",
    "stg_blocks": "stg_blocks",
    "skip_step": "skip_step",
}


def read_guidance(params: dict) -> Guidance:
    """Translate a guider's parameters; a perturbation strength without blocks means block 0."""
    fields = {GUIDANCE_FIELDS[name]: value for name, value in params.items()}
    if fields.get("stg") and not fields.get("stg_blocks"):
        fields["stg_blocks"] = [0]
    return Guidance(**fields)


def run_guidance_formulas(case: Case) -> Outputs:
    inputs = [case.given(name) for name in ("cond", "uncond", "perturbed", "modality")]
    outputs: Outputs = {}
    for name, p in case.variants():
        if name == "cfg_star":
            outputs[name] = cfg_star(inputs[0], inputs[1], p["scale"])
        elif name == "apg":
            outputs[name] = apg(inputs[0], inputs[1], p["scale"], p["eta"], p["norm_threshold"])
        else:
            outputs[name] = combine(*inputs, read_guidance(p))
    return outputs


class Recorder:
    """Keeps what the denoiser saw and said in each evaluation."""

    def __init__(self) -> None:
        self.seen: list[Evaluation] = []

    def __call__(self, evaluation: Evaluation) -> None:
        self.seen.append(evaluation)

    def outputs(self) -> Outputs:
        video, audio = zip(*(item.state for item in self.seen), strict=True)
        video_x0, audio_x0 = zip(*(item.x0 for item in self.seen), strict=True)
        return {
            "step_video_latents": torch.stack(video),
            "step_audio_latents": torch.stack(audio),
            "step_video_x0": torch.stack(video_x0),
            "step_audio_x0": torch.stack(audio_x0),
            "step_sigmas": torch.tensor([item.sigma for item in self.seen]),
        }


class Run:
    """A sampling run of a case: two streams, a sampler, the stored schedule."""

    def __init__(
        self,
        case: Case,
        sampler: str = "euler",
        options: Options | None = None,
        sigmas: Tensor | None = None,
    ) -> None:
        self.case, self.sampler, self.options = case, sampler, options or {}
        self.recorder = Recorder()
        self.sigmas = case.tensors["sigmas"] if sigmas is None else sigmas
        self.video_guidance = self.audio_guidance = Guidance()
        self.noise: dict[str, Iterator[State]] = {}

    def _prompt(self, stream: str) -> Prompt:
        return Prompt(self.case.given(f"{stream}_context"), self.case.get(f"{stream}_negative"))

    def __call__(self, video: LatentState, audio: LatentState, start: State) -> State:
        denoiser = Denoiser(
            self.case.networks().transformer(),
            Stream(video, self._prompt("video"), self.video_guidance),
            Stream(audio, self._prompt("audio"), self.audio_guidance),
            self.recorder,
        )

        def finished(position: Position) -> None:
            denoiser.step = position.done

        def noise(kind: NoiseKind) -> State:
            return next(self.noise[kind])

        tools = Tools(denoiser, noise, denoiser.blend, finished)
        return sample(self.sampler, start, self.sigmas, tools, self.options)


def _grids(case: Case) -> tuple[Networks, int, int]:
    networks = case.networks()
    config = networks.transformer_config()
    return networks, config.video.channels, config.audio.channels


def _plain_states(case: Case, latent: tuple[int, int, int]) -> tuple[LatentState, LatentState]:
    """Begin both states from the stored initial latents, or from zeros."""
    networks, video_channels, audio_channels = _grids(case)
    p = case.params
    count, frames = latent[0] * latent[1] * latent[2], p["audio_frames"]
    video, audio = torch.zeros(1, count, video_channels), torch.zeros(1, frames, audio_channels)
    if (stored := case.get("video_initial")) is not None:
        video = patchify_video(stored)
    if (stored := case.get("audio_initial")) is not None:
        audio = patchify_audio(stored)
    return (
        conditioning.start(video, video_positions(latent, p["fps"], networks.latent_grid())),
        conditioning.start(audio, audio_positions(frames, networks.audio_grid())),
    )


def _sampler_case(case: Case, run: Run) -> Outputs:
    p = case.params
    latent = (p["latent_frames"], p["latent_height"], p["latent_width"])
    video, audio = _plain_states(case, latent)
    start = (case.given("video_noise"), case.given("audio_noise"))
    final = run(video, audio, start)
    outputs = {"sigmas": run.sigmas, "video_final": final[0], "audio_final": final[1]}
    return outputs | run.recorder.outputs()


def run_sampler_euler(case: Case) -> Outputs:
    return _sampler_case(case, Run(case))


def run_sampler_gradient(case: Case) -> Outputs:
    gamma = case.params.get("ge_gamma", 2.0)
    return _sampler_case(case, Run(case, "euler_gradient", {"gamma": gamma}))


def run_sampler_res2s(case: Case) -> Outputs:
    p = case.params
    assert p["legacy_mode"], "only the loop of model.md 4.5 exists"
    run = Run(case, "res_2s", {"eta": p["eta"], "bong": p["bongmath"]})
    run.noise = {kind: iter(_stored_noise(case, kind)) for kind in ("sub", "step")}
    return _sampler_case(case, run)


def _stored_noise(case: Case, kind: str) -> list[State]:
    """Return the injected noises of one kind, in order of the steps."""
    steps = sorted(
        int(name.split(".")[2]) for name in case.tensors if name.endswith(f".{kind}_video")
    )
    streams = ("video", "audio")
    return [tuple(case.given(f"noise.{step}.{kind}_{s}") for s in streams) for step in steps]


def run_guided(case: Case) -> Outputs:
    p = case.params
    run = Run(case)
    run.video_guidance, run.audio_guidance = read_guidance(p["video"]), read_guidance(p["audio"])
    video, audio = _plain_states(case, tuple(p["latent"]))
    final = run(video, audio, (case.given("video_noise"), case.given("audio_noise")))
    outputs = {"sigmas": run.sigmas, "video_final": final[0], "audio_final": final[1]}
    return outputs | run.recorder.outputs()


def run_conditioned(case: Case) -> Outputs:
    """Build the conditioned state as the parameters say, then run Euler steps."""
    p = case.params
    networks, _, _ = _grids(case)
    video, audio = _plain_states(case, tuple(p["latent"]))
    video, audio = _steered(case, (video, audio), networks)
    frozen = str(p.get("audio", "")).startswith("frozen")
    audio = conditioning.freeze(audio) if frozen else audio
    if "start_time" in p:
        video, audio = (
            conditioning.mask_interval(state, p["start_time"], p["end_time"])
            for state in (video, audio)
        )
    scale = p.get("noise_scale", 1.0)
    start = (
        video.noised(case.given("video_noise"), scale),
        audio.noised(case.given("audio_noise"), 0.0 if frozen else scale),
    )
    run = Run(case)
    final = run(video, audio, start)
    return _conditioned_outputs(case, run, (video, audio), start, final)


def _conditioned_outputs(
    case: Case, run: Run, states: tuple[LatentState, LatentState], start: State, final: State
) -> Outputs:
    p = case.params
    frames, rows, columns = p["latent"]
    shape = ClipShape(frames, rows, columns, p["audio_frames"], p["fps"])
    outputs = {"sigmas": run.sigmas} | run.recorder.outputs()
    for stream, state, x in zip(("video", "audio"), states, start, strict=True):
        outputs[f"state.{stream}_latent"] = x
        outputs[f"state.{stream}_denoise_mask"] = state.mask
        outputs[f"state.{stream}_positions"] = state.positions
        outputs[f"state.{stream}_clean"] = state.clean
    outputs["state.video_attention_mask"] = conditioning.dense_weights(states[0])
    outputs["video_final"] = unpatchify_video(final[0], shape)
    bins = case.networks().audio_bins()
    channels = final[1].shape[2] // bins
    outputs["audio_final"] = unpatchify_audio(final[1], shape.audio_frames, channels)
    return outputs


def _steered(case: Case, states: States, networks: Networks) -> States:
    """Put what the case gives into the states, as a job's records would."""
    p, latent = case.params, case.params["latent"]
    shape = ClipShape(*latent, p["audio_frames"], p["fps"])
    grids = networks.latent_grid(), networks.audio_grid()
    frames = grids[0].pixel_frames(latent[0])
    stage = StageContext(0, shape, frames, Fraction(p["fps"]), *grids)
    conditions, given = Conditions(), StageGiven()
    if (image := case.get("image_latent")) is not None:
        # Without an entry of its own the image stands at the start; `strength` is then another's.
        said = p.get("image", p if "latent_index" in p else {})
        at, strength = said.get("latent_index", 0) * grids[0].time, said.get("strength", 1.0)
        conditions = replace(conditions, images=(Image("image", str(at), (strength,)),))
        given = replace(given, images=(image,))
    if (keyframe := case.get("keyframe_latent")) is not None:
        said = p["keyframe"]
        assert said["num_pixel_frames"] == grids[0].pixel_frames(keyframe.shape[2])
        guide = Guide("keyframe", str(said["frame_idx"]), (said["strength"],))
        conditions = replace(conditions, guides=(guide,))
        given = replace(given, guides=(keyframe,))
    if (latent := case.get("reference_latent")) is not None:
        given = replace(given, references=(_reference(p, latent),))
    return steer(states, conditions, given, stage)


def _reference(p: dict, latent: Tensor) -> GivenReference:
    weight = attention_weight(p.get("attention_strength", 1.0), latent[0, 0].numel())
    factors = p["downscale_factor"], p.get("temporal_scale_factor", 1)
    return GivenReference(latent, p["strength"], *factors, weight)


def run_pipeline(case: Case) -> Outputs:
    """Two distilled stages with stored noises, upscaling between, decoding at the end."""
    p = case.params
    networks = case.networks(p["upsampler"])
    grid, audio_grid = networks.latent_grid(), networks.audio_grid()
    assert audio_grid.latent_frames(p["frames"], p["fps"]) == p["audio_latent_frames"]
    outputs: Outputs = {}
    frames = grid.latent_frames(p["frames"])
    latents: tuple[Tensor, Tensor] | None = None
    for stage, table in ((1, "distilled"), (2, "stage2")):
        rows, columns = (p[name] // grid.space // (3 - stage) for name in ("height", "width"))
        shape = ClipShape(frames, rows, columns, p["audio_latent_frames"], p["fps"])
        if latents is not None:
            upscaler = networks.upscaler_from(networks.files.all("upscaler")[-1])
            mean, std = networks.latent_statistics()
            upscaled = upscale_normalised(upscaler, latents[0], mean, std)
            outputs["upscaled_latent"] = upscaled
            latents = (upscaled, latents[1])
        latents = _pipeline_stage(case, stage, shape, torch.tensor(TABLES[table]), latents)
        outputs[f"stage{stage}.video_latent"], outputs[f"stage{stage}.audio_latent"] = latents
    assert latents is not None
    pixels = networks.video_decoder()(latents[0])
    index = case.tensors["frame_index"]
    outputs["frame_index"] = index
    outputs["uint8_frames"] = to_uint8_rgb(pixels[0, :, index].transpose(0, 1))
    stored = case.tensors["pixels_frames"].shape[2]
    outputs["pixels_frames"] = pixels[:, :, index][:, :, :stored]
    if "waveform" in case.expected:
        outputs["waveform"] = networks.vocoder()(networks.audio_decoder()(latents[1]))[0]
    return outputs


def _pipeline_stage(
    case: Case,
    stage: int,
    shape: ClipShape,
    sigmas: Tensor,
    previous: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    networks, video_channels, audio_channels = _grids(case)
    if previous is None:
        video_tokens = torch.zeros(1, shape.video_tokens, video_channels)
        audio_tokens = torch.zeros(1, shape.audio_frames, audio_channels)
    else:
        video_tokens, audio_tokens = patchify_video(previous[0]), patchify_audio(previous[1])
    latent = (shape.frames, shape.rows, shape.columns)
    positions = video_positions(latent, shape.fps, networks.latent_grid())
    video = conditioning.start(video_tokens, positions)
    audio = conditioning.start(
        audio_tokens, audio_positions(shape.audio_frames, networks.audio_grid())
    )
    image = case.get(f"image_stage{stage}")
    if image is not None:
        encoded = networks.video_encoder()(image.float())
        video = conditioning.place_image(video, encoded, 0, 1.0)
    scale = float(sigmas[0])
    start = (
        video.noised(case.given(f"stage{stage}.video_noise"), scale),
        audio.noised(case.given(f"stage{stage}.audio_noise"), scale),
    )
    final = Run(case, sigmas=sigmas)(video, audio, start)
    channels = audio_channels // networks.audio_bins()
    return (
        unpatchify_video(final[0], shape),
        unpatchify_audio(final[1], shape.audio_frames, channels),
    )


SAMPLING_KINDS = {
    "guidance_formulas": run_guidance_formulas,
    "sampler_euler": run_sampler_euler,
    "sampler_gradient_estimating": run_sampler_gradient,
    "sampler_res2s": run_sampler_res2s,
    "sampler_res2s_nobong_eta0": run_sampler_res2s,
    "guided_full": run_guided,
    "guided_cfg_only": run_guided,
    "guided_skip_step": run_guided,
    "cond_image_in_place": run_conditioned,
    "cond_image_in_place_strength07_stage2": run_conditioned,
    "cond_keyframe": run_conditioned,
    "cond_keyframe_clip_strength08": run_conditioned,
    "cond_ic_lora_reference": run_conditioned,
    "cond_ic_lora_reference_attn05": run_conditioned,
    "cond_frozen_audio": run_conditioned,
    "cond_retake": run_conditioned,
    "pipeline_two_stage_t2v": run_pipeline,
    "pipeline_two_stage_i2v": run_pipeline,
}
