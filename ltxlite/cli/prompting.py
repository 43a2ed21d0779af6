"""Flags that say more than one prompt: what to avoid, and what to show when."""

import argparse
from dataclasses import replace
from pathlib import Path

from ltxlite.conditions import Conditions, Nag, Relay, Segment
from ltxlite.errors import RequestError
from ltxlite.relay_text import Extent, parse_segments


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--nag", metavar="TEXT", help="what the picture must not be; without a second pass (NAG)"
    )
    group.add_argument("--nag-audio", metavar="TEXT", help="what the sound must not be (NAG)")
    group.add_argument(
        "--nag-params",
        metavar="SCALE,ALPHA,TAU",
        help="how far away, the share of it, the longest result (default 11,0.25,2.5)",
    )
    group.add_argument(
        "--segments",
        metavar="TEXT",
        help='prompts one after another, besides --prompt: "a | b | c" share the clip evenly, '
        '"[0s:4s] a [4s:] b" say when (also 25%%, 0:05, or frames from 1)',
    )
    group.add_argument(
        "--schedule",
        metavar="FILE",
        help='the same from a file, a line each: "0:05-0:12: text", "0:12+: text"; the last line '
        "that names a time wins",
    )
    group.add_argument(
        "--schedule-blend",
        type=float,
        metavar="S",
        help="seconds in which a line passes into the next (default: as --relay-eps)",
    )
    group.add_argument(
        "--relay-eps",
        type=float,
        metavar="X",
        help="how softly segments pass into each other, 0 to 1 (default 0.001)",
    )
    group.add_argument(
        "--relay-strength",
        metavar="V[:A]",
        help="how strongly picture and sound are held to their segments (default 1)",
    )


def with_prompts(
    conditions: Conditions, options: argparse.Namespace, extent: Extent
) -> tuple[str, Conditions]:
    """Return the prompt of all times, and the conditions with what the flags add.

    Raises RequestError for flags that say nothing without another one, or that cannot be read.
    """
    prompt, relay = _relay(options, extent)
    return prompt, replace(conditions, nag=_nag(options), relay=relay)


def _nag(options: argparse.Namespace) -> Nag | None:
    if options.nag is None and options.nag_audio is None:
        if options.nag_params is not None:
            raise RequestError("--nag-params without --nag or --nag-audio; say what to avoid")
        return None
    text = options.nag_params
    values = () if text is None else _numbers("--nag-params", text, ",", "11,0.25,2.5")
    if values and len(values) != 3:
        raise RequestError(f"--nag-params {text!r}: wanted three numbers such as 11,0.25,2.5")
    return Nag(options.nag, options.nag_audio, *values)


def _relay(options: argparse.Namespace, extent: Extent) -> tuple[str, Relay | None]:
    _refuse_idle(options)
    if options.schedule is not None:
        also, segments = _scheduled(Path(options.schedule), extent)
    elif options.segments is not None:
        also, segments = parse_segments(options.segments, extent)
    else:
        return options.prompt, None
    prompt = f"{options.prompt or ''} {also}".strip() if also else options.prompt or ""
    if not segments:
        return prompt, None
    relay = Relay(segments, blend=options.schedule_blend)
    if options.relay_eps is not None:
        relay = replace(relay, epsilon=options.relay_eps)
    if options.relay_strength is not None:
        values = _numbers("--relay-strength", options.relay_strength, ":", "1:0.5")
        if len(values) > 2:
            raise RequestError(f"--relay-strength {options.relay_strength!r}: wanted V or V:A")
        relay = replace(relay, video=values[0], audio=values[-1])
    return prompt, relay


def _refuse_idle(options: argparse.Namespace) -> None:
    """Refuse flags that say nothing without another one, or against it."""
    if options.segments is not None and options.schedule is not None:
        raise RequestError("--schedule and --segments both say what is shown when; give one")
    if options.schedule is None and options.schedule_blend is not None:
        raise RequestError("--schedule-blend without --schedule; name a file")
    if options.schedule_blend is not None and options.relay_eps is not None:
        raise RequestError("--relay-eps with --schedule-blend: both say how prompts pass; give one")
    for name in ("relay_eps", "relay_strength"):
        given = options.segments is not None or options.schedule is not None
        if getattr(options, name) is not None and not given:
            flag = name.replace("_", "-")
            raise RequestError(f'--{flag} without --segments; give some, as "a | b"')


def _scheduled(path: Path, extent: Extent) -> tuple[str, tuple[Segment, ...]]:
    """Return what a file shows when, or the one prompt that it shows all the time."""
    from ltxlite.prompt_schedule import parse_schedule

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--schedule {path}: cannot be read ({error})") from None
    parts = parse_schedule(text, str(path)).parts(extent.seconds)
    return (parts[0].text, ()) if len(parts) == 1 else ("", parts)


def _numbers(flag: str, text: str, mark: str, example: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(mark))
    except ValueError:
        raise RequestError(f"{flag} {text!r}: wanted numbers such as {example}") from None
