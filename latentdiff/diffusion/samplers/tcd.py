"""Trajectory consistency distillation: to a level below the next one, and noise back up to it (Zheng et al. 2024,
algorithm 4)."""

from __future__ import annotations

import math

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
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
    eta: float = 0.3,
) -> tuple[Tensor, None]:
    """x_s' at timestep (1 - eta) s along the prediction, then a draw from q(x_s | x_s').

    Args:
        schedule: tells the level of that timestep.
        eta: the paper's gamma; 0 is DDIM, 1 goes to the clean end and back.
    """
    prediction = denoiser(x, level)
    if next_level.is_clean or not eta:
        return next_level.alpha * prediction.x0 + next_level.sigma * prediction.eps, None
    below = schedule.level(math.floor((1.0 - eta) * next_level.t))
    x = below.alpha * prediction.x0 + below.sigma * prediction.eps
    kept = next_level.alpha_cumprod / below.alpha_cumprod
    return math.sqrt(kept) * x + math.sqrt(1.0 - kept) * noise(), None


def end(schedule: Schedule) -> Level:
    """As noisy as timestep 0, whatever the configuration says of DDIM's end."""
    return Level(0.0, schedule.alphas_cumprod[0].item(), is_clean=True)


def levels(schedule: Schedule, steps: int, spacing: str) -> list[Level]:
    """The schedule's levels, with an end of their own."""
    return [*schedule.levels(steps, spacing)[:-1], end(schedule)]
