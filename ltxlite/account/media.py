"""The account of what surrounds sampling: upscaler, picture and sound decoders, image encoder."""

from dataclasses import replace

import torch

from ltxlite.account.job import Extent, StageJob
from ltxlite.account.phase import META, Blank, Components, Levers, Phase, blank, metered
from ltxlite.geometry import ClipShape
from ltxlite.media.colour import rgb_to_i420, to_unit_range
from ltxlite.models import mel
from ltxlite.models.audio_vae import AudioDecoder, AudioEncoder
from ltxlite.models.rolling import decode_frames, encode_frames
from ltxlite.models.upscaler import LatentUpscaler, upscale_normalised
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.vocoder import build_vocoder

# By this frame of the clip a decode has reached its peak, but for 1 %; 241 frames take 8 s.
_DECODED_FRAMES = 16
# The encoder keeps two frames a layer; three groups of eight fill them all.
_ENCODED_FRAMES = 25


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


def pixel_phases(
    components: Components, number: int, before: ClipShape, stage: StageJob, levers: Levers
) -> list[Phase]:
    """Return the phases that decode a stage's picture and encode it at the next one's size."""
    decoded = picture_phase(components, before, levers)
    encoded = image_phase(
        components, number, replace(stage, encoded=(_extent(stage.shape),)), levers
    )
    return [
        replace(decoded, name=f"decode for stage {number}"),
        replace(encoded, name=f"encode for stage {number}"),
    ]


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
    """Return the phase that encodes images and clips, one after the other, for a stage."""
    made: Blank[VideoEncoder] = blank(
        "video_encoder", components["video_encoder"], VideoEncoder, levers.dtype
    )
    with torch.inference_mode(), metered(levers) as meter:
        for extent in stage.encodes:
            encode_beginning(made.network, extent, levers, META)
        return made.phase(f"encode pictures for stage {number}", meter)


def encode_beginning(
    encoder: VideoEncoder, extent: Extent, levers: Levers, device: torch.device
) -> None:
    """Encode blank frames, in groups as the pipeline does, until the peak is reached."""
    frames, rows, columns = extent
    scale = encoder.config.space_scale
    size = (rows * scale, columns * scale)
    group = max(1, levers.group_bytes // (4 * 3 * size[0] * size[1]))
    left = min(encoder.config.grid.pixel_frames(frames), max(_ENCODED_FRAMES, 2 * group + 1))
    counts = [group] * (left // group) + [left % group] * bool(left % group)
    pixels = (torch.empty(1, 3, n, *size, dtype=levers.dtype, device=device) for n in counts)
    encode_frames(encoder, pixels, levers.group_bytes).float()


def sound_encoder_phase(components: Components, stage: StageJob, levers: Levers) -> Phase:
    """Return the phase that encodes sound which is given."""
    component = components["audio_encoder"]
    made: Blank[AudioEncoder] = blank("audio_encoder", component, AudioEncoder, levers.dtype)
    with torch.inference_mode(), metered(levers) as meter:
        size = (1, mel.CHANNELS, stage.sound * component.config.downscale, mel.MEL_BINS)
        made.network(torch.empty(size, dtype=levers.dtype, device=META)).float()
        return made.phase("encode sound", meter)


def _extent(shape: ClipShape) -> tuple[int, int, int]:
    return shape.frames, shape.rows, shape.columns
