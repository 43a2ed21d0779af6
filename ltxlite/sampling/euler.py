"""Euler samplers: plain, gradient-estimating and ancestral.

Rectified flow: x = (1 - sigma) x0 + sigma noise, so the velocity noise - x0 is (x - x0) / sigma.
"""

import math

from ltxlite.sampling.contract import Carry, State, Step, Tools, add, mix


def euler(carry: Carry, step: Step, tools: Tools) -> Carry:
    """Go one straight line; one evaluation.

    Carries x, (B, T, C) fp32 a stream.  Where sigma falls to 0, the prediction is the result.
    Source: LTX-2 400fd31 ltx_core EulerDiffusionStep; agrees with it to about one fp32 rounding.
    """
    x = carry["x"]
    x0 = tools.denoise(x, step.sigma).x0
    if step.following == 0:
        return {"x": x0}
    return {"x": add(x, step.following - step.sigma, velocity(x, x0, step.sigma))}


def euler_gradient(carry: Carry, step: Step, tools: Tools, gamma: float = 2.0) -> Carry:
    """Go along a velocity extrapolated from the step before by `gamma`.

    The first step is plain Euler, the last returns the prediction. Carries x and velocity, which
    is the model's own, not the extrapolated one.
    Source: LTX-2 400fd31 ltx_pipelines gradient_estimating_euler_denoising_loop.
    """
    x = carry["x"]
    x0 = tools.denoise(x, step.sigma).x0
    if step.following == 0:
        return {"x": x0}
    now = velocity(x, x0, step.sigma)
    direction = mix(gamma, now, 1 - gamma, carry["velocity"]) if step.index else now
    return {"x": add(x, step.following - step.sigma, direction), "velocity": now}


def euler_ancestral(
    carry: Carry, step: Step, tools: Tools, eta: float = 1.0, s_noise: float = 1.0
) -> Carry:
    """Step below the next sigma and come back up with fresh noise, keeping the flow's variance.

    eta: 0 is Euler, 1 replaces as much noise as the step allows.  s_noise scales what is added.
    Source: LTX-2 400fd31 ltx_core EulerAncestralDiffusionStep; ComfyUI's rule for flow models.
    """
    x, sigma, following = carry["x"], step.sigma, step.following
    x0 = tools.denoise(x, sigma).x0
    if following == 0:
        return {"x": x0}
    down = following * (1 + (following / sigma - 1) * eta)
    signal = (1 - following) / (1 - down)
    up = math.sqrt(max(0.0, following**2 - (down * signal) ** 2))
    keep = down / sigma
    x = mix(signal * keep, x, signal * (1 - keep), x0)
    return {"x": tools.add_noise(x, s_noise * up)}


def velocity(x: State, x0: State, sigma: float) -> State:
    """Return the flow's velocity (x - x0) / sigma for every stream."""
    return tuple((noisy - clean) / sigma for noisy, clean in zip(x, x0, strict=True))
