"""Euler's method on the probability-flow ODE in EDM's variables, x / alpha over sigma_hat (Karras et al. 2022,
algorithm 1)."""

from __future__ import annotations

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule


def step(
    denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise
) -> tuple[Tensor, None]:
    """x_s / alpha_s = x_t / alpha_t + (sigma_hat_s - sigma_hat_t) eps.

    eps is the slope d(x / alpha) / d sigma_hat. As x_t / alpha_t = x0 + sigma_hat_t eps, this equals
    x_s = alpha_s x0 + sigma_s eps, the step of DDIM with eta 0, and so it is computed, without dividing by an alpha.
    What sets Euler apart is where it starts and where it steps.
    """
    prediction = denoiser(x, level)
    return next_level.alpha * prediction.x0 + next_level.sigma * prediction.eps, None


def levels(schedule: Schedule, steps: int, spacing: str) -> list[Level]:
    """The schedule's levels down to no noise; `linspace` keeps its fractional timesteps, with sigma_hat
    interpolated."""
    schedule = schedule.with_finite_log_snr()
    timesteps: list[float] = list(schedule.timesteps(steps, spacing))
    if spacing == "linspace" and steps > 1:
        last = schedule.num_train_timesteps - 1
        timesteps = [last * (steps - 1 - i) / (steps - 1) for i in range(steps)]
    return [*map(schedule.level, timesteps), NOISE_FREE]


def start_scale(schedule: Schedule, spacing: str) -> float:
    """Standard deviation of the start latents: sigma of the last timestep if the spacing visits it, else 1."""
    if spacing == "leading":
        return 1.0
    return schedule.with_finite_log_snr().level(schedule.num_train_timesteps - 1).sigma
