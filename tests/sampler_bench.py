"""A bench to run samplers on: made-up models, noise, and a log of what they ask for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ltxlite.sampling.contract import Position, Prediction, State, Tools
from ltxlite.sampling.noise import SdeNoise
from ltxlite.sampling.samplers import SAMPLERS, continue_sampling

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
    positions: list[tuple[Position, dict[str, int]]] = field(default_factory=list)

    def run(self, sampler: str, x: State, sigmas: Any, **options: float) -> State:
        return self.go_on(sampler, Position(0, {"x": x}), {}, sigmas, **options)

    def go_on(
        self, sampler: str, position: Position, drawn: dict[str, int], sigmas: Any, **options: float
    ) -> State:
        """Run from a position, with noise that stands where that run's stood."""
        standardised = SAMPLERS[sampler].standardised
        seeds = {"step": 91, "sub": 92}
        self.source = SdeNoise(self.shapes, seeds, standardised=standardised, drawn=drawn)
        tools = Tools(self._denoise, self._noise, self.blend, self._on_step)
        return continue_sampling(sampler, position, sigmas, tools, options)

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

    def _on_step(self, position: Position) -> None:
        self.log.append(str(position.done - 1))
        self.positions.append((position, dict(self.source.drawn)))


def curved(x: Tensor, sigma: float) -> Tensor:
    """A model without meaning, but not linear and not constant in sigma."""
    return torch.sin(2 * x) * (1 - 0.4 * sigma) + 0.3 * x.flip(-1)


def other_curved(x: Tensor, sigma: float) -> Tensor:
    return torch.cos(x) * (0.2 + sigma)
