"""Values to blocks whose scales were searched for: Q2_K to Q6_K, IQ4_NL and IQ4_XS.

The search minimises the squared error, weighted by the importance of each input channel where one
is given.  numba makes it several times as fast (extra `convert`); without it plain torch searches
the same way, which it also does on other devices than the CPU.
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
from ltxlite_quant.search_plan import PLANS, AffinePlan, Effort, ScaledPlan
from ltxlite_quant.tensor import QuantTensor

# Elements searched at a time.  CPU: temporaries stay in the second-level cache.  GPU: 16 MiB of
# fp32, enough to fill any card, and some twenty temporaries of the size.
CPU_CHUNK_ELEMENTS = 1 << 16
DEVICE_CHUNK_ELEMENTS = 1 << 22
# A channel of no importance still counts this share of the mean, so that its codes are near.
LEAST_IMPORTANCE = 1e-6
# Blocks searched again, with patience: error below this share of the block (0.8 % in amplitude), or
# so small that d is a subnormal number of few steps of 2^-24.
NEARLY_EXACT = 2.0**-14
FEW = 2.0**-21


class Target(NamedTuple):
    """A format and how to search for it."""

    name: str
    plan: AffinePlan | ScaledPlan

    @property
    def largest_value(self) -> float:
        """What d, the largest scale and the largest code hold."""
        plan = self.plan
        code = plan.highest_code if isinstance(plan, AffinePlan) else plan.levels[-1]
        return search_torch.FP16_MAX * plan.highest_scale * code


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
    sources = values.detach().reshape(-1, block_format.block_size)
    weights = _weights(importance, values, block_format.block_size)
    blocks = sources.new_empty(len(sources), block_format.block_bytes, dtype=torch.uint8)
    job = partial(_chunk, sources, weights, Target(block_format.name, plans[effort]), blocks)
    _run(job, len(sources), block_format.block_size, values.device.type)
    return QuantTensor(blocks.view(-1, row_bytes), block_format, tuple(values.shape))


def _run(job: Callable[[int, int], None], count: int, size: int, device: str) -> None:
    # Compiled chunks run in threads, as many as torch may use; torch has threads of its own.
    step = (CPU_CHUNK_ELEMENTS if device == "cpu" else DEVICE_CHUNK_ELEMENTS) // size
    starts = range(0, count, step)
    stops = [min(start + step, count) for start in starts]
    threads = torch.get_num_threads() if device == "cpu" and _compiled() else 1
    if threads == 1 or len(starts) == 1:
        list(map(job, starts, stops))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(job, starts, stops))


@torch.inference_mode()  # a thread does not inherit it from the caller, whose tensors may need it
def _chunk(
    sources: Tensor, weights: Tensor, target: Target, blocks: Tensor, start: int, stop: int
) -> None:
    x = sources[start:stop].float().contiguous()
    limit = target.largest_value
    largest = x.abs().amax(dim=1)  # (n,)
    if not largest.amax() <= limit:
        raise FormatError(
            f"{target.name} holds finite values up to {limit:.3g}; got a NaN, an infinity or more"
        )
    if len(weights) > 1:
        weights = weights[torch.arange(start, stop, device=x.device) % len(weights)]
    found = _search(x, weights, target.name, target.plan)
    error, energy = _error(found, x, weights, target.name), (x * x * weights).sum(1)
    special = (error < energy * NEARLY_EXACT) | (largest < limit / search_torch.FP16_MAX * FEW)
    rows = (special & (error > 0)).nonzero().flatten()
    if len(rows):
        few, counted = x[rows], weights[rows] if len(weights) > 1 else weights
        again = _search(few, counted, target.name, PLANS[target.name]["patient"])
        less = _error(again, few, counted, target.name) < error[rows]
        found[rows[less]] = again[less]
    blocks[start:stop] = found


def _search(x: Tensor, weights: Tensor, name: str, plan: AffinePlan | ScaledPlan) -> Tensor:
    # (n, block_size) -> (n, block_bytes)
    backend: Any = (_compiled() if x.device.type == "cpu" else None) or search_torch
    if isinstance(plan, AffinePlan):
        affine = backend.search_affine(x, weights, plan)
        return AFFINE_PACKERS[name](search_torch.affine_codes(x, affine, plan), affine)
    scaled = backend.search_scaled(x, weights, plan)
    return SCALED_PACKERS[name](search_torch.scaled_codes(x, scaled, plan), scaled)


def _error(blocks: Tensor, x: Tensor, weights: Tensor, name: str) -> Tensor:
    return DECODERS[name](blocks).sub_(x).square_().mul_(weights).sum(1)


def _weights(importance: Tensor | None, values: Tensor, size: int) -> Tensor:
    # (blocks of a row, block size) of mean 1; one row of ones serves all blocks.
    if importance is None:
        return torch.ones(1, size, device=values.device)
    wanted = tuple(values.shape[-1:])
    given = importance.detach().to(values.device, torch.float64)
    if tuple(given.shape) != wanted:
        raise FormatError(f"importance is one number a column, {wanted}, got {tuple(given.shape)}")
    if not (given.isfinite() & (given >= 0)).all():
        raise FormatError("importance is finite and not negative; got a NaN, an infinity or less")
    mean = given.mean()
    scaled = given / mean if mean > 0 else torch.ones_like(given)
    return scaled.clamp(min=LEAST_IMPORTANCE).float().view(-1, size)


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
