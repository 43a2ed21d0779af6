"""Flags that say more than one prompt: what to avoid, and what to show when."""

import argparse
from dataclasses import replace

from ltxlite.conditions import Conditions, Nag, Relay
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
    if options.segments is None:
        for name in ("relay_eps", "relay_strength"):
            if getattr(options, name) is not None:
                flag = name.replace("_", "-")
                raise RequestError(f'--{flag} without --segments; give some, as "a | b"')
        return options.prompt, None
    also, segments = parse_segments(options.segments, extent)
    relay = Relay(segments)
    if options.relay_eps is not None:
        relay = replace(relay, epsilon=options.relay_eps)
    if options.relay_strength is not None:
        values = _numbers("--relay-strength", options.relay_strength, ":", "1:0.5")
        if len(values) > 2:
            raise RequestError(f"--relay-strength {options.relay_strength!r}: wanted V or V:A")
        relay = replace(relay, video=values[0], audio=values[-1])
    return f"{options.prompt} {also}".strip() if also else options.prompt, relay


def _numbers(flag: str, text: str, mark: str, example: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(mark))
    except ValueError:
        raise RequestError(f"{flag} {text!r}: wanted numbers such as {example}") from None
