"""Flags of what a clip is made to hear: sound that it follows, a voice to speak with."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ltxlite.errors import RequestError
from ltxlite.hearing import VOICE_SECONDS, Sound, Voice
from ltxlite.strength import Strength, parse_lora

if TYPE_CHECKING:
    from ltxlite.request import Stage

_ID_LORA = ("id-lora", "id_lora", "idlora")  # in the names of the files that are published


def add_hearing(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = parser.add_argument_group("sound that steers")
    group.add_argument("--audio", metavar="PATH", help="sound that the clip is made to")
    group.add_argument("--audio-start", type=float, metavar="S", help="second of it to begin at")
    group.add_argument(
        "--audio-cond",
        metavar="PATH",
        help="what the model hears of it, as the voice alone of a song; the clip has --audio",
    )
    group.add_argument(
        "--audio-denoise", type=float, metavar="X", help="0 keeps it, 1 replaces it (default 0)"
    )
    group.add_argument(
        "--audio-output",
        choices=("original", "decoded"),
        help="what is heard: the file, or what the model makes of it (default original, decoded "
        "with --audio-denoise)",
    )
    group.add_argument(
        "--audio-pad",
        choices=("silence", "prefix", "error"),
        help="what follows a file that ends before the clip: silence, sound that is made (prefix), "
        "nothing (default silence)",
    )
    group.add_argument(
        "--audio-ambience",
        type=float,
        metavar="X",
        help="rushing that the model hears under it, 0.01 is 40 dB below full scale; helps lips "
        "to follow a synthetic voice (default 0)",
    )
    _add_voice(group)
    group.add_argument(
        "--audio-norm",
        metavar="X,Y,...",
        help="after each step of stage 1, multiply the predicted sound by this, as "
        "1,1,0.25,1,1,0.25,1,1; the last one serves all further steps",
    )


def _add_voice(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--ref-audio", metavar="PATH", help="voice to speak with, for an ID-LoRA (--lora)"
    )
    group.add_argument(
        "--ref-audio-start", type=float, metavar="S", help="second of it to begin at (default 0)"
    )
    group.add_argument(
        "--ref-audio-seconds",
        type=float,
        metavar="S",
        help=f"how much of it is heard (default {VOICE_SECONDS:.2f}, as ID-LoRAs were trained)",
    )
    group.add_argument(
        "--identity-guidance",
        metavar="SCALE[:FROM:TO]",
        help="away from how it would be without the voice, in a part of the schedule, 0 to 1; "
        "0 is off and saves a pass a step (default 3:0:1)",
    )


def sound_of(options: argparse.Namespace) -> Sound | None:
    """Return the sound that flags name. Raises RequestError for flags without --audio."""
    if options.audio is None:
        for name in ("start", "cond", "denoise", "output", "pad", "ambience"):
            if getattr(options, f"audio_{name}") is not None:
                raise RequestError(f"--audio-{name} without --audio")
        return None
    return Sound(
        options.audio_cond or options.audio,
        options.audio_start or 0.0,
        options.audio_denoise or 0.0,
        options.audio_output or ("decoded" if options.audio_denoise else "original"),
        options.audio if options.audio_cond else None,
        options.audio_ambience or 0.0,
        options.audio_pad or "silence",
    )


def voice_of(options: argparse.Namespace) -> Voice | None:
    """Return the voice that flags name. Raises RequestError for flags without --ref-audio."""
    if options.ref_audio is None:
        for name in ("ref_audio_start", "ref_audio_seconds", "identity_guidance"):
            if getattr(options, name) is not None:
                raise RequestError(f"--{name.replace('_', '-')} without --ref-audio")
        return None
    voice = Voice(options.ref_audio, options.ref_audio_start or 0.0)
    if options.ref_audio_seconds is not None:
        voice = replace(voice, seconds=options.ref_audio_seconds)
    return _led(voice, options.identity_guidance)


def _led(voice: Voice, text: str | None) -> Voice:
    if text is None:
        return voice
    values = _numbers("--identity-guidance", text, ":", "3:0:0.6")
    if len(values) not in (1, 3):
        raise RequestError(f"--identity-guidance {text!r}: wanted SCALE or SCALE:FROM:TO")
    span = (values[1], values[2]) if len(values) == 3 else voice.span
    return replace(voice, identity=values[0], span=span)


def with_hearing(
    stages: Sequence["Stage"], options: argparse.Namespace, voice: Voice | None
) -> tuple["Stage", ...]:
    """Return the stages with what flags say about their sound.

    With a voice, later stages hold the sound that the first one made.
    """
    found = list(stages)
    if options.audio_norm is not None:
        factors = _numbers("--audio-norm", options.audio_norm, ",", "1,1,0.25")
        found[0] = replace(found[0], audio_norm=factors)
    if voice is not None and options.sound is None:
        found[1:] = [replace(stage, sound="freeze") for stage in found[1:]]
    return tuple(found)


def where_heard(
    loras: Sequence[str],
    strengths: Sequence[tuple[Strength, ...]],
    voice: Voice | None,
    stages: int,
    note: Callable[[str], None],
) -> list[tuple[Strength, ...]]:
    """Leave ID-LoRA files without a strength out of stages that hear no voice (features G7)."""
    found = []
    for text, own in zip(loras, strengths, strict=True):
        path, _ = parse_lora(text)
        named = any(mark in Path(path).name.lower() for mark in _ID_LORA)
        if voice is not None and text == path and named and len(voice.stages) < stages:
            own = tuple(Strength.of(float(n in voice.stages)) for n in range(1, stages + 1))
            note(f"{path}: off in stages that hear no voice; {path}:1 keeps it on")
        found.append(own)
    return found


def _numbers(flag: str, text: str, mark: str, example: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(mark))
    except ValueError:
        raise RequestError(f"{flag} {text!r}: wanted numbers such as {example}") from None
