"""DPM-Solver++(2S): second order within one step, by an evaluation in its middle (Lu et al. 2022, algorithm 1).

`step` takes the middle itself and can be ancestral, as k-diffusion does it; `alternating_step` takes the levels that it
is given for the middles, one of each pair, as diffusers' DPMSolverSinglestepScheduler does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> tuple[Tensor, None]:
    """Down the ancestral split, exact in the linear part, with x0 from the middle of the step in log SNR.

    Args:
        schedule: tells the timestep of the middle.
    """
    first = denoiser(x, level)
    down, up = split(level.sigma_hat, next_level.sigma_hat, eta)
    if down == 0.0:
        return noised(first.x0, up, next_level, noise, s_noise), None
    middle = schedule.at_sigma_hat(math.sqrt(level.sigma_hat * down))
    x0 = denoiser(middle.alpha * (first.x0 + middle.sigma_hat * first.eps), middle).x0
    x = x0 + down / level.sigma_hat * (first.x0 + level.sigma_hat * first.eps - x0)
    return noised(x, up, next_level, noise, s_noise), None


@dataclass(frozen=True)
class Begun:
    """The first half of a pair of steps."""

    x: Tensor  # (N, C, h, w), where it began
    level: Level
    x0: Tensor  # (N, C, h, w)
    guided: bool


def alternating_step(
    denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: Begun | None, noise: Noise
) -> tuple[Tensor, Begun | None]:
    """Every other step is DDIM's, to what is the middle of a pair; the step after it goes the whole way again.

    A step to no noise, and one at whose ends guidance switched on or off, is DDIM's.
    """
    prediction = denoiser(x, level)
    ends_pair = state is not None and state.guided == prediction.guided and next_level.sigma > 0.0
    if not ends_pair:
        begun = Begun(x, level, prediction.x0, prediction.guided)
        h = next_level.log_snr - level.log_snr
        return next_level.sigma / level.sigma * x - next_level.alpha * math.expm1(-h) * prediction.x0, begun
    h = next_level.log_snr - state.level.log_snr
    place = (level.log_snr - state.level.log_snr) / h  # of the middle, 0 to 1
    x0 = state.x0 + 0.5 / place * (prediction.x0 - state.x0)
    return next_level.sigma / state.level.sigma * state.x - next_level.alpha * math.expm1(-h) * x0, None
