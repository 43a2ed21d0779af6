"""Runners of the reference cases that exercise networks alone."""

import torch
import torch.nn.functional as F
from golden_support import Case, Outputs
from safetensors.torch import load_file
from torch import Tensor

from ltxlite.checkpoint.files import open_models
from ltxlite.checkpoint.lora import attach, read_lora, set_strengths
from ltxlite.geometry import (
    LatentGrid,
)
from ltxlite.low_rank import merged_weight
from ltxlite.models.block import StreamState
from ltxlite.models.mel import log_mel, mel_filterbank, resample
from ltxlite.models.passes import (
    Pass,
    Perturbation,
    RowWeights,
    Skip,
    StreamInput,
    Timesteps,
    Velocity,
)
from ltxlite.models.tiling import Span, Tiling, tiled_decode, tiled_encode
from ltxlite.models.upscaler import upscale_normalised

SKIPS = {
    "SKIP_VIDEO_SELF_ATTN": Skip.VIDEO_SELF,
    "SKIP_AUDIO_SELF_ATTN": Skip.AUDIO_SELF,
    "SKIP_A2V_CROSS_ATTN": Skip.AUDIO_TO_VIDEO,
    "SKIP_V2A_CROSS_ATTN": Skip.VIDEO_TO_AUDIO,
}


def stream_input(case: Case, stream: str, enabled: bool = True) -> StreamInput:
    """Read one stream of a transformer case."""
    latent = case.given(f"{stream}.latent")
    dense = case.get(f"{stream}.attention_mask")
    return StreamInput(
        latent=latent,
        sigma=case.given(f"{stream}.sigma"),
        timesteps=Timesteps.of(case.given(f"{stream}.timesteps")),
        positions=case.given(f"{stream}.positions"),
        context=case.given(f"{stream}.context"),
        context_mask=case.get(f"{stream}.context_mask"),
        weights=() if dense is None else (RowWeights(0, latent.shape[1], dense),),
        enabled=enabled,
    )


def _velocities(velocity: Velocity, prefix: str = "") -> Outputs:
    named = {f"{prefix}video_velocity": velocity.video, f"{prefix}audio_velocity": velocity.audio}
    return {name: value for name, value in named.items() if value is not None}


def run_dit(case: Case) -> Outputs:
    """Run one forward pass; in-between states and x0 only where the case stores them."""
    transformer = case.networks().transformer()
    given = Pass(stream_input(case, "video"), stream_input(case, "audio"))
    state = transformer.begin(given)
    outputs: Outputs = {}
    for stream in ("video", "audio"):
        outputs |= _prepared(getattr(state, stream), stream)
    for number, block in enumerate(transformer.blocks):
        block(state, number)
        outputs[f"block{number}.video"] = state.video.x.clone()
        outputs[f"block{number}.audio"] = state.audio.x.clone()
    velocity = transformer.finish(state)
    outputs |= _velocities(velocity)
    for stream in ("video", "audio"):
        latent, levels = case.given(f"{stream}.latent"), case.given(f"{stream}.timesteps")
        outputs[f"{stream}_x0"] = latent - getattr(velocity, stream) * levels
    return outputs


def _prepared(state: StreamState, stream: str) -> Outputs:
    every = slice(None)

    def rows(name: str) -> Tensor:
        held = getattr(state, name, None) or getattr(state.exchange, name)
        return held.rows[held.index].flatten(2)

    outputs = {
        "x": state.x.clone(),
        "timesteps": rows("modulation"),
        "embedded_timestep": state.embedded.vectors(0, every).spread(),
        "pe_cos": state.rope.own.cos.transpose(1, 2),
        "pe_sin": state.rope.own.sin.transpose(1, 2),
        "cross_pe_cos": state.rope.cross.cos.transpose(1, 2),
        "cross_pe_sin": state.rope.cross.sin.transpose(1, 2),
        "cross_scale_shift_timestep": rows("cross"),
        "cross_gate_timestep": rows("gate"),
        "context": state.context,
    }
    if state.prompt is not None:
        outputs["prompt_timestep"] = rows("prompt")
    return {f"pre.{stream}.{name}": value for name, value in outputs.items()}


def _perturbation(skips: list) -> Perturbation:
    return Perturbation(
        tuple((SKIPS[kind], None if at is None else frozenset(at)) for kind, at in skips)
    )


