"""Sound that is given: its latent for the stages, its waveform for the clip."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxlite.errors import CheckpointError, RequestError
from ltxlite.given import GivenSound
from ltxlite.media.audio import fit_length
from ltxlite.media.stereo import StereoSound, read_stereo
from ltxlite.models.mel import log_mel
from ltxlite.networks import Networks
from ltxlite.progress import Clock
from ltxlite.request import Request


def check_sound(request: Request) -> None:
    """Refuse, before anything is loaded, a sound that cannot be read or ends before it begins."""
    if request.conditions.sound is not None:
        clip_sound(request)


def encode_sound(request: Request, networks: Networks, clock: Clock) -> Sequence[GivenSound | None]:
    """Encode the sound that a request names, at exactly the clip's length; one entry a stage.

    A file that ends before the clip does is continued with silence, and that is told.
    Raises MediaError if it cannot be read, has no sound, or ends before it is to start.
    """
    if request.conditions.sound is None:
        return [None] * len(request.stages)
    clock.begin("encode sound", 1)
    sound = clip_sound(request)
    for remark in sound.remarks:
        clock.note(f"{request.conditions.sound.path}: {remark}")
    latent = encode_waveform(networks, sound.waveform, sound.rate, _latent_count(request, networks))
    clock.advance(1)
    return [GivenSound(latent)] * len(request.stages)


def clip_sound(request: Request) -> StereoSound:
    """Read the part of the given sound file that the clip lasts, to the sample.

    Raises RequestError if the request gives none, MediaError as `read_stereo`.
    """
    given = request.conditions.sound
    if given is None:
        raise RequestError("the job gives no sound; name one with --audio")
    sound = read_stereo(Path(given.path), Fraction(str(given.start)), request.seconds)
    wanted = round(request.seconds * sound.rate)
    remarks = sound.remarks
    # A millisecond is rounding of the file's own length.
    if sound.waveform.shape[1] < wanted - sound.rate // 1000:
        lasts = sound.waveform.shape[1] / sound.rate
        remarks += (
            f"lasts {lasts:.2f} s from second {given.start:g} on, the clip "
            f"{float(request.seconds):.2f} s; silence follows it",
        )
    return StereoSound(fit_length(sound.waveform, wanted), sound.rate, remarks)


def encode_waveform(networks: Networks, waveform: Tensor, rate: int, count: int) -> Tensor:
    """Encode stereo (2, N) to a normalised latent of `count` frames (1, C, count, M), fp32, CPU.

    Source: LTX-2 400fd31, which also pads a latent that is too short with zeros; a waveform as
    long as the clip gives none.
    """
    encoder = networks.audio_encoder()
    with torch.backends.cudnn.flags(allow_tf32=False):
        spectrogram = log_mel(waveform[None].to(networks.device), rate)
    latent = encoder(spectrogram.to(networks.dtype)).float().cpu()
    if not bool(latent.isfinite().all()):
        raise CheckpointError("the encoded sound holds NaN: the audio VAE is damaged")
    return F.pad(latent, (0, 0, 0, count - latent.shape[2]))


def delivered_original(request: Request) -> tuple[Tensor, int] | None:
    """Return the waveform and rate that a clip shall have instead of what the model decodes."""
    given = request.conditions.sound
    if given is None or given.output != "original":
        return None
    sound = clip_sound(request)
    return sound.waveform, sound.rate


def _latent_count(request: Request, networks: Networks) -> int:
    return networks.audio_grid().latent_frames(request.frames, request.rate)
