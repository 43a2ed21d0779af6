"""Euler samplers: plain, gradient-estimating and ancestral.

Rectified flow: x = (1 - sigma) x0 + sigma noise, so the velocity noise - x0 is (x - x0) / sigma.
"""

import math

from ltxlite.sampling.contract import Sigmas, State, Tools, add, intervals, mix


def euler(x: State, sigmas: Sigmas, tools: Tools) -> State:
    """Integrate with one straight line a step; one evaluation each.

    x: (B, T, C) fp32 a stream.  sigmas: falling; at 0 the prediction itself is the result.
    Source: LTX-2 400fd31 ltx_core EulerDiffusionStep; agrees with it to about one fp32 rounding.
    """
    for step, sigma, following in intervals(sigmas):
        x0 = tools.denoise(x, sigma).x0
        x = x0 if following == 0 else add(x, following - sigma, velocity(x, x0, sigma))
        tools.report(step, x)
    return x


def euler_gradient(x: State, sigmas: Sigmas, tools: Tools, gamma: float = 2.0) -> State:
    """Integrate with velocities extrapolated from the step before by `gamma`.

    The first step is plain Euler, the last returns the prediction; the velocity that is remembered
    is the model's own, not the extrapolated one.
    Source: LTX-2 400fd31 ltx_pipelines gradient_estimating_euler_denoising_loop.
    """
    before: State | None = None
    for step, sigma, following in intervals(sigmas):
        x0 = tools.denoise(x, sigma).x0
        now = velocity(x, x0, sigma)
        direction = now if before is None else mix(gamma, now, 1 - gamma, before)
        x = x0 if following == 0 else add(x, following - sigma, direction)
        before = now
        tools.report(step, x)
    return x


def euler_ancestral(
    x: State, sigmas: Sigmas, tools: Tools, eta: float = 1.0, s_noise: float = 1.0
) -> State:
    """Step below the next sigma and come back up with fresh noise, keeping the flow's variance.

    eta: 0 is Euler, 1 replaces as much noise as the step allows.  s_noise scales what is added.
    Source: LTX-2 400fd31 ltx_core EulerAncestralDiffusionStep; ComfyUI's rule for flow models.
    """
    for step, sigma, following in intervals(sigmas):
        x0 = tools.denoise(x, sigma).x0
        if following == 0:
            x = x0
        else:
            down = following * (1 + (following / sigma - 1) * eta)
            signal = (1 - following) / (1 - down)
            up = math.sqrt(max(0.0, following**2 - (down * signal) ** 2))
            keep = down / sigma
            x = mix(signal * keep, x, signal * (1 - keep), x0)
            x = tools.add_noise(x, s_noise * up)
        tools.report(step, x)
    return x


def velocity(x: State, x0: State, sigma: float) -> State:
    """Return the flow's velocity (x - x0) / sigma for every stream."""
    return tuple((noisy - clean) / sigma for noisy, clean in zip(x, x0, strict=True))
