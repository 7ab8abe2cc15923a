"""DDIM inversion: from clean latents up to the noise that sampling would lead back from.

With the angle theta of a level (alpha = cos theta, sigma = sin theta), a DDIM step between two levels, in either direction, is

    x_next = a x + b r      with r what the model predicts at the noisier of the two

where r is the noise, or the velocity v = alpha eps - sigma x0, which makes the step a rotation. Sampling knows r exactly.
Going up it is unknown, and the variants differ in how they guess it.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from latentdiff.denoise import Noise, Step
from latentdiff.errors import UsageError
from latentdiff.parameterization import Denoiser, Prediction
from latentdiff.samplers import ddim
from latentdiff.schedule import Level

# What the model predicts. The choice matters only where r is guessed; "v" also holds at levels without any signal.
Quantity = Literal["eps", "v"]


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


def low_step(denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise) -> tuple[Tensor, None]:
    """Guess that the prediction at the level below is that of the level above: the sampler's own step, walked upwards.

    Dhariwal & Nichol 2021, appendix F. One evaluation; the error of a round trip falls as 1 / steps.
    """
    return ddim.step(denoiser, x, level, next_level, state, noise)


def high_step(quantity: Quantity = "eps", iterations: int = 0) -> Step:
    """Guess by showing the model the latents from below as if they were those above, and correct the guess `iterations` times.

    No iteration is what diffusers' DDIMInverseScheduler does; each one more is a fixed-point iteration on the equation of
    the sampling step (ReNoise, Garibi et al. 2024, without its averaging and regularisation) and takes the error down by
    about one order. It converges as far as the model is smooth: b times the slope of r must be below 1.

    Cost: `iterations` + 1 evaluations a step.

    Raises:
        UsageError: a negative number of iterations.
    """
    if iterations < 0:
        raise UsageError(f"expected 0 or more iterations of the inversion, found {iterations}")

    def step(denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise) -> tuple[Tensor, None]:
        below = x
        a, b = coefficients(level, next_level, quantity)
        x = a * below + b * read(denoiser(below, next_level), next_level, quantity)
        down, shift = coefficients(next_level, level, quantity)  # below = down x + shift r(x)
        for _ in range(iterations):
            x = (below - shift * read(denoiser(x, next_level), next_level, quantity)) / down
        return x, None

    return step
