"""CFG++ Euler samplers: the clean part from the guided prediction, the noise from the negative one.

With the negative equal to the positive prediction they are euler and an ancestral Euler; at cfg 1
they still need the negative prediction, so every step costs two passes.
"""

import math

from ltxlite.errors import RequestError
from ltxlite.sampling.contract import Carry, Prediction, State, Step, Tools, mix


def euler_cfg_pp(carry: Carry, step: Step, tools: Tools) -> Carry:
    """Renoise the guided prediction with the noise that the negative prediction implies.

    Carries x, (B, T, C) fp32 a stream.
    Raises RequestError if the denoiser gives no negative prediction.
    Source: ComfyUI k_diffusion sampling.py, sample_euler_cfg_pp for flow models.
    """
    x, following = carry["x"], step.following
    prediction = tools.denoise(x, step.sigma)
    noise = _implied_noise(x, prediction, step.sigma)
    if following == 0:
        return {"x": prediction.x0}
    return {"x": mix(1 - following, prediction.x0, following, noise)}


def euler_ancestral_cfg_pp(
    carry: Carry, step: Step, tools: Tools, eta: float = 1.0, s_noise: float = 1.0
) -> Carry:
    """Do as `euler_cfg_pp`, and replace part of the implied noise by fresh noise.

    eta: 0 replaces none, 1 as much as an ancestral step allows; all of it when sigma is 1.
    Source: ComfyUI k_diffusion sampling.py, sample_euler_ancestral_cfg_pp for flow models.
    """
    x, following = carry["x"], step.following
    prediction = tools.denoise(x, step.sigma)
    if following == 0:
        return {"x": prediction.x0}
    up = following * fresh_share(step.sigma, following, eta)
    down = math.sqrt(following**2 - up**2)
    noise = _implied_noise(x, prediction, step.sigma)
    x = mix(1 - following, prediction.x0, down, noise)
    return {"x": tools.add_noise(x, s_noise * up)}


def fresh_share(sigma: float, following: float, eta: float) -> float:
    """Return which share of the next noise level an ancestral step fills with fresh noise.

    The usual formula works on k = sigma / (1 - sigma), which is infinite at the first sigma of 1;
    written with the ratio k' / k it has its limit, a share of eta, without dividing by zero.
    """
    ratio = following * (1 - sigma) / ((1 - following) * sigma)
    return min(1.0, eta * math.sqrt(max(0.0, 1 - ratio**2)))


def _implied_noise(x: State, prediction: Prediction, sigma: float) -> State:
    if prediction.uncond is None:
        raise RequestError(
            "a cfg_pp sampler needs the negative prediction and got none; "
            "run the uncond pass at every step, also at cfg 1"
        )
    return mix(1 / sigma, x, (sigma - 1) / sigma, prediction.uncond)
