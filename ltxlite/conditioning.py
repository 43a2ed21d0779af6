"""The latent state of a stream, and everything that can be put into it before sampling.

A state holds tokens: first the target's, then groups appended as conditions (keyframes, reference
clips), which are dropped at the end. Each function returns a new state.
Source: LTX-2 400fd31 (ltx_core/conditioning, ltx_pipelines/utils), restated in model.md 4.3 and 7.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from ltxlite.errors import RequestError, ShapeError
from ltxlite.geometry import (
    AudioGrid,
    ClipShape,
    LatentGrid,
    audio_positions,
    patchify_video,
    video_positions,
)
from ltxlite.models.passes import RowWeights, Timesteps


@dataclass(frozen=True, slots=True)
class Group:
    """Appended tokens start..stop-1 and the weight (n,) of what passes between them and the target.

    weight None: appended without any attention weight.
    """

    start: int
    stop: int
    weight: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LatentState:
    """One stream's tokens before and while they are sampled; everything fp32.

    initial: (B, T, C) what noise is mixed into.  clean: what kept tokens shall be.
    mask: (B, T, 1), 1 = generate, 0 = keep.  positions: (1, A, T, 2) bounds.
    target: the number of tokens that are the clip itself.  frozen: given, not generated; its
    sigma reads 0 everywhere.  mixed: masks between 0 and 1 mean what they do in ComfyUI: all is
    noised, the transformer sees a mixture with the clean tokens, and only its answer is held.
    """

    initial: Tensor
    clean: Tensor
    mask: Tensor
    positions: Tensor
    target: int
    groups: tuple[Group, ...] = ()
    frozen: bool = False
    mixed: bool = False

    @property
    def tokens(self) -> int:
        """Target and appended tokens."""
        return self.initial.shape[1]

    def noised(self, noise: Tensor, scale: float) -> Tensor:
        """Mix noise (B, T, C) into the initial latent at `scale`, then hold what is masked."""
        if self.mixed:
            return torch.lerp(torch.where(self.mask < 1, self.clean, self.initial), noise, scale)
        mixed = torch.lerp(self.initial, noise, scale)
        return torch.lerp(self.clean, mixed, self.mask)

    def blend(self, x: Tensor) -> Tensor:
        """Return predictions (B, T, C) with kept tokens replaced by their clean values."""
        return x * self.mask + self.clean * (1 - self.mask)

    def seen(self, x: Tensor) -> Tensor:
        """Return what the transformer is shown of a noisy state (B, T, C)."""
        return self.blend(x) if self.mixed else x

    def levels(self) -> Timesteps:
        """Return the mask's distinct values; a step's noise levels are these times its sigma."""
        return Timesteps.of(self.mask)

    def to(self, device: torch.device) -> "LatentState":
        """Move all tensors."""
        groups = tuple(
            replace(group, weight=None if group.weight is None else group.weight.to(device))
            for group in self.groups
        )
        tensors = {
            name: getattr(self, name).to(device)
            for name in ("initial", "clean", "mask", "positions")
        }
        return replace(self, **tensors, groups=groups)


States = tuple[LatentState, LatentState]  # picture and sound


@dataclass(frozen=True, slots=True)
class StageContext:
    """What must be known of a stage to steer it.

    number: from 0.  shape: of its latents.  frames, rate: pixel frames of the clip, and how many a
    second.  grid, audio_grid: how pixels and samples scale to latents.
    """

    number: int
    shape: ClipShape
    frames: int
    rate: Fraction
    grid: LatentGrid
    audio_grid: AudioGrid


def start(initial: Tensor, positions: Tensor) -> LatentState:
    """Begin a state from tokens (B, T, C) and their positions (1, A, T, 2): generate everything."""
    mask = initial.new_ones(*initial.shape[:2], 1)
    return LatentState(initial, initial, mask, positions, initial.shape[1])


def freeze(state: LatentState) -> LatentState:
    """Keep a whole stream as given, for example sound that is to be lip-synched."""
    return replace(state, mask=torch.zeros_like(state.mask), frozen=True)


def place_image(
    state: LatentState, latent: Tensor, first_token: int, strength: float
) -> LatentState:
    """Fix frames of the clip itself to an encoded image or clip (B, C, f, Y, X).

    first_token: where its tokens begin (latent frame index times Y*X).  strength 1 keeps them
    exactly, less lets them be denoised from 1 - strength of the noise.
    """
    tokens = patchify_video(latent).to(state.clean)
    stop = first_token + tokens.shape[1]
    if stop > state.target:
        raise ShapeError(
            f"image conditioning: tokens {first_token}..{stop} of a clip with {state.target}; "
            "the image must be encoded at the stage's size and lie inside the clip"
        )
    clean, mask = state.clean.clone(), state.mask.clone()
    clean[:, first_token:stop] = tokens
    mask[:, first_token:stop].fill_(1 - _strength(strength))
    return replace(state, clean=clean, mask=mask)


def append(
    state: LatentState,
    latent: Tensor,
    positions: Tensor,
    strength: float,
    weight: Tensor | None = None,
) -> LatentState:
    """Append an encoded condition (B, C, f, y, x) with its positions (1, 3, n, 2).

    weight: (n,) attention weights between its tokens and the target, None for 1 without a mask.
    Tokens are kept in the order of their weights, so that equal ones share a row of weights.
    """
    return append_tokens(state, patchify_video(latent), positions, strength, weight)


def append_tokens(
    state: LatentState,
    tokens: Tensor,
    positions: Tensor,
    strength: float,
    weight: Tensor | None = None,
) -> LatentState:
    """Append tokens (B, n, C) with their positions (1, A, n, 2); else as `append`."""
    tokens = tokens.to(state.clean)
    count = tokens.shape[1]
    if positions.shape[2] != count:
        raise ShapeError(f"condition: {count} tokens but {positions.shape[2]} positions")
    positions = positions.to(state.positions)
    if weight is not None:
        weight = weight.to(state.mask)
        order = weight.argsort(stable=True)
        weight, tokens, positions = weight[order], tokens[:, order], positions[:, :, order]
    mask = tokens.new_full((*tokens.shape[:2], 1), 1 - _strength(strength))
    group = Group(state.tokens, state.tokens + count, weight)
    return replace(
        state,
        initial=torch.cat([state.initial, torch.zeros_like(tokens)], dim=1),
        clean=torch.cat([state.clean, tokens], dim=1),
        mask=torch.cat([state.mask, mask], dim=1),
        positions=torch.cat([state.positions, positions], dim=2),
        groups=(*state.groups, group),
    )


def without_appended(state: LatentState) -> LatentState:
    """Return the clip's own tokens alone."""
    own = slice(None, state.target)
    return replace(
        state,
        initial=state.initial[:, own],
        clean=state.clean[:, own],
        mask=state.mask[:, own],
        positions=state.positions[:, :, own],
        groups=(),
    )


