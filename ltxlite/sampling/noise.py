"""Where all randomness of a job comes from: one rule, from one job seed.

Stage k (from 0) draws its initial noise from seed + k·1000003, unless the stage names a seed of
its own; video first, then audio, from one generator, in token layout with appended tokens.
Noise that a sampler adds on its way comes from generators of its own, seeded with
seed + k·1000003 + 10000 for steps and + 20000 for substeps, so that it never repeats the initial
noise nor the other kind; a stage's own seed does not move them.
All seeds are taken modulo 2^32, because torch's CPU generator uses no more bits than these.
Everything is drawn on the CPU and moved afterwards: the same job starts from the same noise
on every device.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ltxlite.errors import RequestError
from ltxlite.sampling.contract import NoiseKind, State

STAGE_STRIDE = 1_000_003
SDE_OFFSETS: Mapping[NoiseKind, int] = MappingProxyType({"step": 10_000, "sub": 20_000})
_SEEDS = 1 << 32


def stage_seed(job_seed: int, stage: int, own: int | None = None) -> int:
    """Return the seed of a stage's initial noise: its own, or one derived from the job's.

    Raises RequestError for a seed outside 0..4294967295.
    """
    if own is not None:
        return _checked(own)
    return (_checked(job_seed) + stage * STAGE_STRIDE) % _SEEDS


def sde_seed(job_seed: int, stage: int, kind: NoiseKind) -> int:
    """Return the seed of the noise that a stage's sampler adds at steps or at substeps."""
    return (stage_seed(job_seed, stage) + SDE_OFFSETS[kind]) % _SEEDS


def initial_noise(
    shapes: Iterable[Sequence[int]], seed: int, device: torch.device | str = "cpu"
) -> State:
    """Draw the noise that a stage starts from.

    shapes: (B, T, C) of each stream, video first, appended tokens counted.  Returns fp32.
    """
    generator = _generator(seed)
    return tuple(_draw(tuple(shape), generator, torch.float32).to(device) for shape in shapes)


class SdeNoise:
    """Draws the noise that a stochastic sampler adds, one generator a kind; fits `Tools.noise`.

    shapes: (B, T, C) of each stream.  seeds: the seed of each kind, see `sde_seed`.
    standardised: draw in fp64 and `standardise`, as res_2s wants; otherwise plain fp32.
    drawn: how often each kind was drawn in an earlier run that is continued; counted on here.
    """

    def __init__(
        self,
        shapes: Iterable[Sequence[int]],
        seeds: Mapping[NoiseKind, int],
        *,
        standardised: bool = False,
        device: torch.device | str = "cpu",
        drawn: Mapping[NoiseKind, int] = MappingProxyType({}),
    ) -> None:
        self._shapes = tuple(tuple(shape) for shape in shapes)
        self._generators = {kind: _generator(seed) for kind, seed in seeds.items()}
        self._standardised = standardised
        self._device = device
        self.drawn = {kind: drawn.get(kind, 0) for kind in seeds}
        for kind, count in self.drawn.items():
            for _ in range(count):
                self._draw(kind)

    def __call__(self, kind: NoiseKind) -> State:
        """Return the next noise of a kind, a tensor for each stream."""
        self.drawn[kind] += 1
        noises = self._draw(kind)
        if self._standardised:
            noises = tuple(standardise(noise) for noise in noises)
        return tuple(noise.to(self._device) for noise in noises)

    def _draw(self, kind: NoiseKind) -> State:
        dtype = torch.float64 if self._standardised else torch.float32
        generator = self._generators[kind]
        return tuple(_draw(shape, generator, dtype) for shape in self._shapes)


def standardise(noise: Tensor) -> Tensor:
    """Give noise zero mean and unit deviation, first as a whole, then over its last two dims.

    noise: (B, T, C), fp64 for the reference's values.  Deviations are unbiased.
    Noise without tokens, of a picture that is not made, stays as it is.
    Source: LTX-2 400fd31 ltx_pipelines samplers, noise of res_2s.
    """
    if not noise.numel():
        return noise
    whole = (noise - noise.mean()) / noise.std()
    return (whole - whole.mean((-2, -1), keepdim=True)) / whole.std((-2, -1), keepdim=True)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(_checked(seed))


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


def _checked(seed: int) -> int:
    if not 0 <= seed < _SEEDS:
        raise RequestError(f"seed is {seed}, wanted 0 to {_SEEDS - 1}: torch uses no more bits")
    return seed
