"""Distributions whose exact denoiser is known, to test samplers and guidance against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.denoise import Noise, Step, denoise
from latentdiff.diffusion.parameterization import Denoiser, Prediction
from latentdiff.diffusion.schedule import Level

# The mixture of the order-of-convergence proof: two modes of different width and weight on the line.
MEANS, STDS, WEIGHTS = (-1.0, 0.6), (0.25, 0.4), (0.35, 0.65)


def exact_eps(
    x: Tensor, level: Level, means: Sequence[float], stds: Sequence[float], weights: Sequence[float]
) -> Tensor:
    """E[eps | x] for data from a mixture of Gaussians, elementwise."""
    alpha, sigma = level.alpha, level.sigma
    mean, std, weight = (torch.tensor(values, dtype=x.dtype) for values in (means, stds, weights))
    variance = (alpha * std) ** 2 + sigma**2  # (K,)
    offset = x[..., None] - alpha * mean  # (..., K)
    log_density = weight.log() - 0.5 * variance.log() - 0.5 * offset**2 / variance
    return (log_density.softmax(-1) * sigma * offset / variance).sum(-1)


def mixture(
    means: Sequence[float] = MEANS, stds: Sequence[float] = STDS, weights: Sequence[float] = WEIGHTS
) -> Denoiser:
    """The exact denoiser of a mixture of Gaussians, elementwise."""

    def denoiser(x: Tensor, level: Level) -> Prediction:
        eps = exact_eps(x, level, means, stds, weights)
        return Prediction(x0=(x - level.sigma * eps) / level.alpha, eps=eps, raw=eps)

    return denoiser


def gaussian(mean: float, std: float) -> Denoiser:
    """The exact denoiser of N(mean, std²); valid at every level, also without signal or without noise."""

    def denoiser(x: Tensor, level: Level) -> Prediction:
        offset = x - level.alpha * mean
        variance = (level.alpha * std) ** 2 + level.sigma**2
        eps = level.sigma * offset / variance
        return Prediction(x0=mean + level.alpha * std**2 * offset / variance, eps=eps, raw=eps)

    return denoiser


def gaussian_flow(x: Tensor, level: Level, next_level: Level, mean: float, std: float) -> Tensor:
    """Where the probability-flow ODE of N(mean, std²) takes x: the affine map between the two marginals."""
    spread = [math.sqrt((at.alpha * std) ** 2 + at.sigma**2) for at in (level, next_level)]
    return next_level.alpha * mean + spread[1] / spread[0] * (x - level.alpha * mean)


def flow(denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, steps: int = 1000) -> Tensor:
    """The probability-flow ODE solved to about 1e-10 by the classical Runge-Kutta method, d(x / alpha) / d sigma_hat =
    eps."""

    def slope(y: Tensor, log_snr: float) -> Tensor:
        at = from_log_snr(log_snr)
        return -at.sigma_hat * denoiser(y * at.alpha, at).eps

    y, log_snr = x / level.alpha, level.log_snr
    h = (next_level.log_snr - level.log_snr) / steps
    for _ in range(steps):
        k1 = slope(y, log_snr)
        k2 = slope(y + 0.5 * h * k1, log_snr + 0.5 * h)
        k3 = slope(y + 0.5 * h * k2, log_snr + 0.5 * h)
        k4 = slope(y + h * k3, log_snr + h)
        y, log_snr = y + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4), log_snr + h
    return y * next_level.alpha


def from_log_snr(log_snr: float) -> Level:
    return Level(t=0.0, alpha_cumprod=1.0 / (1.0 + math.exp(-2.0 * log_snr)))


def uniform_log_snr_levels(steps: int) -> list[Level]:
    """Levels at equal distances in log SNR over the continuous VP schedule of Song et al. 2021, t from 1 to 0.001."""

    def log_snr(t: float) -> float:
        log_alpha = -19.9 / 4.0 * t**2 - 0.05 * t
        return log_alpha - 0.5 * math.log(-math.expm1(2.0 * log_alpha))

    noisy, clean = log_snr(1.0), log_snr(1e-3)
    return [from_log_snr(noisy + (clean - noisy) * i / steps) for i in range(steps + 1)]


def sample(
    denoiser: Denoiser,
    x: Tensor,
    levels: Sequence[Level],
    step: Step,
    noise: Callable[[], Tensor] | Noise | None = None,
) -> Tensor:
    """The last latents of the denoising loop."""
    *_, last = denoise(denoiser, x, levels, step, noise=noise)
    return last.x


class FixedNoise:
    """The same noise at every step, whatever the levels."""

    def __init__(self, noise: Tensor) -> None:
        self._noise = noise

    def __call__(self) -> Tensor:
        return self._noise

    def between(self, sigma_hat: float, next_sigma_hat: float) -> Tensor:
        return self._noise


class DrawnNoise:
    """What a function draws, at every step and for every pair of levels."""

    def __init__(self, draw: Callable[[], Tensor]) -> None:
        self._draw = draw

    def __call__(self) -> Tensor:
        return self._draw()

    def between(self, sigma_hat: float, next_sigma_hat: float) -> Tensor:
        return self._draw()


class Continuous:
    """What a step that evaluates between its levels asks of a schedule, for levels that belong to no timestep."""

    config = ScheduleConfig()

    def at_sigma_hat(self, sigma_hat: float) -> Level:
        return Level(t=0.0, alpha_cumprod=1.0 / (1.0 + sigma_hat**2))


def normal_quantiles(count: int) -> Tensor:
    """A deterministic stand-in for `count` draws from N(0, 1), (count,), float64."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
