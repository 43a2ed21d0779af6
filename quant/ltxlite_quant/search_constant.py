"""Scales of blocks that are one value throughout: found by trying them all.

Whatever the codes, such a block is one integer (a scale times a level) times d.  Of the few hundred
integers, one makes d hardly rounded; a search would have to be lucky to meet it.
"""

import torch
from torch import Tensor

from ltxlite_quant.search_plan import AffinePlan, AffineScales, ScaledPlan, Scales
from ltxlite_quant.search_torch import are_integers

TRIALS = 1 << 15  # at a time, 256 KiB of fp64; Q6_K has 4096 a value


def constant_affine(values: Tensor, plan: AffinePlan) -> AffineScales:
    """Find the scales and minimums of least error: values (n,) fp32, one a block.

    Positive values are a code times a scale, negative ones a minimum.
    """
    groups = 256 // plan.group
    scales = torch.arange(1, plan.highest_scale + 1, device=values.device)
    codes = torch.arange(1, plan.highest_code + 1, device=values.device)
    d, scale = _nearest(values.clamp(min=0), scales, codes)
    dmin, minimum = _nearest(-values.clamp(max=0), scales, codes[:1])
    return AffineScales(d, dmin, _repeated(scale, groups), _repeated(minimum, groups))


def constant_scaled(values: Tensor, plan: ScaledPlan, size: int) -> Scales:
    """Find the scales of least error: values (n,) fp32, one a block of `size` elements."""
    # d has any sign, so that of scales, and of levels that are symmetric, the negative ones do.
    end = 0 if plan.lowest_scale < 0 else plan.highest_scale + 1
    scales = torch.arange(plan.lowest_scale, end, device=values.device)
    levels = torch.tensor(plan.levels, device=values.device)
    if are_integers(plan.levels):
        levels = levels[levels < 0]
    d, scale = _nearest(values, scales, levels)
    return Scales(d, _repeated(scale, size // plan.group))


def _nearest(values: Tensor, scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    # (n,) each: d, and the scale of which one of the levels comes nearest; fp32.
    products = (scales[:, None] * levels).double().flatten()
    parts = values.double().split(max(1, TRIALS // len(products)))
    d, best = (
        torch.cat(found) for found in zip(*(_tried(part, products) for part in parts), strict=True)
    )
    return d, scales[best // len(levels)]


def _tried(values: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    # (n,) each: d, and the index of its product.
    units = (values[:, None] / products).half().double()  # (n, products)
    miss = (units * products).sub_(values[:, None]).abs_()
    best = miss.nan_to_num_(nan=torch.inf).argmin(1)  # d beyond fp16
    return units.gather(1, best[:, None])[:, 0].float(), best


def _repeated(scale: Tensor, groups: int) -> Tensor:
    return scale[:, None].repeat(1, groups)
