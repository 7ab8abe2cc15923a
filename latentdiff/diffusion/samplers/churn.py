"""Churn: some fresh noise before each step of an ODE solver, to be removed by it again (Karras et al. 2022, algorithm
2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Churn:
    """How much noise is stirred in, and where; `amount` is S_churn of the paper, spread over all steps.

    Raises:
        UsageError: a negative amount, or a range that is none.
    """

    amount: float = 0.0
    low: float = 0.0  # S_tmin: of sigma_hat
    high: float = math.inf  # S_tmax
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.amount < math.inf:
            raise UsageError(f"s_churn must be a finite number of 0 or more, found {self.amount}")
        if not 0.0 <= self.low < self.high:
            raise UsageError(
                f"s_tmin and s_tmax must be noise levels, 0 <= low < high, found {self.low} and {self.high}"
            )

    def raised(self, level: Level, steps: int, schedule: Schedule) -> Level:
        """The noisier level from which the step is taken."""
        if not self.amount or not self.low <= level.sigma_hat <= self.high:
            return level
        share = min(self.amount / steps, math.sqrt(2.0) - 1.0)
        return schedule.at_sigma_hat(level.sigma_hat * (1.0 + share))


UNSTIRRED = Churn()


def churned(
    base: Step,
    denoiser: Denoiser,
    x: Tensor,
    level: Level,
    next_level: Level,
    state: Any,
    noise: Noise,
    *,
    churn: Churn,
    steps: int,
    schedule: Schedule,
) -> tuple[Tensor, Any]:
    """The step of a solver from a raised level, with the latents noised up to it.

    The raised level may lie above the noisiest of the schedule; the model is told the last timestep there.
    """
    raised = churn.raised(level, steps, schedule)
    if raised is not level:
        more = math.sqrt(raised.sigma_hat**2 - level.sigma_hat**2)
        x = raised.alpha * (x / level.alpha + more * churn.s_noise * noise())
    return base(denoiser, x, raised, next_level, state, noise)
