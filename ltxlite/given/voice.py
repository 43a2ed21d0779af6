"""A voice that is given: the latent that stages hear before the clip begins."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from ltxlite.errors import RequestError
from ltxlite.given.sound import encode_waveform
from ltxlite.hearing import SHORTEST_VOICE, VOICE_SECONDS, Voice
from ltxlite.media.stereo import StereoSound, read_stereo
from ltxlite.models import mel
from ltxlite.networks import Networks
from ltxlite.progress import Clock
from ltxlite.request import Request

_PROBE = Fraction(1, 20)  # seconds read beyond what is taken, to tell that there is more
_SHORT = 2.0  # seconds below which a voice is poorly known


def check_voice(request: Request) -> None:
    """Refuse, before anything is loaded, a voice that cannot be read or is too short."""
    if request.conditions.voice is not None:
        voice_sound(request.conditions.voice)


def encode_voice(request: Request, networks: Networks, clock: Clock) -> Sequence[Tensor | None]:
    """Encode the voice that a request names; one entry a stage, None for those that do not hear it.

    Raises MediaError if it cannot be read, RequestError if there is too little of it.
    """
    voice = request.conditions.voice
    if voice is None:
        return [None] * len(request.stages)
    clock.begin("encode voice", 1)
    sound = voice_sound(voice)
    for remark in sound.remarks:
        clock.note(f"{voice.path}: {remark}")
    if not request.files.loras:
        clock.note("warning: a voice without an ID-LoRA (--lora) changes little")
    latent = encode_waveform(networks, sound.waveform, sound.rate, None)
    clock.advance(1)
    numbers = range(1, len(request.stages) + 1)
    return [latent if number in voice.stages else None for number in numbers]


def voice_sound(voice: Voice) -> StereoSound:
    """Read the part of the file that is taken: stereo, at a rate that files have.

    Raises MediaError as `read_stereo`, RequestError for less than a tenth of a second.
    """
    wanted = Fraction(str(voice.seconds))
    sound = read_stereo(Path(voice.path), Fraction(str(voice.start)), wanted + _PROBE)
    lasts = sound.waveform.shape[1] / sound.rate
    if lasts < SHORTEST_VOICE:
        raise RequestError(
            f"voice {voice.path}: {lasts:.3f} s from second {voice.start:g} on; wanted "
            f"{SHORTEST_VOICE:g} or more, {VOICE_SECONDS:.1f} are best"
        )
    remarks = sound.remarks
    if lasts > wanted and wanted < VOICE_SECONDS + 1:
        remarks += (f"its first {voice.seconds:.2f} s are heard, more of it does no good",)
    elif lasts < _SHORT:
        remarks += (f"only {lasts:.2f} s of a voice; {VOICE_SECONDS:.1f} are best",)
    return StereoSound(sound.waveform[:, : round(wanted * sound.rate)], sound.rate, remarks)


def voice_tokens(request: Request, networks: Networks, number: int) -> int:
    """Return how many tokens stage number `number`, from 0, hears before the clip."""
    voice = request.conditions.voice
    if voice is None:
        return 0
    if number + 1 in voice.stages:
        sound = voice_sound(voice)
        samples = math.ceil(sound.waveform.shape[1] * mel.SAMPLE_RATE / sound.rate)
        return math.ceil((samples // mel.HOP + 1) / networks.audio_grid().downsample)
    is_echo = voice.echo and number > 0
    return networks.audio_grid().latent_frames(request.frames, request.rate) if is_echo else 0
