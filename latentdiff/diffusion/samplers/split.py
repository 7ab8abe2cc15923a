"""The ancestral split: a stochastic step as a longer step down without noise, and fresh noise on top."""

from __future__ import annotations

import math

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError


def split(sigma_hat: float, next_sigma_hat: float, eta: float) -> tuple[float, float]:
    """How far down to go, and the standard deviation of the noise that leads back up; the squares sum to that of
    `next_sigma_hat`.

    eta 1 adds the variance of the posterior q(x_next | x, x0) (Song et al. 2021, eq. 16, in units of sigma_hat), eta 0
    nothing.

    Raises:
        UsageError: a stochastic step that goes up in noise.
    """
    if eta and next_sigma_hat > sigma_hat:
        raise UsageError("a stochastic step must lower the noise level; use the ddim sampler with eta 0 to go up")
    share = max(1.0 - (next_sigma_hat / sigma_hat) ** 2, 0.0)
    up = next_sigma_hat * min(1.0, eta * math.sqrt(share))
    return math.sqrt(next_sigma_hat**2 - up**2), up


def noised(x: Tensor, up: float, next_level: Level, noise: Noise, s_noise: float) -> Tensor:
    """x / alpha, with noise of standard deviation `up` on top, as x at the next level; both (N, C, h, w)."""
    return next_level.alpha * (x + up * s_noise * noise() if up else x)
