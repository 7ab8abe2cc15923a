"""Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 with the correction): second order, two
evaluations."""

from __future__ import annotations

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import Level


def step(
    denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise
) -> tuple[Tensor, None]:
    """x_s / alpha_s = x_t / alpha_t + (sigma_hat_s - sigma_hat_t) (eps_t + eps_s) / 2, with eps_s where Euler's step
    ends.

    A step to no noise is Euler's: there, the model has nothing to say.
    """
    first = denoiser(x, level)
    euler = next_level.alpha * first.x0 + next_level.sigma * first.eps
    if next_level.sigma == 0.0:
        return euler, None
    second = denoiser(euler, next_level)
    half = 0.5 * (next_level.sigma_hat - level.sigma_hat)
    return next_level.alpha * (first.x0 + (level.sigma_hat + half) * first.eps + half * second.eps), None
