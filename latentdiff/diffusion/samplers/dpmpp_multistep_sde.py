"""DPM-Solver++(2M) and (3M) for the stochastic equation: one evaluation a step, noise from the images' Brownian paths.

Lu et al. 2022 in data prediction; the second order extrapolates x0 to the middle of the step, the third follows
k-diffusion's 3M, which gives the curvature half the weight of an exact integral, so that its error falls with the
square of the step too. eta 0 of the second order is DPM-Solver++(2M).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError


@dataclass(frozen=True)
class Evaluation:
    """What the model said at a level."""

    level: Level
    x0: Tensor  # (N, C, h, w)


@dataclass(frozen=True)
class History:
    """The evaluations of the steps before, the newest first."""

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
    eta: float = 1.0,
    s_noise: float = 1.0,
    brownian: bool = True,
) -> tuple[Tensor, History]:
    """Exact in the linear part of the reverse diffusion with eta² of its noise, with x0 extrapolated from `order`
    evaluations.

    History starts over where guidance switched on or off; a step to no noise is x0 itself.

    Args:
        brownian: take the noise from the images' paths; False takes the next draw of their streams.

    Raises:
        UsageError: the step goes up in noise.
    """
    prediction = denoiser(x, level)
    here = (Evaluation(level, prediction.x0),)
    if state is not None and state.guided == prediction.guided:
        here = (*here, *state.evaluations)[:order]
    history = History(here, prediction.guided)
    if next_level.sigma == 0.0:
        return next_level.alpha * prediction.x0, history
    h = next_level.log_snr - level.log_snr
    if h < 0.0:
        raise UsageError("a stochastic step must lower the noise level; use the ddim sampler with eta 0 to go up")
    decay = math.exp(-eta * h)
    x0 = _weighted_x0(here, h, eta, midpoint=order == 2)
    x = next_level.sigma / level.sigma * decay * x + next_level.alpha * x0
    if eta:
        z = noise.between(level.sigma_hat, next_level.sigma_hat) if brownian else noise()
        x = x + next_level.sigma * math.sqrt(-math.expm1(-2.0 * eta * h)) * s_noise * z
    return x, history


def _weighted_x0(evaluations: tuple[Evaluation, ...], h: float, eta: float, *, midpoint: bool) -> Tensor:
    """The integral of the extrapolated x0 over the step, with the weight that the linear part gives it."""
    h_eta = h * (1.0 + eta)
    phi_1 = -math.expm1(-h_eta)
    newest, *older = evaluations
    if not older:
        return phi_1 * newest.x0
    slope = _slope(newest, older[0])  # of x0 in log SNR
    if midpoint:
        return phi_1 * (newest.x0 + 0.5 * h * slope)
    phi_2 = 1.0 - phi_1 / h_eta
    if len(older) == 1:
        return phi_1 * newest.x0 + phi_2 * h * slope
    span = newest.level.log_snr - older[1].level.log_snr
    curvature = (slope - _slope(older[0], older[1])) / span
    slope = slope + curvature * (newest.level.log_snr - older[0].level.log_snr)
    return phi_1 * newest.x0 + phi_2 * h * slope - (phi_2 / h_eta - 0.5) * h * h * curvature


def _slope(newer: Evaluation, older: Evaluation) -> Tensor:
    return (newer.x0 - older.x0) / (newer.level.log_snr - older.level.log_snr)
