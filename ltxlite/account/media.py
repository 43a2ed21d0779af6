"""The account of what surrounds sampling: upscaler, picture and sound decoders, image encoder."""

import torch

from ltxlite.account.job import StageJob
from ltxlite.account.phase import META, Blank, Components, Levers, Phase, blank, metered
from ltxlite.geometry import ClipShape
from ltxlite.media.colour import rgb_to_i420, to_unit_range
from ltxlite.models.audio_vae import AudioDecoder
from ltxlite.models.rolling import decode_frames, encode_frames
from ltxlite.models.upscaler import LatentUpscaler, upscale_normalised
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.vocoder import build_vocoder

# By this frame of the clip a decode has reached its peak, but for 1 %; 241 frames take 8 s.
_DECODED_FRAMES = 16


def upscale_phase(
    components: Components, number: int, before: ClipShape, kind: str, levers: Levers
) -> Phase:
    """Return the phase that enlarges a stage's latent for the next one."""
    made: Blank[LatentUpscaler] = blank(
        "upscaler", components[f"upscaler {kind}"], LatentUpscaler, levers.dtype
    )
    with torch.inference_mode(), metered(levers) as meter:
        latent = torch.empty(1, made.network.latent_channels, *_extent(before), device=META)
        mean = torch.empty(latent.shape[1], device=META)
        upscale_normalised(made.network, latent.to(levers.dtype), mean, mean).float()
        return made.phase(f"upscale for stage {number}", meter)


def picture_phase(components: Components, shape: ClipShape, levers: Levers) -> Phase:
    """Return the phase that decodes the picture and converts its colours, group by group."""
    made: Blank[VideoDecoder] = blank(
        "video_decoder", components["video_decoder"], VideoDecoder, levers.dtype
    )
    with torch.inference_mode(), metered(levers) as meter:
        decode_beginning(made.network, shape, levers.group_bytes, META)
        return made.phase("decode picture", meter)


def decode_beginning(
    decoder: VideoDecoder, shape: ClipShape, group_bytes: int, device: torch.device
) -> None:
    """Decode a latent of zeros and convert colours until the peak is reached."""
    latent = torch.zeros(1, decoder.config.latent_channels, *_extent(shape), device=device)
    done = 0
    for frames in decode_frames(decoder, latent, group_bytes):
        frames.isfinite()
        rgb_to_i420(to_unit_range(frames[0, :, :1].transpose(0, 1)))
        done += frames.shape[2]
        if done >= _DECODED_FRAMES:
            break


def sound_phases(components: Components, shape: ClipShape, levers: Levers) -> list[Phase]:
    """Return the phases that decode the sound: audio VAE, then the vocoder in fp32."""
    decoder: Blank[AudioDecoder] = blank(
        "audio_decoder", components["audio_decoder"], AudioDecoder, levers.dtype
    )
    vocoder = blank("vocoder", components["vocoder"], build_vocoder, torch.float32)
    config = components["audio_decoder"].config
    with torch.inference_mode(), metered(levers) as meter:
        size = (1, config.latent_channels, shape.audio_frames, config.latent_bins)
        spectrogram = decoder.network(torch.empty(size, dtype=levers.dtype, device=META))
        first = decoder.phase("decode sound", meter)
        vocoder.network(spectrogram.float()).isfinite()
        return [first, vocoder.phase("vocoder", meter)]


def image_phase(components: Components, number: int, stage: StageJob, levers: Levers) -> Phase:
    """Return the phase that encodes images, one at a time, at a stage's size."""
    made: Blank[VideoEncoder] = blank(
        "video_encoder", components["video_encoder"], VideoEncoder, levers.dtype
    )
    scale = made.network.config.space_scale
    size = (stage.shape.rows * scale, stage.shape.columns * scale)
    with torch.inference_mode(), metered(levers) as meter:
        pixels = torch.empty(1, 3, 1, *size, device=META)
        encode_frames(made.network, [pixels], levers.group_bytes)
        return made.phase(f"encode image for stage {number}", meter)


def _extent(shape: ClipShape) -> tuple[int, int, int]:
    return shape.frames, shape.rows, shape.columns
