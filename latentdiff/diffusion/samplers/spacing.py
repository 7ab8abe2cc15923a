"""Spacings that are even in a function of the noise level instead of in timesteps; they serve few steps better."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule
from latentdiff.errors import UsageError

KARRAS_RHO = 7.0

# Ten steps and the clean end for Stable Diffusion 1.5, of 1000 timesteps (Sabour et al. 2024, "Align Your Steps").
ALIGNED_TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)

# (log sigma_hat of every timestep (T,), rising; steps) -> log sigma_hat of the steps, falling.
Spacing = Callable[[np.ndarray, int], np.ndarray]


def karras(table: np.ndarray, steps: int) -> np.ndarray:
    """Even in sigma_hat^(1/7) (Karras et al. 2022, eq. 5)."""
    high, low = (math.exp(table[end] / KARRAS_RHO) for end in (-1, 0))
    return KARRAS_RHO * np.log(np.linspace(high, low, steps))


def uniform_lambda(table: np.ndarray, steps: int) -> np.ndarray:
    """Even in log SNR (Lu et al. 2022, "DPM-Solver", section 3.2)."""
    return np.linspace(table[-1], table[0], steps)


def ays(table: np.ndarray, steps: int) -> np.ndarray:
    """Align Your Steps: a list found by optimisation; other numbers of steps than ten are interpolated in log
    sigma_hat."""
    aligned = [round(t * (len(table) - 1) / ALIGNED_TIMESTEPS[0]) for t in ALIGNED_TIMESTEPS]
    last = len(aligned) - 1
    return np.interp(np.linspace(0, last, steps + 1)[:-1], np.arange(last + 1), table[aligned])


NOISE_SPACINGS: dict[str, Spacing] = {"karras": karras, "uniform-lambda": uniform_lambda, "ays": ays}


def levels(schedule: Schedule, steps: int, spacing: str, *, whole_timesteps: bool) -> list[Level]:
    """The `steps + 1` levels of one of `NOISE_SPACINGS`, ending free of noise whatever the sampler.

    Args:
        whole_timesteps: round the timestep that the model is told, though not the noise; so do the multistep solvers of
            diffusers. Otherwise it is interpolated in log sigma_hat.

    Raises:
        UsageError: `steps` is not in 1 to T.
    """
    schedule = schedule.with_finite_log_snr()
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise UsageError(
            f"steps must be 1 to {schedule.num_train_timesteps}, the number of training timesteps, found {steps}"
        )
    alphas_cumprod = schedule.alphas_cumprod.numpy()
    table = 0.5 * (np.log1p(-alphas_cumprod) - np.log(alphas_cumprod))  # (T,)
    noise = NOISE_SPACINGS[spacing](table, steps)
    timesteps = np.interp(noise, table, np.arange(len(table)))
    if whole_timesteps:
        timesteps = timesteps.round()
    found = [Level(float(t), 1.0 / (1.0 + math.exp(2.0 * log))) for t, log in zip(timesteps, noise, strict=True)]
    return [*found, NOISE_FREE]
