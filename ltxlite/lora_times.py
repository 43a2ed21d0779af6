"""How LoRA files act from step to step of a stage, and from moment to moment of its clip.

Tokens that all files treat alike share a moment, however many frames that is: a file that is on
from 2 s to 4 s makes two. What has a time acts by its own: tokens of the clip, its sound, guides
and references. A token reads the prompt by its own moment's strength, too. Layers that see no
token, but noise levels, take the mean over the clip.
Source: features.md H3 (per-segment LoRA); experimental.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltxlite.checkpoint.lora import set_strengths, set_times
from ltxlite.conditioning import LatentState, States
from ltxlite.errors import RequestError
from ltxlite.geometry import LatentGrid
from ltxlite.low_rank import OverTime
from ltxlite.models.passes import Moments
from ltxlite.models.transformer import Transformer
from ltxlite.over_time import Window
from ltxlite.relay import Clip, spans
from ltxlite.request import Request
from ltxlite.strength import Strength

_Windows = list[tuple[Window, float]]


@dataclass(frozen=True, slots=True)
class ClipTimes:
    """The moments of picture and sound, and what each file, by its path, does in them."""

    moments: tuple[Moments, Moments]
    files: Mapping[str, OverTime]


class StageLoras:
    """Sets the strengths of a job's LoRA files on its transformer while a stage runs."""

    def __init__(self, request: Request, number: int, transformer: Transformer) -> None:
        self._request, self._transformer = request, transformer
        self._strengths = _strengths(request, number)
        self._factors: tuple[float, ...] | None = None

    def begin(self, states: States, grid: LatentGrid) -> tuple[Moments | None, Moments | None]:
        """Say how files change over the clip; returns the moments of both streams, if any do."""
        found = clip_times(self._strengths, self._request, states, grid)
        set_times(self._transformer, {} if found is None else found.files)
        return (None, None) if found is None else found.moments

    def to_step(self, step: int) -> bool:
        """Set the strengths of a step, from 0; tells whether they are others than before."""
        factors = tuple(strength.at_step(step) for strength in self._strengths.values())
        if not factors or factors == self._factors:
            return False
        self._factors = factors
        set_strengths(self._transformer, self._strengths, step)
        return True


def clip_times(
    strengths: Mapping[str, Strength], request: Request, states: States, grid: LatentGrid
) -> ClipTimes | None:
    """Sort the tokens of both streams by what files do at their time; None if none changes."""
    windows = {
        source: windows_of(strength, request, grid)
        for source, strength in strengths.items()
        if strength.varies
    }
    if not windows:
        return None
    seconds = float(request.seconds)
    times = [_seconds(state, seconds) for state in states]
    at, place = torch.cat(times).unique(return_inverse=True)
    acting = [_factors(at, windows[source], strengths[source].fade) for source in windows]
    factors, moment = torch.stack(acting, dim=1).unique(dim=0, return_inverse=True)  # (M, files)
    video, audio = moment[place].split([len(one) for one in times])
    clip = video[: states[0].target] if states[0].target else audio
    means = factors[clip].mean(0).tolist()
    device = states[0].initial.device
    files = {
        source: OverTime(column.float().to(device), mean)
        for source, column, mean in zip(windows, factors.unbind(1), means, strict=True)
    }
    return ClipTimes((Moments.of(video, device), Moments.of(audio, device)), files)


def windows_of(strength: Strength, request: Request, grid: LatentGrid) -> _Windows:
    """Return the times, in seconds, at which a file acts, and how strongly in each.

    Raises RequestError for times behind the clip's end, and for segments that it does not have.
    """
    length, rate = float(request.seconds), float(request.rate)
    for begin, *_ in strength.seconds:
        if begin >= length:
            raise RequestError(f"LoRA strength from {begin:g} s on: the clip ends at {length:g} s")
    edges = [(begin, end, value) for begin, end, value in strength.seconds]
    relay = request.conditions.relay
    for first, last, value in strength.segments:
        if relay is None or last > len(relay.segments):
            count = "none" if relay is None else f"1 to {len(relay.segments)}"
            raise RequestError(
                f"LoRA strength for segments {first}-{last}: the prompt has {count}; see --segments"
            )
        for span in spans(relay.segments, Clip(request.frames, rate, grid))[first - 1 : last]:
            pair = (grid.first_frame(place) for place in (span.start, span.start + span.length))
            begin, end = (frame / rate for frame in pair)
            edges.append((begin, end, value))
    return [(Window.within(begin, end, length), value) for begin, end, value in edges]


def check_strengths(request: Request, steps: Sequence[int], grid: LatentGrid) -> None:
    """Refuse ranges of steps and times that no stage and no clip has.

    steps: of each stage.  Raises RequestError.
    """
    used: dict[tuple[int, int], int] = {}
    for number, count in enumerate(steps):
        for strength in _strengths(request, number).values():
            windows_of(strength, request, grid)
            for first, last, _ in strength.steps:
                used[first, last] = max(used.get((first, last), 0), count)
    for (first, last), count in used.items():
        if first >= count:
            raise RequestError(
                f"LoRA strength for steps {first}-{last} of stages with {count}; they count from 0"
            )


def _strengths(request: Request, number: int) -> dict[str, Strength]:
    stage = request.stages[number]
    paths = enumerate(request.files.loras)
    return {str(Path(path)): stage.lora_strength(index) for index, path in paths}


def _seconds(state: LatentState, length: float) -> Tensor:
    """Return the middle of each token's time (T,); what is outside of the clip is at its edge."""
    return state.positions[0, 0].cpu().double().mean(-1).clamp(0, length)


def _factors(at: Tensor, windows: _Windows, fade: float) -> Tensor:
    return torch.tensor(
        [
            sum(value * window.share(moment, fade) for window, value in windows)
            for moment in at.tolist()
        ],
        dtype=torch.float64,
    )
