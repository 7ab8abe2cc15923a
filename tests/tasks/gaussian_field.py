"""A Gaussian prior over whole images, whose denoiser and posterior are known, and linear operators given as
matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser, Prediction
from latentdiff.diffusion.schedule import Level, posterior_variance
from latentdiff.tasks.restoration.operators import Operator

SHAPE = (1, 2, 3)
SIZE = math.prod(SHAPE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Matrix(Operator):
    """y = A x for flattened images; the measurement is (rows, 1, 1)."""

    def __init__(self, matrix: Tensor, *, noise_std: float = 0.0) -> None:
        super().__init__(noise_std=noise_std)
        self.matrix = matrix

    def apply(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T)[..., None, None]

    def measurement_shape(self, image):
        return (len(self.matrix), 1, 1)

    def image_shape(self, measurement):
        return SHAPE


@dataclass(frozen=True)
class Prior:
    """N(mean, covariance) over flattened images of `SHAPE`."""

    mean: Tensor  # (d,)
    covariance: Tensor  # (d, d)

    def gain(self, level: Level) -> Tensor:
        """E[x0 | x] = mean + gain (x - alpha mean)."""
        marginal = level.alpha_cumprod * self.covariance + level.sigma**2 * torch.eye(SIZE, dtype=torch.float64)
        return level.alpha * self.covariance @ torch.linalg.inv(marginal)

    def uncertainty(self, level: Level) -> Tensor:
        """Cov[x0 | x]."""
        return self.covariance - level.alpha * self.gain(level) @ self.covariance

    def denoiser(self) -> Denoiser:
        def denoise(x: Tensor, level: Level) -> Prediction:
            offset = x.flatten(1) - level.alpha * self.mean
            x0 = (self.mean + offset @ self.gain(level).T).view_as(x)
            eps = (x - level.alpha * x0) / level.sigma
            return Prediction(x0, eps, eps)

        return denoise

    def posterior(self, operator: Matrix, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance given the measurement y (1, rows, 1, 1)."""
        return conditioned(self.mean, self.covariance, operator, y.flatten())


def conditioned(mean: Tensor, covariance: Tensor, operator: Matrix, y: Tensor) -> tuple[Tensor, Tensor]:
    """N(mean, covariance) given y = A x + n; means (..., d)."""
    matrix = operator.matrix
    joint = matrix @ covariance @ matrix.T + operator.noise_std**2 * torch.eye(len(matrix), dtype=torch.float64)
    gain = covariance @ matrix.T @ torch.linalg.inv(joint)
    return mean + (y - mean @ matrix.T) @ gain.T, covariance - gain @ matrix @ covariance


def exact_posterior_step(prior: Prior, operator: Matrix, y: Tensor) -> Step:
    """A step that draws from p(x_next | x, y): PiGDM (Song et al. 2023) with the exact covariance and the optimal
    variance."""

    def step(
        denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        prediction = denoiser(x, level)
        x0, spread = conditioned(prediction.x0.flatten(1), prior.uncertainty(level), operator, y.flatten())
        kept = level.alpha_cumprod / next_level.alpha_cumprod
        to_x0 = next_level.alpha * (1.0 - kept) / level.sigma**2
        to_x = math.sqrt(kept) * next_level.sigma**2 / level.sigma**2
        covariance = posterior_variance(level, next_level) * torch.eye(SIZE, dtype=torch.float64) + to_x0**2 * spread
        drawn = noise().flatten(1) @ torch.linalg.cholesky(covariance).T
        return (to_x0 * x0 + to_x * x.flatten(1) + drawn).view_as(x), None

    return step


def example(rows: int = 3, noise_std: float = 0.3) -> tuple[Prior, Matrix, Tensor]:
    """A prior, an operator and a measurement (1, rows, 1, 1)."""
    root = normal(SIZE, SIZE, seed=1) / math.sqrt(SIZE)
    prior = Prior(0.3 * normal(SIZE, seed=2), 0.5 * root @ root.T + 0.05 * torch.eye(SIZE, dtype=torch.float64))
    operator = Matrix(normal(rows, SIZE, seed=3) / math.sqrt(SIZE), noise_std=noise_std)
    truth = prior.mean + normal(1, SIZE, seed=4) @ torch.linalg.cholesky(prior.covariance).T
    y = truth @ operator.matrix.T + noise_std * normal(1, rows, seed=5)
    return prior, operator, y[..., None, None]


def assert_same_distribution(samples: Tensor, mean: Tensor, covariance: Tensor, errors: float = 4.5) -> None:
    """Sample mean and covariance of (N, d) lie within some standard errors of what they should be."""
    count = len(samples)
    found = samples.mean(dim=0)
    deviation = covariance.diagonal().sqrt()
    assert ((found - mean).abs() < errors * deviation / math.sqrt(count)).all()
    spread = torch.cov(samples.T)
    scale = ((deviation[:, None] * deviation) ** 2 + covariance**2).sqrt() / math.sqrt(count)
    assert ((spread - covariance).abs() < errors * scale).all()
