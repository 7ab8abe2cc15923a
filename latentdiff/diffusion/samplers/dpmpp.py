"""DPM-Solver++(2M): second order from one model call a step, by remembering the last one (Lu et al. 2022, algorithm
2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule


@dataclass(frozen=True)
class History:
    """The previous step's evaluation."""

    level: Level
    x0: Tensor  # (N, C, h, w)
    guided: bool


def step(
    denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: History | None, noise: Noise
) -> tuple[Tensor, History]:
    """Solve the ODE exactly in its linear part, with x0 extrapolated to the middle of the step in log SNR ("midpoint").

    First order, which is DDIM, where the history is of no use: at the first step; where guidance switched on or off,
    since extrapolating across that jump of the prediction would cost the order; and at a step to no noise, whose length
    is infinite.
    """
    prediction = denoiser(x, level)
    h = next_level.log_snr - level.log_snr
    x0 = prediction.x0
    if state is not None and state.guided == prediction.guided and math.isfinite(h):
        h_previous = level.log_snr - state.level.log_snr
        x0 = x0 + 0.5 * h / h_previous * (x0 - state.x0)
    x = next_level.sigma / level.sigma * x - next_level.alpha * math.expm1(-h) * x0
    return x, History(level, prediction.x0, prediction.guided)


def levels(schedule: Schedule, steps: int, spacing: str) -> list[Level]:
    """Down to no noise, over the schedule's timesteps; `leading` and `linspace` take one more than asked and drop the
    last.

    With the noise-free end in its place, those two would otherwise put their last two levels next to one another.
    """
    schedule = schedule.with_finite_log_snr()
    extra = 0 if spacing == "trailing" else 1
    timesteps = schedule.timesteps(min(steps + extra, schedule.num_train_timesteps), spacing)[:steps]
    return [*map(schedule.level, timesteps), NOISE_FREE]
