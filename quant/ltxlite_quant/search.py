"""Values to blocks whose scales were searched for: Q2_K to Q6_K, IQ4_NL and IQ4_XS.

The search minimises the squared error, weighted by the importance of each input channel where one
is given.  numba makes it several times as fast (extra `convert`); without it plain torch searches
the same way, which it also does on other devices than the CPU.  Special blocks (constants, single
outliers, almost nothing) are searched again, always in torch, and lose no more than in llama.cpp.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ltxlite_quant import encode, search_torch
from ltxlite_quant.decode import DECODERS
from ltxlite_quant.encode_k import AFFINE_PACKERS, SCALED_PACKERS
from ltxlite_quant.formats import BlockFormat, FormatError, byte_shape
from ltxlite_quant.search_constant import constant_affine, constant_scaled
from ltxlite_quant.search_plan import PLANS, AffinePlan, AffineScales, Effort, ScaledPlan, Scales
from ltxlite_quant.search_reference import reference_affine, reference_scaled
from ltxlite_quant.tensor import QuantTensor

# Elements searched at a time.  Compiled: temporaries stay in the second-level cache.  In torch on a
# CPU: two threads still share them, and half as many take 25 % longer.  GPU: 16 MiB of fp32, enough
# to fill any card, and some twenty temporaries of the size.
COMPILED_CHUNK_ELEMENTS = 1 << 16
TORCH_CHUNK_ELEMENTS = 1 << 17
DEVICE_CHUNK_ELEMENTS = 1 << 22
# A channel of no importance still counts this share of the mean, so that its codes are near.
LEAST_IMPORTANCE = 1e-6


class Target(NamedTuple):
    """A format and how to search for it."""

    name: str
    plan: AffinePlan | ScaledPlan

    @property
    def largest_level(self) -> float:
        """What the largest scale and the largest code multiply d with."""
        plan = self.plan
        code = plan.highest_code if isinstance(plan, AffinePlan) else plan.levels[-1]
        return plan.highest_scale * code


class Weights(NamedTuple):
    """Importance of the blocks of a row: (blocks, block size) fp32, or one row of ones for all.

    given: as it was given, but for a power of two; None without.  counted: what a search minimises.
    """

    given: Tensor | None
    counted: Tensor

    def at(self, rows: Tensor) -> "Weights":
        """Return the importance of these of all blocks, or the one row that serves any."""
        if len(self.counted) == 1:
            return self
        rows = rows % len(self.counted)
        return Weights(None if self.given is None else self.given[rows], self.counted[rows])


class Job(NamedTuple):
    """What to quantize: sources (n, block size) into blocks (n, block bytes).

    special: (n,) bool, set for blocks to be searched again.
    """

    sources: Tensor
    weights: Weights
    target: Target
    blocks: Tensor
    special: Tensor


def quantize(
    values: Tensor,
    block_format: BlockFormat,
    effort: Effort = "default",
    importance: Tensor | None = None,
) -> QuantTensor:
    """Quantize a tensor, with a search where its format has scales to search for.

    values: (..., K) of any floating dtype, computed on in fp32.  Blocks stay on its device.
    effort: "default", or "high" for a little less error at a third to a fifth of the speed.
    importance: (K,) non-negative weights of the squared error, e.g. the mean square of each input
    channel; formats without a search ignore it.
    Raises FormatError if K is not a whole number of blocks, if a value is not finite or exceeds
    what the format can hold, or if the importance does not fit.
    """
    plans = PLANS.get(block_format.name)
    if plans is None:
        return encode.quantize(values, block_format)
    if effort not in get_args(Effort):
        raise FormatError(f"effort is one of {', '.join(get_args(Effort))}, got {effort!r}")
    row_bytes = byte_shape(values.shape, block_format)[-1]
    size = block_format.block_size
    sources = values.detach().reshape(-1, size)
    job = Job(
        sources,
        _weights(importance, values, size),
        Target(block_format.name, plans[effort]),
        sources.new_empty(len(sources), block_format.block_bytes, dtype=torch.uint8),
        sources.new_empty(len(sources), dtype=torch.bool),
    )
    _run(partial(_search_chunk, job), len(sources), sources, _backend(sources))
    rows = job.special.nonzero().flatten()
    _run(partial(_search_again, job, rows), len(rows), sources, search_torch)
    return QuantTensor(job.blocks.view(-1, row_bytes), block_format, tuple(values.shape))


def _run(task: Callable[[int, int], None], count: int, sources: Tensor, backend: Any) -> None:
    # Compiled chunks run in threads, as many as torch may use; torch has threads of its own, and
    # its small operations in several of ours take three times as long.
    is_compiled = backend is not search_torch
    chunk = COMPILED_CHUNK_ELEMENTS if is_compiled else TORCH_CHUNK_ELEMENTS
    if sources.device.type != "cpu":
        chunk = DEVICE_CHUNK_ELEMENTS
    starts = range(0, count, chunk // sources.shape[1])
    stops = [min(start + starts.step, count) for start in starts]
    threads = torch.get_num_threads() if is_compiled else 1
    if threads == 1 or len(starts) <= 1:
        list(map(task, starts, stops))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(task, starts, stops))


@torch.inference_mode()  # a thread does not inherit it from the caller, whose tensors may need it
def _search_chunk(job: Job, start: int, stop: int) -> None:
    x, target = job.sources[start:stop].float().contiguous(), job.target
    limit = search_torch.FP16_MAX * target.largest_level
    largest = torch.maximum(x.amax(1), -x.amin(1))  # (n,); faster than aminmax
    if not largest.amax() <= limit:
        raise FormatError(
            f"{target.name} holds finite values up to {limit:.3g}; got a NaN, an infinity or more"
        )
    weights = job.weights.at(torch.arange(start, stop, device=x.device)).counted
    job.special[start:stop] = _backend(x).find_special(x, largest)
    job.blocks[start:stop] = _search(x, weights, target, _backend(x))


@torch.inference_mode()
def _search_again(job: Job, rows: Tensor, start: int, stop: int) -> None:
    rows, target = rows[start:stop], job.target
    x = job.sources[rows].float()
    constant = (x == x[:, :1]).all(1)
    if constant.any():
        job.blocks[rows[constant]] = _constant(x[constant], target)
        rows, x = rows[~constant], x[~constant]
    if len(rows):
        job.blocks[rows] = _best(x, job.weights.at(rows), target)


def _best(x: Tensor, weights: Weights, target: Target) -> Tensor:
    # Of llama.cpp's blocks and of searches in torch, which find the same without numba, the best.
    best = _reference(x, weights.given, target)
    least = _error(best, x, weights.given, target.name)
    for plan in _plans_again(target):
        blocks = _search(x, weights.counted, target._replace(plan=plan), search_torch)
        error = _error(blocks, x, weights.given, target.name)
        less = ~(error >= least)  # also if that is a NaN, of a d beyond fp16
        best, least = torch.where(less[:, None], blocks, best), torch.where(less, error, least)
    return best


def _plans_again(target: Target) -> list[AffinePlan | ScaledPlan]:
    # At default effort, the plan for special blocks comprises what was done already.
    plans = PLANS[target.name]
    again = [plans["special"]]
    return again if target.plan is plans["default"] else [*again, target.plan]


def _search(x: Tensor, weights: Tensor, target: Target, backend: Any) -> Tensor:
    # (n, block_size) -> (n, block_bytes)
    if isinstance(target.plan, AffinePlan):
        return _packed(x, backend.search_affine(x, weights, target.plan), target)
    return _packed(x, backend.search_scaled(x, weights, target.plan), target)


def _reference(x: Tensor, importance: Tensor | None, target: Target) -> Tensor:
    # (n, block_size) -> (n, block_bytes), with llama.cpp's scales and the nearest codes
    if isinstance(target.plan, AffinePlan):
        return _packed(x, reference_affine(x, importance, target.name, target.plan), target)
    return _packed(x, reference_scaled(x, importance, target.name, target.plan), target)


def _constant(x: Tensor, target: Target) -> Tensor:
    # (n, block_size), one value a block -> (n, block_bytes)
    if isinstance(target.plan, AffinePlan):
        return _packed(x, constant_affine(x[:, 0], target.plan), target)
    return _packed(x, constant_scaled(x[:, 0], target.plan, x.shape[1]), target)


def _packed(x: Tensor, found: AffineScales | Scales, target: Target) -> Tensor:
    if isinstance(target.plan, AffinePlan):
        assert isinstance(found, AffineScales)
        codes = search_torch.affine_codes(x, found, target.plan)
        return AFFINE_PACKERS[target.name](codes, found)
    assert isinstance(found, Scales)
    codes = search_torch.scaled_codes(x, found, target.plan)
    return SCALED_PACKERS[target.name](codes, found)


def _error(blocks: Tensor, x: Tensor, weights: Tensor | None, name: str) -> Tensor:
    # (n,) fp64: what two candidates differ by may be less than fp32 resolves
    squares = DECODERS[name](blocks).double().sub_(x).square_()
    return (squares if weights is None else squares.mul_(weights)).sum(1)


def _weights(importance: Tensor | None, values: Tensor, size: int) -> Weights:
    # Of mean about 1, by a power of two: that changes nothing in how llama.cpp rounds.
    if importance is None:
        return Weights(None, torch.ones(1, size, device=values.device))
    wanted = tuple(values.shape[-1:])
    given = importance.detach().to(values.device, torch.float64)
    if tuple(given.shape) != wanted:
        raise FormatError(f"importance is one number a column, {wanted}, got {tuple(given.shape)}")
    if not (given.isfinite() & (given >= 0)).all():
        raise FormatError("importance is finite and not negative; got a NaN, an infinity or less")
    mean = given.mean()
    scaled = given / mean.log2().round().exp2() if mean > 0 else torch.ones_like(given)
    scaled = scaled.float().view(-1, size)
    return Weights(scaled, scaled.clamp(min=LEAST_IMPORTANCE))


def _backend(x: Tensor) -> Any:
    return (_compiled() if x.device.type == "cpu" else None) or search_torch


@cache
def _compiled() -> Any:
    # The numba twin, or None; said once.
    if importlib.util.find_spec("numba") is not None:
        return importlib.import_module("ltxlite_quant.search_numba")
    logging.getLogger("ltxlite_quant").warning(
        "numba is not installed: the search for scales runs in plain torch, several times slower; "
        "pip install ltxlite[convert]"
    )
    return None
