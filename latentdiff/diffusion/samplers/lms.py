"""LMS: Adams and Bashforth's linear multistep method of up to fourth order on the probability-flow ODE, as k-diffusion
has it."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.polynomial import Polynomial
from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import Level


@dataclass(frozen=True)
class History:
    """The slopes of the steps before, the newest first."""

    levels: tuple[Level, ...]
    eps: tuple[Tensor, ...]  # (N, C, h, w) each
    guided: bool


def step(
    denoiser: Denoiser,
    x: Tensor,
    level: Level,
    next_level: Level,
    state: History | None,
    noise: Noise,
    *,
    order: int = 4,
) -> tuple[Tensor, History]:
    """x_s / alpha_s = x_t / alpha_t + the integral over sigma_hat of the polynomial through the last `order` eps.

    History starts over where guidance switched on or off.
    """
    prediction = denoiser(x, level)
    levels, slopes = (level,), (prediction.eps,)
    if state is not None and state.guided == prediction.guided:
        levels, slopes = (*levels, *state.levels)[:order], (*slopes, *state.eps)[:order]
    weights = _weights([one.sigma_hat for one in levels], next_level.sigma_hat)
    x = prediction.x0 + level.sigma_hat * prediction.eps
    for weight, eps in zip(weights, slopes, strict=True):
        x = x + weight * eps
    return next_level.alpha * x, History(levels, slopes, prediction.guided)


def _weights(places: list[float], end: float) -> list[float]:
    """The integrals from places[0] to `end` of the polynomials that are 1 at one place and 0 at the others."""
    weights = []
    for place in places:
        basis = Polynomial([1.0])  # in distances from the end of the step, so that the powers stay small
        for other in places:
            if other != place:
                basis *= Polynomial([end - other, 1.0]) / (place - other)
        weights.append(-float(basis.integ()(places[0] - end)))
    return weights
