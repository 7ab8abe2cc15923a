"""Euler a: Euler's method down the ancestral split. With eta 1 and the same levels it is DDIM with eta 1, and DDPM."""

from __future__ import annotations

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.samplers.split import noised, split
from latentdiff.diffusion.schedule import Level


def step(
    denoiser: Denoiser,
    x: Tensor,
    level: Level,
    next_level: Level,
    state: None,
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> tuple[Tensor, None]:
    """x_s / alpha_s = x0 + down eps + s_noise up z, where down and up split sigma_hat_s."""
    prediction = denoiser(x, level)
    down, up = split(level.sigma_hat, next_level.sigma_hat, eta)
    return noised(prediction.x0 + down * prediction.eps, up, next_level, noise, s_noise), None
