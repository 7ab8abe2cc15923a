"""DDIM (Song et al. 2021): from the predicted x0 straight to the next level, with as much fresh noise as eta says."""

from __future__ import annotations

import math

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import Level, posterior_variance


def step(
    denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise, *, eta: float = 0.0
) -> tuple[Tensor, None]:
    """Eq. 12 of the paper: x_s = alpha_s x0 + sqrt(sigma_s² - std²) eps + std z, where std² is eta² of the posterior
    variance.

    eta 0 is deterministic and goes up as well as down in noise: inversion is this step over the reversed levels.
    eta 1 is DDPM.
    """
    prediction = denoiser(x, level)
    std = eta * math.sqrt(posterior_variance(level, next_level)) if eta else 0.0
    direction = math.sqrt(max(next_level.sigma**2 - std**2, 0.0))  # rounding can take the difference below 0 at eta 1
    x = next_level.alpha * prediction.x0 + direction * prediction.eps
    return (x + std * noise() if std else x), None
