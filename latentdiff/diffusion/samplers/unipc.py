"""UniPC: a multistep predictor, corrected by the model call that the next step makes anyway (Zhao et al. 2023,
algorithms 5-6).

With B(h) = exp(h) - 1 ("bh2") in data prediction. Without the corrector, order 1 is DDIM and order 2 is
DPM-Solver++(2M).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import Level


@dataclass(frozen=True)
class Evaluation:
    """What the model said at a level."""

    level: Level
    x0: Tensor  # (N, C, h, w)


@dataclass(frozen=True)
class History:
    """The step before: where it began, and the evaluations that it used, the newest first."""

    x: Tensor  # (N, C, h, w), corrected
    evaluations: tuple[Evaluation, ...]
    guided: bool


def step(
    denoiser: Denoiser,
    x: Tensor,
    level: Level,
    next_level: Level,
    state: History | None,
    noise: Noise,
    *,
    order: int = 2,
    correct: bool = True,
) -> tuple[Tensor, History]:
    """Take the last step again with what the model says at its end, then predict the next one.

    The global error falls with the step size to the power of order + 1, or of `order` without the corrector. History
    starts over where guidance switched on or off; a step to no noise, whose length is infinite, is of first order.
    """
    prediction = denoiser(x, level)
    here = (Evaluation(level, prediction.x0),)
    if state is not None and state.guided == prediction.guided:
        if correct:
            x = _solve(state.x, state.evaluations, level, at_end=prediction.x0)
        here = (*here, *state.evaluations)[:order]
    used = here if math.isfinite(next_level.log_snr) else here[:1]
    return _solve(x, used, next_level), History(x, here, prediction.guided)


def _solve(x: Tensor, evaluations: Sequence[Evaluation], next_level: Level, at_end: Tensor | None = None) -> Tensor:
    """From the newest evaluation's level to the next: exact in the linear part, with x0 interpolated in log SNR.

    Args:
        at_end: x0 at the next level, for the corrector.
    """
    (newest, *older) = evaluations
    level, x0 = newest.level, newest.x0
    h = next_level.log_snr - level.log_snr
    places = [(one.level.log_snr - level.log_snr) / h for one in older]  # 0 is the newest evaluation, 1 the end
    changes = [one.x0 - x0 for one in older]
    if at_end is not None:
        places, changes = [*places, 1.0], [*changes, at_end - x0]
    for weight, place, change in zip(_weights(h, places), places, changes, strict=True):
        x0 = x0 + weight / place * change
    return next_level.sigma / level.sigma * x - next_level.alpha * math.expm1(-h) * x0


def _weights(h: float, places: Sequence[float]) -> list[float]:
    """The paper's rho: their sums with the powers of the places are the moments that the exact solution has.

    A single weight is 1/2 for any h, which does not lower the order.
    """
    count = len(places)
    if count < 2:
        return [0.5] * count
    remainder, moments = math.expm1(-h) / -h - 1.0, []
    for i in range(1, count + 1):
        moments.append(math.factorial(i) * remainder / math.expm1(-h))
        remainder = remainder / -h - 1.0 / math.factorial(i + 1)
    powers = [[place**i for place in places] for i in range(count)]
    return torch.linalg.solve(
        torch.tensor(powers, dtype=torch.float64), torch.tensor(moments, dtype=torch.float64)
    ).tolist()
