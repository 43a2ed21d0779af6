"""Sound that is given: its latent for the stages, its waveform for the clip."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxlite.conditions import Sound
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.geometry import AudioGrid
from ltxlite.given import GivenSound
from ltxlite.given.ambience import with_ambience
from ltxlite.media.audio import fit_length
from ltxlite.media.stereo import StereoSound, change_rate, read_stereo, splice
from ltxlite.models.mel import log_mel
from ltxlite.networks import Networks
from ltxlite.progress import Clock
from ltxlite.request import Request

_ROUNDING = Fraction(1, 1000)  # seconds by which a file's own length may be off
_FADE = Fraction(1, 50)  # seconds over which given sound passes into made sound


def check_sound(request: Request) -> None:
    """Refuse, before anything is loaded, a sound that cannot be read or ends before it begins."""
    sound = request.conditions.sound
    if sound is not None:
        clip_sound(request)
        if sound.heard is not None:
            _read(sound, sound.heard, request)


def encode_sound(request: Request, networks: Networks, clock: Clock) -> Sequence[GivenSound | None]:
    """Encode the sound that a request names, at exactly the clip's length; one entry a stage.

    A file that ends before the clip does is continued as the request says, and that is told.
    Raises MediaError if it cannot be read, has no sound, or ends before it is to start;
    RequestError if it ends before the clip where that is an error.
    """
    given = request.conditions.sound
    if given is None:
        return [None] * len(request.stages)
    clock.begin("encode sound", 1)
    sound = clip_sound(request)
    for remark in sound.remarks:
        clock.note(f"{given.path}: {remark}")
    grid = networks.audio_grid()
    count = grid.latent_frames(request.frames, request.rate)
    waveform = with_ambience(sound.waveform, given.ambience, request.seed)
    latent = encode_waveform(networks, waveform, sound.rate, count)
    clock.advance(1)
    return [GivenSound(latent, min(known_latents(request, grid), count))] * len(request.stages)


def clip_sound(request: Request) -> StereoSound:
    """Read the part of the given sound file that the clip lasts, to the sample.

    Raises RequestError if the request gives none, or one that must not end before the clip and
    does; MediaError as `read_stereo`.
    """
    given = request.conditions.sound
    if given is None:
        raise RequestError("the job gives no sound; name one with --audio")
    sound = _read(given, given.path, request)
    remarks = sound.remarks
    if _ends_early(sound, request):
        lasts = sound.waveform.shape[1] / sound.rate
        short = (
            f"lasts {lasts:.2f} s from second {given.start:g} on, the clip "
            f"{float(request.seconds):.2f} s"
        )
        if given.pad == "error":
            raise RequestError(f"sound {given.path}: {short}; --audio-pad says what follows it")
        then = "silence follows it" if given.pad == "silence" else "the rest is made"
        remarks += (f"{short}; {then}",)
    return replace(_fitted(sound, request), remarks=remarks)


def known_latents(request: Request, grid: AudioGrid) -> int:
    """Return how many audio latents the file fills: all, but where the rest is to be made.

    Latent j is heard over mel frames 4j - 3 to 4j; one that the file fills in part is made.
    """
    given = request.conditions.sound
    if given is None or given.pad != "prefix":
        return 1 << 30
    sound = _read(given, given.path, request)
    if not _ends_early(sound, request):
        return 1 << 30
    mel_frames = sound.waveform.shape[1] * grid.rate // (sound.rate * grid.hop)
    return (mel_frames + grid.downsample - 1) // grid.downsample


def encode_waveform(
    networks: Networks, waveform: Tensor, rate: int, count: int | None = None
) -> Tensor:
    """Encode stereo (2, N) to a normalised latent of `count` frames (1, C, count, M), fp32, CPU.

    count: None takes as many as the sound fills.
    Source: LTX-2 400fd31, which also pads a latent that is too short with zeros; a waveform as
    long as the clip gives none.
    """
    encoder = networks.audio_encoder()
    with torch.backends.cudnn.flags(allow_tf32=False):
        spectrogram = log_mel(waveform[None].to(networks.device), rate)
    latent = encoder(spectrogram.to(networks.dtype)).float().cpu()
    if not bool(latent.isfinite().all()):
        raise CheckpointError("the encoded sound holds NaN: the audio VAE is damaged")
    return latent if count is None else F.pad(latent, (0, 0, 0, count - latent.shape[2]))


def delivered_original(request: Request, made: tuple[Tensor, int]) -> tuple[Tensor, int] | None:
    """Return the waveform and rate that a clip shall have instead of what the model decodes.

    made: that, and its rate; it follows where the file ends and the rest was to be made.
    """
    given = request.conditions.sound
    if given is None or given.output != "original":
        return None
    sound = _read(given, given.heard or given.path, request)
    if given.pad != "prefix" or not _ends_early(sound, request):
        return _fitted(sound, request).waveform, sound.rate
    rest = change_rate(made[0].cpu().float(), made[1], sound.rate)
    rest = fit_length(rest, round(request.seconds * sound.rate))
    return splice(rest, sound.waveform, 0, round(_FADE * sound.rate)), sound.rate


def _read(given: Sound, path: str, request: Request) -> StereoSound:
    return read_stereo(Path(path), Fraction(str(given.start)), request.seconds)


def _fitted(sound: StereoSound, request: Request) -> StereoSound:
    waveform = fit_length(sound.waveform, round(request.seconds * sound.rate))
    return replace(sound, waveform=waveform)


def _ends_early(sound: StereoSound, request: Request) -> bool:
    return sound.waveform.shape[1] / Fraction(sound.rate) < request.seconds - _ROUNDING
