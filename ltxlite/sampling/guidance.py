"""Guidance: several predictions of the clean latents combined into one, in fp32.

Source: LTX-2 400fd31 ltx_core components/guiders.py.
"""

import torch
from torch import Tensor

from ltxlite.errors import RequestError
from ltxlite.sampling.settings import Guidance


def combine(
    cond: Tensor,
    uncond: Tensor | None,
    perturbed: Tensor | None,
    isolated: Tensor | None,
    guidance: Guidance,
    step: int = 0,
) -> Tensor:
    """Combine the passes of one stream at one step, before any blending with clean tokens.

    cond + (cfg - 1)(cond - uncond) + stg (cond - perturbed) + (modality - 1)(cond - isolated),
    rescaled to cond's spread as far as `guidance.rescale` says.
    All predictions are x0, (B, T, C); a pass that `guidance` does not ask for may be None.
    Returns fp32.  Raises RequestError if a pass is missing.
    """
    cond = cond.float()
    guided = _prompt_guided(cond, uncond, guidance, step)
    if guidance.stg != 0:
        guided = guided + guidance.stg * (cond - _given(perturbed, "perturbed"))
    if guidance.modality != 1:
        guided = guided + (guidance.modality - 1) * (cond - _given(isolated, "isolated"))
    return rescale(guided, cond, guidance.rescale) if guidance.rescale else guided


def cfg_star(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Guide away from the part of the negative prediction that the positive one contains.

    cond, uncond: (B, T, C).  Per sample, uncond is scaled by <cond, uncond> / |uncond|².
    Source: arXiv 2503.18886.
    """
    share = _dot(cond, uncond) / (_dot(uncond, uncond) + 1e-8)
    return cond + (scale - 1) * (cond - share * uncond)


def apg(
    cond: Tensor, uncond: Tensor, scale: float, eta: float = 1.0, norm_threshold: float = 0.0
) -> Tensor:
    """Guide with the difference split along and across the positive prediction.

    cond, uncond: (B, T, C).  eta: weight of the part along cond.  norm_threshold: longest
    difference of a sample, over tokens and channels together; 0 leaves it as long as it is.
    Source: arXiv 2410.02416.
    """
    difference = cond - uncond
    if norm_threshold > 0:
        length = _dot(difference, difference).sqrt()
        difference = difference * (norm_threshold / length).clamp(max=1)
    along = _dot(difference, cond) / _dot(cond, cond) * cond
    return cond + (scale - 1) * (eta * along + (difference - along))


def rescale(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Bring the standard deviation of a guided prediction back towards that of `cond`.

    The deviation is unbiased and over the whole tensor; a constant tensor is left alone, so that
    a stream frozen to zeros does not become NaN.
    """
    deviation = guided.std()
    ratio = torch.where(deviation > 0, cond.std() / deviation, 1.0)
    return guided * (share * ratio + (1 - share))


def _prompt_guided(cond: Tensor, uncond: Tensor | None, guidance: Guidance, step: int) -> Tensor:
    scale = guidance.cfg_at(step)
    if scale == 1:
        return cond
    negative = _given(uncond, "uncond")
    if guidance.mode == "cfg_star":
        return cfg_star(cond, negative, scale)
    if guidance.mode == "apg":
        return apg(cond, negative, scale, guidance.apg_eta, guidance.apg_norm_threshold)
    return cond + (scale - 1) * (cond - negative)


def _given(prediction: Tensor | None, name: str) -> Tensor:
    if prediction is None:
        raise RequestError(f"guidance needs the {name} pass of this step and got None")
    return prediction.float()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)
