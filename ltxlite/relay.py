"""Prompt relay: each part of a clip sees its own part of the prompt.

All segments are encoded as one text behind the prompt of all times. In text attention, a segment's
rows then cost the more the farther a token's time is from the segment's middle: a row of key
biases for each latent frame, never a T x S mask. Negative prompts are seen whole.
Source: features.md H1 (kijai ComfyUI-PromptRelay; the least cost is 0 as in Wan2GP). With a blend,
H5's raised cosine is in the attention; mixed encodings would be a context for each moment.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltxlite.conditioning import LatentState, StageContext
from ltxlite.conditions import Relay, Segment
from ltxlite.denoise import Prompt
from ltxlite.errors import RequestError
from ltxlite.geometry import LatentGrid
from ltxlite.models.passes import ContextBias
from ltxlite.models.tokenizer import MAX_TOKENS, Tokenizer
from ltxlite.over_time import Window
from ltxlite.relay_text import texts_up_to

_HARD = 0.1448  # the width of a border where epsilon says none
_LEAST = 1e-30  # a share that is none; its log is finite in any dtype


@dataclass(frozen=True, slots=True)
class Span:
    """Latent frames start..start+length-1."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Clip:
    """What segments are laid out in: pixel frames, their rate, and how latents hold them."""

    frames: int
    rate: float
    grid: LatentGrid

    @property
    def latents(self) -> int:
        """Latent frames of the clip."""
        return self.grid.latent_frames(self.frames)

    def edge(self, seconds: float) -> int:
        """Return how many latent frames have their middle before a moment."""
        frame = seconds * self.rate
        first = (self.grid.first_frame(index) for index in range(self.latents))
        return sum(start + (self.grid.time if start else 1) / 2 <= frame for start in first)


def passages(tokenizer: Tokenizer, prompt: str, relay: Relay) -> tuple[slice, ...]:
    """Return the rows of the context that each segment's tokens take.

    The tokens of a prompt are the first rows of its context, the begin mark is row 0.
    Raises RequestError where the text is longer than a context.
    """
    counts = []
    for text in texts_up_to(prompt, relay):
        encoded = tokenizer.encode(text)
        counts.append(len(encoded.ids) + encoded.cut)
    if counts[-1] > MAX_TOKENS:
        raise RequestError(
            f"prompt and segments have {counts[-1]} tokens together, a context holds "
            f"{MAX_TOKENS}; shorten them"
        )
    return tuple(slice(*pair) for pair in itertools.pairwise(counts))


def spans(segments: Sequence[Segment], clip: Clip) -> tuple[Span, ...]:
    """Return the latent frames of each segment; those without times share what is between.

    Raises RequestError for a segment outside of the clip, or without a latent frame.
    """
    begins: list[int | None] = [None if s.begin is None else clip.edge(s.begin) for s in segments]
    ends: list[int | None] = [None if s.end is None else clip.edge(s.end) for s in segments]
    begins[0], ends[-1] = begins[0] or 0, clip.latents if ends[-1] is None else ends[-1]
    for number in range(1, len(segments)):  # what one side says of a border holds for both
        if begins[number] is None:
            begins[number] = ends[number - 1]
        if ends[number - 1] is None:
            ends[number - 1] = begins[number]
    _share(begins, ends)
    found = []
    for segment, start, stop in zip(segments, begins, ends, strict=True):
        assert start is not None and stop is not None
        if stop <= start:
            raise RequestError(_no_room(segment, clip))
        found.append(Span(start, stop - start))
    return tuple(found)


def _share(begins: list[int | None], ends: list[int | None]) -> None:
    """Give runs of segments without borders equal lengths, the first ones the rest."""
    first = 0
    for number, end in enumerate(ends):
        start = begins[first]
        if end is None or start is None:
            continue
        count = number - first + 1
        whole, rest = divmod(max(end - start, 0), count)
        for index in range(first, number):
            start += whole + (index - first < rest)
            ends[index] = begins[index + 1] = start
        first = number + 1