def keyframe_positions(
    shape: tuple[int, int, int], frame: int, pixel_frames: int, fps: float, grid: LatentGrid
) -> Tensor:
    """Return the positions of an image or clip (latent f, Y, X) that shall appear at pixel `frame`.

    A single pixel frame spans [frame, frame + 1) (official since 2026-04-23), a clip keeps whole
    latent frames; only at frame 0 does the causal rule of a clip's beginning apply.
    """
    bounds = video_positions(shape, 1.0, grid, causal=frame == 0)
    time = bounds[:, 0] + frame
    if pixel_frames == 1:
        time = torch.stack([time[..., 0], time[..., 0] + 1], dim=-1)
    bounds[:, 0] = time / fps
    return bounds


def reference_positions(
    shape: tuple[int, int, int], fps: float, grid: LatentGrid, spatial: int = 1, temporal: int = 1
) -> Tensor:
    """Return the positions of a reference clip encoded at 1/spatial size and 1/temporal rate."""
    bounds = video_positions(shape, fps / temporal, grid)
    if temporal != 1:
        bounds[:, 0] = (bounds[:, 0] - (temporal - 1) / fps).clamp(min=0)
    bounds[:, 1:] = bounds[:, 1:] * spatial
    return bounds


def voice_positions(count: int, grid: AudioGrid) -> Tensor:
    """Return the positions of a voice that is heard before the clip: its end is at -40 ms.

    Source: LTX-2 400fd31, patchify_audio_reference_latent with negative positions.
    """
    bounds = audio_positions(count, grid)
    return bounds - float(bounds[..., -1, 1]) - 1 / grid.latents_per_second


