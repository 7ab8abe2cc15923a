"""DPM-Solver++ (SDE): the second-order single step with noise from the images' Brownian paths, two evaluations.

Lu et al. 2022 with the ancestral split, as k-diffusion does it, at r = 1/2.
"""

from __future__ import annotations

import math

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.samplers.split import split
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
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> tuple[Tensor, None]:
    """First to the middle in log SNR, then the whole way with x0 of the middle; each with its own split and its noise.

    Args:
        schedule: tells the timestep of the middle.
    """
    first = denoiser(x, level)
    if next_level.sigma == 0.0:
        return next_level.alpha * first.x0, None
    start = first.x0 + level.sigma_hat * first.eps  # x / alpha

    def moved(x0: Tensor, sigma_hat: float) -> Tensor:
        """x / alpha at `sigma_hat`, exact for an x0 that stays what it is."""
        down, up = split(level.sigma_hat, sigma_hat, eta)
        mean = x0 + down / level.sigma_hat * (start - x0)
        return mean + up * s_noise * noise.between(level.sigma_hat, sigma_hat) if up else mean

    middle = schedule.at_sigma_hat(math.sqrt(level.sigma_hat * next_level.sigma_hat))
    second = denoiser(middle.alpha * moved(first.x0, middle.sigma_hat), middle)
    return next_level.alpha * moved(second.x0, next_level.sigma_hat), None
