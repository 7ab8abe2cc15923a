"""DPM-Solver-2 on the probability-flow ODE: the slope in the middle of the step in log sigma_hat, two evaluations.

Karras et al. 2022, algorithm 2 without churn, with the midpoint that Lu et al. 2022 take; as k-diffusion and diffusers
(KDPM2) do it. The ancestral form solves down the split of the next level's noise.
"""

from __future__ import annotations

import math

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.samplers.split import noised, split
from latentdiff.diffusion.schedule import Level, Schedule


def step(
    denoiser: Denoiser,
    x: Tensor,
    level: Level,
    next_level: Level,
    state: None,
    noise: Noise,
    *,
    schedule: Schedule,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> tuple[Tensor, None]:
    """x_s / alpha_s = x_t / alpha_t + (down - sigma_hat_t) eps_middle + s_noise up z; Euler's step if down is 0.

    Args:
        schedule: tells the timestep of the middle.
    """
    first = denoiser(x, level)
    down, up = split(level.sigma_hat, next_level.sigma_hat, eta)
    if down == 0.0:
        return noised(first.x0, up, next_level, noise, s_noise), None
    middle = schedule.at_sigma_hat(math.sqrt(level.sigma_hat * down))
    second = denoiser(middle.alpha * (first.x0 + middle.sigma_hat * first.eps), middle)
    x = first.x0 + level.sigma_hat * first.eps + (down - level.sigma_hat) * second.eps
    return noised(x, up, next_level, noise, s_noise), None
