"""What samplers and their caller agree on: states, predictions, and the tools a sampler is lent."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = tuple[Tensor, ...]  # one (B, T, C) fp32 tensor a stream: video, audio
Sigmas: TypeAlias = Sequence[float] | Tensor
NoiseKind: TypeAlias = Literal["step", "sub"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model believes the clean latents to be.

    x0: after guidance and after blending with the clean tokens; like the state, fp32.
    uncond: the same for the negative prompt alone, when the sampler needs it.
    """

    x0: State
    uncond: State | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """What a sampler may call; it holds no model, mask or generator of its own.

    denoise: (state, sigma) -> Prediction, one evaluation.  The state is fp32.
    noise: the next draw of unit noise, shaped like the state; "step" or "sub" (res_2s substeps).
    blend: puts clean tokens back where the mask keeps them, after noise was added.
    on_step: told the index of each finished step and the state after it.  It is called before the
      next evaluation, so a caller may count steps by it; samplers evaluate several times a step.
    """

    denoise: Callable[[State, float], Prediction]
    noise: Callable[[NoiseKind], State]
    blend: Callable[[State], State]
    on_step: Callable[[int, State], None] | None = None

    def report(self, step: int, state: State) -> None:
        """Tell the caller, if it wants to know, that a step is done."""
        if self.on_step is not None:
            self.on_step(step, state)

    def add_noise(self, state: State, scale: float) -> State:
        """Return the state with `scale` times fresh noise, blended; nothing is drawn for 0."""
        if scale == 0:
            return state
        return self.blend(add(state, scale, self.noise("step")))


def float32_values(sigmas: Sigmas) -> list[float]:
    """Round a schedule to fp32, as the reference holds it, and return plain numbers.

    A difference of two such numbers is exact in a Python float; rounded once more by the fp32
    tensor that it multiplies, it is what subtracting two fp32 tensors gives.
    """
    return torch.as_tensor(sigmas, dtype=torch.float32).tolist()


def intervals(sigmas: Sigmas) -> Iterator[tuple[int, float, float]]:
    """Yield (step, sigma, next sigma) along a schedule, in fp32 values."""
    for step, (sigma, following) in enumerate(pairwise(float32_values(sigmas))):
        yield step, sigma, following


def add(x: State, scale: float, y: State) -> State:
    """Return x + scale·y for every stream."""
    return tuple(left + scale * right for left, right in zip(x, y, strict=True))


def mix(a: float, x: State, b: float, y: State) -> State:
    """Return a·x + b·y for every stream."""
    return tuple(a * left + b * right for left, right in zip(x, y, strict=True))
