"""DDPM ancestral sampling (Ho et al. 2020), over any subset of the timesteps."""

from __future__ import annotations

import math

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule, posterior_variance


def step(
    denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise
) -> tuple[Tensor, None]:
    """A draw from q(x_s | x_t, x0) at the predicted x0: mean of eq. 7, its own ("fixed small") variance."""
    variance = posterior_variance(level, next_level)
    kept = level.alpha_cumprod / next_level.alpha_cumprod  # the product of (1 - beta) between the two levels
    x0_weight = next_level.alpha * (1.0 - kept) / level.sigma**2
    x_weight = math.sqrt(kept) * next_level.sigma**2 / level.sigma**2
    x = x0_weight * denoiser(x, level).x0 + x_weight * x
    return (x + math.sqrt(variance) * noise() if variance else x), None


def levels(schedule: Schedule, steps: int, spacing: str) -> list[Level]:
    """The schedule's levels, ending free of noise whatever the configuration says of DDIM's end."""
    return [*schedule.levels(steps, spacing)[:-1], NOISE_FREE]
