"""Restart sampling: Heun's method, and back up in noise for another walk through the last stretch (Xu et al. 2023)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.samplers import heun
from latentdiff.diffusion.schedule import Level, Schedule

# Between which sigma_hat the walk is repeated; the authors' setting for Stable Diffusion.
LOW, HIGH = 0.1, 2.0
RHO = 7.0
FEWEST = 20  # steps; below, nothing is repeated
TWICE = 36  # steps; from here on it is repeated twice


def down_or_up(
    down: Step,
    denoiser: Denoiser,
    x: Tensor,
    level: Level,
    next_level: Level,
    state: Any,
    noise: Noise,
    *,
    s_noise: float = 1.0,
) -> tuple[Tensor, Any]:
    """A sampler's step; where the next level is noisier, a draw from q(x_next | x), which ends a solver's history."""
    if next_level.alpha_cumprod > level.alpha_cumprod:
        return down(denoiser, x, level, next_level, state, noise)
    kept = next_level.alpha / level.alpha
    return kept * x + math.sqrt(1.0 - kept**2) * s_noise * noise(), None


step = partial(down_or_up, heun.step)


def repeats(steps: int) -> tuple[int, int]:
    """How often the stretch is walked again, and in how many steps each time, of `steps` evaluated pairs in all.

    As the web UIs of the field spend them.
    """
    if steps < FEWEST:
        return 0, 0
    return (2, steps // 4) if steps >= TWICE else (1, 9)


def with_repeats(schedule: Schedule, levels: list[Level], times: int, steps: int) -> list[Level]:
    """Falling levels, with the stretch between `HIGH` and `LOW` walked `times` more, each time in `steps` steps.

    After the level nearest to `LOW` comes a pair up, to the level nearest to `HIGH`, and `steps` pairs down again, even
    in sigma_hat^(1/7).
    """
    if not times:
        return levels
    *noisy, _ = levels
    low, high = (min(noisy, key=lambda level: abs(level.sigma_hat - near)) for near in (LOW, HIGH))
    if high.sigma_hat <= low.sigma_hat:
        return levels
    ends = [level.sigma_hat ** (1.0 / RHO) for level in (high, low)]
    between = [(ends[0] + (ends[1] - ends[0]) * i / steps) ** RHO for i in range(1, steps)]
    again = [high, *map(schedule.with_finite_log_snr().at_sigma_hat, between), low]
    after = levels.index(low) + 1
    return [*levels[:after], *again * times, *levels[after:]]