def run_dit_perturbed(case: Case) -> Outputs:
    transformer = case.networks().transformer()
    video, audio = stream_input(case, "video"), stream_input(case, "audio")
    batch = video.latent.shape[0]
    outputs: Outputs = {}
    for name, skips in case.variants():
        velocity = transformer(Pass(video, audio, (_perturbation(skips),) * batch))
        outputs |= _velocities(velocity, f"{name}.")
    return outputs


def run_dit_perturbed_mixed_batch(case: Case) -> Outputs:
    perturbations = tuple(map(_perturbation, case.params["per_sample"]))
    video, audio = stream_input(case, "video"), stream_input(case, "audio")
    return _velocities(case.networks().transformer()(Pass(video, audio, perturbations)))


def run_dit_single_modality(case: Case) -> Outputs:
    transformer = case.networks().transformer()
    video, audio = stream_input(case, "video"), stream_input(case, "audio")
    outputs: Outputs = {}
    alone = {
        "video": transformer(Pass(video, None)).video,
        "audio": transformer(Pass(None, audio)).audio,
    }
    for stream, velocity in alone.items():
        assert velocity is not None
        outputs[f"{stream}_alone.velocity"] = velocity
        disabled = {
            name: stream_input(case, name, enabled=name != stream) for name in ("video", "audio")
        }
        velocities = transformer(Pass(disabled["video"], disabled["audio"]))
        outputs |= _velocities(velocities, f"{stream}_disabled.")
    return outputs


def run_lora(case: Case) -> Outputs:
    outputs: Outputs = {}
    given = Pass(stream_input(case, "video"), stream_input(case, "audio"))
    outputs |= _velocities(case.networks().transformer()(given), "none.")
    for name, p in case.variants():
        transformer = case.networks().transformer()
        loras = [read_lora(open_models(case.root / file)[0]) for file, _ in p["loras"]]
        reports = attach(transformer, loras, case.networks().naming("transformer"))
        assert sum(report.matched for report in reports) == p["fused_matrices"], name
        assert not any(report.unmatched for report in reports), name
        set_strengths(transformer, {str(case.root / file): s for file, s in p["loras"]})
        outputs |= _velocities(transformer(given), f"{name}.")
    for name in case.expected:
        if name.startswith("bf16_fused."):
            outputs[name] = _fused_bf16(case, name)
    return outputs


def _fused_bf16(case: Case, name: str) -> Tensor:
    module, strength = name.removeprefix("bf16_fused.").split(".weight_strength")
    file = next(iter(case.params.values()))["loras"][0][0]
    term = read_lora(open_models(case.root / file)[0]).terms[module]
    weights = load_file(case.root / case.entry["model"])
    weight = weights[f"model.diffusion_model.{module}.weight"]
    return merged_weight(weight, [term], torch.bfloat16, [float(strength)])


def run_video_encode(case: Case) -> Outputs:
    encoder = case.networks().video_encoder()
    return {
        name.replace("in.", "").replace(".pixels", ".latent"): encoder(pixels.float())
        for name, pixels in case.tensors.items()
        if name.startswith("in.")
    }


def run_video_decode(case: Case) -> Outputs:
    decoder = case.networks().video_decoder()
    return {
        name.replace("in.", "").replace(".latent", ".pixels"): decoder(latent)
        for name, latent in case.tensors.items()
        if name.startswith("in.")
    }


def _tiling(params: dict) -> Tiling:
    return Tiling(*(Span(*params[axis]) for axis in ("frames", "height", "width")))


def run_video_decode_tiled(case: Case) -> Outputs:
    decoder = case.networks().video_decoder()
    latent, index = case.given("latent"), case.tensors["frame_index"]
    outputs = {"frame_index": index, "untiled": decoder(latent)[:, :, index]}
    for name, p in case.variants():
        pieces = list(tiled_decode(decoder, latent, _tiling(p)))
        lengths = [piece.shape[2] for piece in pieces]
        assert lengths == [n for n in p["chunk_frames"] if n], f"{name}: pieces of {lengths}"
        outputs[name] = torch.cat(pieces, dim=2)[:, :, index]
    return outputs


def run_video_encode_tiled(case: Case) -> Outputs:
    encoder = case.networks().video_encoder()
    pixels = _rebuilt_pixels(case, encoder.config.grid)
    tiled = tiled_encode(encoder, pixels, _tiling(case.params))
    return {"tiled_latent": tiled, "untiled_latent": encoder(pixels)}


