"""What samplers and their caller agree on: states, steps, and the tools a sampler is lent.

A sampler is a rule for one step: from what was carried out of the step before to what goes into
the next. It keeps nothing to itself, so a run may stop between any two steps and go on elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = tuple[Tensor, ...]  # one (B, T, C) fp32 tensor a stream: video, audio
# What goes from step to step by name: "x", the noisy state, and what a multistep sampler remembers.
Carry: TypeAlias = Mapping[str, State]
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
class Step:
    """Step number `index` along a schedule: from `sigma` to `following`, fp32 values."""

    index: int
    sigmas: Sequence[float]

    @property
    def sigma(self) -> float:
        """Noise level at which the step begins."""
        return self.sigmas[self.index]

    @property
    def following(self) -> float:
        """Noise level at which it ends."""
        return self.sigmas[self.index + 1]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run along a schedule stands: `done` steps are finished, `carry` goes into the next.

    Its tensors are contiguous, as they are when read from a file: matrix products may round
    differently for other layouts, and a run that was continued would end in other bits.
    """

    done: int
    carry: Carry

    def after(self, carry: Carry) -> "Position":
        """Return the position one step on."""
        tidy = {name: tuple(x.contiguous() for x in state) for name, state in carry.items()}
        return Position(self.done + 1, tidy)


@dataclass(frozen=True, slots=True)
class Tools:
    """What a sampler may call; it holds no model, mask or generator of its own.

    denoise: (state, sigma) -> Prediction, one evaluation.  The state is fp32.
    noise: the next draw of unit noise, shaped like the state; "step" or "sub" (res_2s substeps).
    blend: puts clean tokens back where the mask keeps them, after noise was added.
    on_step: told the position after each finished step.  It is called before the next evaluation,
      so a caller may count steps by it; samplers evaluate several times a step.
    after_step: changes what a step carries on, before that.
    """

    denoise: Callable[[State, float], Prediction]
    noise: Callable[[NoiseKind], State]
    blend: Callable[[State], State]
    on_step: Callable[[Position], None] | None = None
    after_step: Callable[[Carry, Step], Carry] | None = None

    def report(self, position: Position) -> None:
        """Tell the caller, if it wants to know, that a step is done."""
        if self.on_step is not None:
            self.on_step(position)

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


def add(x: State, scale: float, y: State) -> State:
    """Return x + scale·y for every stream."""
    return tuple(left + scale * right for left, right in zip(x, y, strict=True))


def mix(a: float, x: State, b: float, y: State) -> State:
    """Return a·x + b·y for every stream."""
    return tuple(a * left + b * right for left, right in zip(x, y, strict=True))
