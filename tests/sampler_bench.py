"""A bench to run samplers on: made-up models, noise, and a log of what they ask for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ltxlite.sampling.contract import Prediction, State, Tools
from ltxlite.sampling.noise import SdeNoise
from ltxlite.sampling.samplers import SAMPLERS, sample

SHAPES = ((2, 7, 5), (2, 3, 9))


def draws(seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> State:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@dataclass
class Bench:
    """Tools around a given model, with plain noise, that count and keep what happens."""

    model: Callable[[Tensor, float], Tensor]
    negative: Callable[[Tensor, float], Tensor] | None = None
    blend: Callable[[State], State] = lambda x: x
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    log: list[str] = field(default_factory=list)
    noises: list[State] = field(default_factory=list)

    def run(self, sampler: str, x: State, sigmas: Any, **options: float) -> State:
        standardised = SAMPLERS[sampler].standardised
        self.source = SdeNoise(self.shapes, {"step": 91, "sub": 92}, standardised=standardised)
        tools = Tools(self._denoise, self._noise, self.blend, self._on_step)
        return sample(sampler, x, sigmas, tools, options)

    def _denoise(self, x: State, sigma: float) -> Prediction:
        assert all(stream.dtype == torch.float32 for stream in x)
        self.log.append("denoise")
        negative = self.negative or self.model
        return Prediction(
            tuple(self.model(stream, sigma) for stream in x),
            tuple(negative(stream, sigma) for stream in x),
        )

    def _noise(self, kind: Any) -> State:
        self.log.append(kind)
        self.noises.append(self.source(kind))
        return self.noises[-1]

    def _on_step(self, step: int, x: State) -> None:
        assert all(stream.dtype == torch.float32 for stream in x)
        self.log.append(str(step))


def curved(x: Tensor, sigma: float) -> Tensor:
    """A model without meaning, but not linear and not constant in sigma."""
    return torch.sin(2 * x) * (1 - 0.4 * sigma) + 0.3 * x.flip(-1)


def other_curved(x: Tensor, sigma: float) -> Tensor:
    return torch.cos(x) * (0.2 + sigma)
