"""Encodes everything that is given to a job besides text: one record a stage, at its own size.

Encoding happens once, before the transformer is loaded, and depends on nothing but the request and
the files that it names: a job that is continued encodes again, to the same bits.
"""

from dataclasses import replace

from torch import Tensor

from ltxlite.given import Given, GivenSound, GivenSource, StageGiven
from ltxlite.given.pictures import StagePictures, encode_pictures
from ltxlite.given.sound import check_sound, encode_sound
from ltxlite.given.source import check_source, encode_source
from ltxlite.given.takes import stage_takes
from ltxlite.given.voice import check_voice, encode_voice
from ltxlite.networks import Networks
from ltxlite.progress import Clock
from ltxlite.request import Request
from ltxlite.stage_shapes import stage_shape


def encode_given(request: Request, networks: Networks, clock: Clock) -> Given:
    """Encode all media of a request at the size of each stage.

    Networks are loaded, used and dropped, one after the other.  Raises MediaError for a file that
    cannot be read and RequestError for one that does not fit the clip.
    """
    if not request.conditions.media():
        return Given()
    pictures = encode_pictures(request, networks, clock)
    sources = encode_source(request, networks, clock)
    sounds = encode_sound(request, networks, clock)
    voices = encode_voice(request, networks, clock)
    stages = zip(pictures, sources, sounds, voices, strict=True)
    return Given(tuple(_stage(*parts) for parts in stages))


def check_given(request: Request, networks: Networks) -> None:
    """Refuse, before anything is loaded, pictures that cannot be read or do not fit the clip.

    Raises MediaError, RequestError, or CheckpointError where no file holds the encoder.
    """
    conditions = request.conditions
    if replace(conditions, sound=None, voice=None).media():
        networks.need("video_encoder")
    if conditions.sound or conditions.source or conditions.voice:
        networks.need("audio_encoder")
    check_sound(request)
    check_voice(request)
    check_source(request)
    for number, stage in enumerate(request.stages):
        stage_takes(request, networks, number, stage_shape(request, stage, networks))


def _stage(
    pictures: StagePictures,
    source: GivenSource | None,
    sound: GivenSound | None,
    voice: Tensor | None,
) -> StageGiven:
    shown = pictures.images, pictures.guides, pictures.references
    return StageGiven(*shown, source, sound, voice)
