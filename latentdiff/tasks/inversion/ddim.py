"""DDIM inversion: from clean latents up to the noise that sampling would lead back from.

With the angle theta of a level (alpha = cos theta, sigma = sin theta), a DDIM step between two levels, in either
direction, is

    x_next = a x + b r      with r what the model predicts at the noisier of the two

where r is the noise, or the velocity v = alpha eps - sigma x0, which makes the step a rotation. Sampling knows r
exactly. Going up it is unknown, and the variants differ in how they guess it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser, Prediction
from latentdiff.diffusion.samplers import ddim
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError

# What the model predicts. The choice matters only where r is guessed; "v" also holds at levels without any signal.
Quantity = Literal["eps", "v"]

# Corrections below this share of the latents are rounding, which may grow.
ROUNDING = 1e-3
# Corrections that are so many times the smallest one do not come back.
HOPELESS = 10.0


def quantity_of(prediction_type: str) -> Quantity:
    """The quantity in which to invert a model that predicts "epsilon", "v_prediction" or "sample"."""
    return "eps" if prediction_type == "epsilon" else "v"


def coefficients(level: Level, next_level: Level, quantity: Quantity) -> tuple[float, float]:
    """a and b of the step from `level` to `next_level`, up or down in noise."""
    if quantity == "eps":
        a = next_level.alpha / level.alpha
        return a, next_level.sigma - a * level.sigma
    cosine = level.alpha * next_level.alpha + level.sigma * next_level.sigma
    sine = next_level.sigma * level.alpha - next_level.alpha * level.sigma
    return cosine, sine


def read(prediction: Prediction, level: Level, quantity: Quantity) -> Tensor:
    """r of a prediction that was made at `level`."""
    if quantity == "eps":
        return prediction.eps
    return level.alpha * prediction.eps - level.sigma * prediction.x0


def low_step(
    denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise
) -> tuple[Tensor, None]:
    """Guess that the prediction at the level below is that of the level above: the sampler's own step, walked upwards.

    Dhariwal & Nichol 2021, appendix F. One evaluation; the error of a round trip falls as 1 / steps.
    """
    return ddim.step(denoiser, x, level, next_level, state, noise)


def high_step(
    quantity: Quantity = "eps", iterations: int = 0, ran_away: Callable[[Level], object] = lambda level: None
) -> Step:
    """Guess by showing the model the latents from below as if they were those above, and correct the guess `iterations`
    times.

    No iteration is what diffusers' DDIMInverseScheduler does; each one more is a fixed-point iteration on the equation
    of the sampling step (ReNoise, Garibi et al. 2024, without its averaging and regularisation) and takes the error
    down by about one order. It converges as far as the model is smooth: b times the slope of r must be below 1. Where
    the last correction is not the smallest, an image keeps the latents whose correction was, from which sampling leads
    back nearest; `ran_away` is called with the level then, once a step.

    Cost: `iterations` + 1 evaluations a step, or fewer.

    Raises:
        UsageError: a negative number of iterations.
    """
    if iterations < 0:
        raise UsageError(f"expected 0 or more iterations of the inversion, found {iterations}")

    def step(
        denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        below = x
        a, b = coefficients(level, next_level, quantity)
        x = a * below + b * read(denoiser(below, next_level), next_level, quantity)
        down, shift = coefficients(next_level, level, quantity)  # below = down x + shift r(x)
        best, least = x, x.new_full((len(x), 1, 1, 1), math.inf)
        converges = torch.ones_like(least, dtype=torch.bool)
        for number in range(1, iterations + 1):
            found = (below - shift * read(denoiser(x, next_level), next_level, quantity)) / down
            size = _norm(found - x)  # how far off x is
            usable = size.isfinite()
            converges = usable & (size <= least) | (size <= ROUNDING * _norm(x))
            best, least = torch.where(converges, x, best), torch.where(converges, size, least)
            if number == iterations or not (usable & (size <= HOPELESS * least)).any():
                x = torch.where(converges, found, best)
                break
            x = found
        if not converges.all():
            ran_away(next_level)
        return x, None

    return step


def _norm(x: Tensor) -> Tensor:
    """Of each image of a batch, (N, 1, 1, 1)."""
    return x.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