def _no_room(segment: Segment, clip: Clip) -> str:
    seconds = clip.frames / clip.rate
    what = f"segment {segment.text[:40]!r}"
    if segment.begin is not None and segment.begin >= seconds:
        return f"{what} begins at {segment.begin:g} s, the clip ends at {seconds:g} s"
    return (
        f"{what} has no latent frame of the clip's {clip.latents} ({seconds:g} s); give it more "
        "time, or use fewer segments"
    )


def costs(parts: Sequence[Span], at: Tensor, epsilon: float) -> Tensor:
    """Return what seeing each segment costs at times `at`, in latent frames: (N, segments) fp32.

    No cost within length / 2 - 2 of a segment's middle, then the square of a normal distribution
    whose width epsilon sets; the best of the times costs nothing.
    """
    width = 1 / math.log(1 / epsilon) if 0 < epsilon < 1 else _HARD
    middles = at.new_tensor([part.start + part.length // 2 for part in parts])
    free = at.new_tensor([max(part.length // 2 - 2, 0) for part in parts])
    beyond = ((at[:, None] - middles).abs() - free).clamp(min=0)
    cost = beyond.square() / (2 * width**2)
    return cost - cost.amin(0)


def passed_on(parts: Sequence[Span], at: Tensor, latents: int, blend: float) -> Tensor:
    """Return the same where attention passes from each segment to the next: (N, segments) fp32.

    at: middles.  blend: how long that takes, in latent frames.  What attends to two segments in
    shares of w and 1 - w finds their scores lessened by -log of them.
    """
    windows = [Window.within(part.start, part.start + part.length, latents) for part in parts]
    shares = [[window.share(time, blend) for window in windows] for time in at.tolist()]
    return -at.new_tensor(shares).clamp(min=_LEAST).log()


def relayed(
    prompt: Prompt, rows: Sequence[slice], relay: Relay, state: LatentState, stage: StageContext
) -> Prompt:
    """Return a stream's prompt of which each token sees its own part.

    rows: of `passages`.  Sound is told by its positions, which have no space.
    """
    sound = state.positions.shape[1] == 1
    strength = relay.audio if sound else relay.video
    clip = Clip(stage.frames, float(stage.rate), stage.grid)
    parts = spans(relay.segments, clip)
    if strength == 0 or all(part == Span(0, clip.latents) for part in parts):
        return prompt
    if sound:
        at = torch.arange(state.target) * (clip.latents / state.target)
        ids = torch.arange(state.target)
    else:
        at = torch.arange(clip.latents, dtype=torch.float32)
        ids = torch.arange(state.target) // (state.target // clip.latents)
    table = torch.zeros(len(at) + 1, prompt.positive.shape[1])  # the last row is free
    for column, part in zip(_costs(parts, at, relay, clip).unbind(1), rows, strict=True):
        table[:-1, part] = -strength * column[:, None]
    appended = _appended(state, clip, sound)
    ids = torch.cat([ids, torch.where(appended < 0, len(at), appended)])
    device = prompt.positive.device
    bias = ContextBias(table.to(device), ids.to(device, torch.int32))
    return replace(prompt, bias=bias)


def _costs(parts: Sequence[Span], at: Tensor, relay: Relay, clip: Clip) -> Tensor:
    if relay.blend is None:
        return costs(parts, at, relay.epsilon)
    middles = at + clip.latents / len(at) / 2
    return passed_on(parts, middles, clip.latents, relay.blend * clip.rate / clip.grid.time)


def _appended(state: LatentState, clip: Clip, sound: bool) -> Tensor:
    """Return the latent frame that each appended token stands for, -1 where it is outside."""
    seconds = state.positions[0, 0, state.target :, 0].cpu()
    if sound:
        return torch.full(seconds.shape, -1)
    frames = (seconds * clip.rate).round().long()
    inside = (frames >= 0) & (frames < clip.frames)
    return torch.where(inside, (frames + clip.grid.time - 1) // clip.grid.time, -1)