def mask_interval(state: LatentState, begin: float, end: float) -> LatentState:
    """Regenerate only the tokens whose time overlaps begin..end seconds; keep all others."""
    if not end > begin:
        raise RequestError(f"retake: the interval {begin} s to {end} s is empty")
    starts, ends = state.positions[:, 0, :, 0], state.positions[:, 0, :, 1]
    inside = (ends > begin) & (starts < end)
    mask = inside.to(state.mask)[..., None].expand_as(state.mask).clone()
    return replace(state, mask=mask)


def mask_region(
    state: LatentState, latent: Tensor, keep: Tensor, strength: float = 1.0
) -> LatentState:
    """Keep a region of a source: latent (B, C, F, Y, X), keep (B, T) in [0, 1] per token."""
    tokens, kept = patchify_video(latent).to(state.clean), keep[..., None].to(state.mask)
    clean = state.clean * (1 - kept) + tokens * kept
    mask = state.mask * (1 - kept) + (1 - _strength(strength)) * kept
    return replace(state, clean=clean, mask=mask)


def attention_weights(state: LatentState) -> tuple[RowWeights, ...]:
    """Return the self-attention weights of a state; empty where all tokens see all others.

    Once a group carries a weight, it and the groups appended after it no longer see other groups;
    the target sees each group at its weight and is seen at the same weight.
    """
    masked = [group.weight is not None for group in state.groups]
    if not any(masked):
        return ()
    open_groups = masked.index(True)
    total, target = state.tokens, state.target
    from_target = torch.ones(1, 1, total, device=state.mask.device)
    for group in state.groups:
        if group.weight is not None:
            from_target[:, :, group.start : group.stop] = group.weight
    rows = [RowWeights(0, target, from_target)]
    for number, group in enumerate(state.groups):
        rows += _group_rows(state, number, group, open_groups)
    return tuple(rows)


def _group_rows(
    state: LatentState, number: int, group: Group, open_groups: int
) -> list[RowWeights]:
    """Return a row for each run of tokens that have one weight."""
    own = torch.ones(1) if group.weight is None else group.weight
    values, counts = torch.unique_consecutive(own, return_counts=True)
    stops = counts.cumsum(0).tolist() if group.weight is not None else [group.stop - group.start]
    rows, start = [], group.start
    for value, stop in zip(values.to(state.mask), stops, strict=True):
        row = torch.zeros(1, 1, state.tokens, device=state.mask.device)
        row[..., : state.target] = value
        row[..., group.start : group.stop] = 1
        if number < open_groups:
            row[..., state.target : state.groups[open_groups].start] = 1
        rows.append(RowWeights(start, group.start + stop, row))
        start = group.start + stop
    return rows


def dense_weights(state: LatentState) -> Tensor:
    """Return the weights as a matrix (1, T, T): for tests and reports only."""
    dense = torch.ones(1, state.tokens, state.tokens)
    for rows in attention_weights(state):
        dense[:, rows.start : rows.stop] = rows.weights
    return dense


def _strength(strength: float) -> float:
    if not 0 <= strength <= 1:
        raise RequestError(f"strength is {strength}; it goes from 0 (free) to 1 (kept)")
    return strength