def _rebuilt_pixels(case: Case, grid: LatentGrid) -> Tensor:
    """Enlarge the stored source as the set's README says; the stored frames must come out."""
    frames, rows, columns = case.tensors["untiled_latent"].shape[2:]
    size = (grid.pixel_frames(frames), grid.space * rows, grid.space * columns)
    resized = F.interpolate(case.given("source"), size, mode="trilinear", align_corners=False)
    levels = (127.5 * resized.tanh()).round().clamp(-127, 127)
    for name, stored in case.tensors.items():
        if name.startswith("in.pixels_int8_frame"):
            index = [int(number) for number in name.removeprefix("in.pixels_int8_frame").split("_")]
            off = (levels[:, :, index] - stored.float()).abs()
            # Ties of the rounding may fall either way: at most one level, on few pixels.
            assert off.max() <= 1, name
            assert (off > 0).float().mean() < 1e-3, name
    return levels / 127.5


def run_video_latent_stats(case: Case) -> Outputs:
    decoder = case.networks().video_decoder()
    return {"mean": decoder.latent_mean, "std": decoder.latent_std}


def run_mel(case: Case) -> Outputs:
    outputs = {"mel_filterbank": mel_filterbank()}
    if (wave := case.get("wave16k")) is not None:
        outputs["mel_from_16k"] = log_mel(wave, 16000)
    if (wave := case.get("wave_other")) is not None:
        rate = case.params["other_rate"]
        outputs["mel_from_other"] = log_mel(wave, rate)
        outputs["resampled_16k"] = resample(wave, rate, 16000)
    return outputs


def run_audio_encode(case: Case) -> Outputs:
    return {"latent": case.networks().audio_encoder()(case.given("mel"))}


def run_audio_decode(case: Case) -> Outputs:
    decoder = case.networks().audio_decoder()
    return {
        name.replace("in.latent", "mel"): decoder(latent)
        for name, latent in case.tensors.items()
        if name.startswith("in.")
    }


def run_vocoder(case: Case) -> Outputs:
    vocoder = case.networks().vocoder()
    spectrogram = case.given("mel")
    outputs = {"waveform": vocoder(spectrogram)}
    if case.expected.keys() - outputs.keys():
        core = vocoder.core_waveform(spectrogram)
        padded = vocoder.padded(core)
        outputs["vocoder_16k"] = core
        outputs["bwe_mel"] = vocoder.bwe_mel(padded)
        outputs["bwe_residual"] = vocoder.residual(padded)
        outputs["skip"] = vocoder.skip(padded)
    return outputs


def run_audio_latent_to_wave(case: Case) -> Outputs:
    networks = case.networks()
    vocoder = networks.vocoder()
    assert vocoder.sample_rate == case.params.get("sampling_rate", vocoder.sample_rate)
    return {"waveform": vocoder(networks.audio_decoder()(case.given("latent")))[0]}


def run_upsamplers(case: Case) -> Outputs:
    outputs: Outputs = {}
    latent = case.given("latent")
    for name, file in case.variants():
        networks = case.networks(file)
        upscaler = networks.upscaler_from(networks.files.all("upscaler")[-1])
        mean, std = networks.latent_statistics()
        outputs[f"{name}.raw"] = upscaler(latent)
        outputs[f"{name}.normalised"] = upscale_normalised(upscaler, latent, mean, std)
    return outputs


NETWORK_KINDS = {
    "dit_basic": run_dit,
    "dit_batch2_pertoken": run_dit,
    "dit_textmask": run_dit,
    "dit_keyframe_tokens": run_dit,
    "dit_keyframe_and_masked_reference": run_dit,
    "dit_perturbed": run_dit_perturbed,
    "dit_perturbed_mixed_batch": run_dit_perturbed_mixed_batch,
    "dit_single_modality": run_dit_single_modality,
    "lora": run_lora,
    "video_encode": run_video_encode,
    "video_decode": run_video_decode,
    "video_decode_tiled": run_video_decode_tiled,
    "video_encode_tiled": run_video_encode_tiled,
    "video_latent_stats": run_video_latent_stats,
    "mel": run_mel,
    "audio_encode": run_audio_encode,
    "audio_decode": run_audio_decode,
    "vocoder": run_vocoder,
    "audio_latent_to_wave": run_audio_latent_to_wave,
    "upsamplers": run_upsamplers,
}
