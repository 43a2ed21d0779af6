"""What goes into a forward pass of the transformer and what comes out."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ltxlite.models.rope import Rope


@dataclass(frozen=True, slots=True)
class Timesteps:
    """Noise levels, held once per distinct value.

    values: (U,) fp32, sigma in [0, 1].  index: (B, T) int32, or (B, 1) for one level a sample.
    """

    values: Tensor
    index: Tensor

    @classmethod
    def of(cls, sigmas: Tensor) -> "Timesteps":
        """Compress per-token levels (B, T, 1); looks at the values, so it waits for the device."""
        flat = sigmas[..., 0].float()
        if bool((flat == flat[:, :1]).all()):
            flat = flat[:, :1]
        values, index = flat.unique(return_inverse=True)
        return cls(values, index.to(torch.int32))  # as kernels take it

    def per_token(self) -> Tensor:
        """Return the levels as (B, T or 1, 1) fp32."""
        return self.values[self.index][..., None]


@dataclass(frozen=True, slots=True)
class RowWeights:
    """Self-attention weights of the query rows start..stop-1 on all keys.

    weights: (B or 1, 1 or stop-start, T); 1 leaves a key alone, 0 hides it, 2 counts it twice.
    Rows that share their weights share one row here, so that no T x T matrix is ever needed.
    """

    start: int
    stop: int
    weights: Tensor


@dataclass(frozen=True, slots=True)
class ContextBias:
    """What is added to scores of a context's rows, looked up by query: never a T x S tensor.

    rows: (R, S) fp32, in natural units.  row_ids: (T,) int32 in 0..R-1, the row of each token.
    """

    rows: Tensor
    row_ids: Tensor


@dataclass(frozen=True, slots=True)
class Avoided:
    """A second prompt, which text attention leads away from (`models.nag`).

    context: (B, S, W) as the first one, of any length.  scale: how far; 1 is not at all.
    alpha: the share of the guided result.  tau: how many times longer than before it may get.
    """

    context: Tensor
    scale: float = 11.0
    alpha: float = 0.25
    tau: float = 2.5


@dataclass(frozen=True, slots=True)
class Moments:
    """Which of a clip's moments each token belongs to, for linears that change over its time.

    ids: (T,) int32, equal for tokens that all linears treat alike.  runs: of each moment, the
    slices of tokens that are its own.
    """

    ids: Tensor
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, ids: Tensor, device: torch.device) -> "Moments":
        """Find the runs of ids (T,), which are on the CPU."""
        found, counts = torch.unique_consecutive(ids, return_counts=True)
        moments = int(ids.max()) + 1 if len(ids) else 0
        runs: list[list[tuple[int, int]]] = [[] for _ in range(moments)]
        start = 0
        for moment, count in zip(found.tolist(), counts.tolist(), strict=True):
            runs[moment].append((start, start + count))
            start += count
        return cls(ids.to(device, torch.int32), tuple(map(tuple, runs)))

    def first(self, count: int) -> "Moments":
        """Return those of the first tokens alone."""
        runs = (
            tuple((start, min(stop, count)) for start, stop in own if start < count)
            for own in self.runs
        )
        return Moments(self.ids[:count], tuple(runs))


@dataclass(frozen=True, slots=True)
class BranchScales:
    """By what a stream multiplies what is added to it, in some blocks or in all (None).

    own: by its self-attention, text attention and feed-forward.  received: by the other stream.
    Source: features.md C8 (ComfyUI-KJNodes, LTX2AttentionTuner).
    """

    own: float = 1.0
    received: float = 1.0
    blocks: frozenset[int] | None = None

    def covers(self, block: int) -> bool:
        """Tell whether anything is scaled in a block."""
        if self.own == self.received == 1:
            return False
        return self.blocks is None or block in self.blocks


UNSCALED = BranchScales()


@dataclass(frozen=True, slots=True)
class StreamRope:
    """Rotary tables of a stream: for itself and, by time alone, for the other stream."""

    own: Rope
    cross: Rope


@dataclass(frozen=True, slots=True)
class StreamInput:
    """One stream's part of a forward pass.

    latent: (B, T, C).  sigma: (B,) the stream's noise level, 0 when it is given, not generated.
    timesteps: its tokens' levels.  positions: (B or 1, A, T, 2) bounds in seconds and pixels.
    context: (B, S, W) prompt.  context_mask: (B, S), 1 = attend.  weights: soft self-attention.
    context_bias: how much of the prompt each token sees.  avoided: a prompt to lead away from.
    enabled: False keeps the stream as it is; the other one still sees it.
    rope: tables already built for these positions (`Transformer.rope`).  moments: of its tokens.
    scales: of what is added to it.
    """

    latent: Tensor
    sigma: Tensor
    timesteps: Timesteps
    positions: Tensor
    context: Tensor
    context_mask: Tensor | None = None
    weights: tuple[RowWeights, ...] = ()
    enabled: bool = True
    rope: StreamRope | None = None
    context_bias: ContextBias | None = None
    avoided: Avoided | None = None
    moments: Moments | None = None
    scales: BranchScales = UNSCALED


class Skip(StrEnum):
    """Attention that a perturbed pass leaves out."""

    VIDEO_SELF = "video_self"
    AUDIO_SELF = "audio_self"
    AUDIO_TO_VIDEO = "audio_to_video"
    VIDEO_TO_AUDIO = "video_to_audio"


@dataclass(frozen=True, slots=True)
class Perturbation:
    """What one sample leaves out: kinds of attention and their blocks (None: all blocks)."""

    skips: tuple[tuple[Skip, frozenset[int] | None], ...] = ()

    def active(self, skip: Skip, block: int) -> bool:
        """Tell whether `skip` applies in block number `block`."""
        return any(kind is skip and (at is None or block in at) for kind, at in self.skips)


# Each stream as if the other were not there.
APART = Perturbation(((Skip.AUDIO_TO_VIDEO, None), (Skip.VIDEO_TO_AUDIO, None)))


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: either stream may be absent; perturbations are one per sample or none."""

    video: StreamInput | None
    audio: StreamInput | None
    perturbations: tuple[Perturbation, ...] = ()

    def skips(self, block: int) -> frozenset[tuple[int, Skip]]:
        """Return all that is left out in a block: pairs of sample and kind of attention."""
        samples = enumerate(self.perturbations)
        return frozenset((i, skip) for i, p in samples for skip in Skip if p.active(skip, block))

    def skipped(self, skip: Skip, block: int) -> bool | Tensor:
        """Tell which samples skip: all (True), none (False) or a mask (B,) on the CPU."""
        active = [perturbation.active(skip, block) for perturbation in self.perturbations]
        return all(active) and bool(active) if len(set(active)) < 2 else torch.tensor(active)


@dataclass(frozen=True, slots=True)
class Velocity:
    """Predicted velocities (B, T, C) in fp32; None for an absent stream."""

    video: Tensor | None
    audio: Tensor | None
