"""What is to be restored, seen from the latent space, and how well latents explain the measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.errors import UsageError
from latentdiff.tasks.restoration.operators import Operator, residual
from latentdiff.tasks.restoration.operators.operator import per_image_norm

# The least noise that methods reckon with, as in the code of DiffPIR: none at all would leave nothing to the model.
LEAST_NOISE = 1e-3

# What the pull towards the measurement is solved for lies in here; see `within_noise`.
WEAKEST, STRONGEST, BISECTIONS = 1e4, 1e-6, 14
NEAR_ENOUGH = 0.99  # of the noise


@dataclass(frozen=True)
class Autoencoder:
    """The way between images and what the denoiser sees, as differentiable functions of batches."""

    encode: Callable[[Tensor], Tensor]  # (N, 3, H, W) -> (N, C, h, w)
    decode: Callable[[Tensor], Tensor]  # (N, C, h, w) -> (N, 3, H, W)


# For denoisers that see images themselves.
PIXELS = Autoencoder(encode=lambda x: x, decode=lambda z: z)


@dataclass(frozen=True)
class InverseProblem:
    """Find x = D(z) with y = A x + n.

    Attributes:
        operator: A, and the size of n.
        measurement: y, (N, c, h, w): one for each image of the batch.
        autoencoder: D and E.
    """

    operator: Operator
    measurement: Tensor
    autoencoder: Autoencoder = PIXELS

    @property
    def noise_std(self) -> float:
        """The noise that methods reckon with."""
        return max(self.operator.noise_std, LEAST_NOISE)

    def misfit(self, image: Tensor) -> Tensor:
        """|y - A x| of images (N, 3, H, W), not squared, each image's own, (N,); differentiable."""
        return per_image_norm(self.measurement - self.operator.apply(image))

    def residual(self, image: Tensor) -> Tensor:
        """The root mean square of y - A x, to be compared with the noise level, (N,)."""
        return residual(self.operator, self.measurement, image)

    def first_guess(self) -> Tensor:
        """The best linear estimate of an image (N, 3, H, W) whose pixels have mean 0 and standard deviation 1/2
        each."""
        operator, y = self.operator, self.measurement
        grey = y.new_zeros(y.shape[0], *operator.image_shape(tuple(y.shape[1:])))
        return operator.prox(y, grey, 4.0 * self.noise_std**2)

    def moved(self, latents: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The latents (N, C, h, w) of an image that was changed, (N, 3, H, W) each.

        Only the change goes through the encoder, z + E(after) - E(before), so that what encoder and decoder lose does
        not add up over the steps.
        """
        pairs = map(self.autoencoder.encode, torch.stack([after, before], dim=1))  # (2, C, h, w) each
        return latents + torch.cat([pair[:1] - pair[1:] for pair in pairs])


class RestorationMethod(Protocol):
    """A way to restore: where to begin, along which levels to walk, and one step of the denoise loop."""

    def levels(self, schedule: Schedule, steps: int) -> list[Level]:
        """The `steps + 1` levels of the walk."""

    def start(self, problem: InverseProblem, noise: Noise) -> Tensor:
        """The latents (N, C, h, w) at the first level."""

    def step(self, problem: InverseProblem, levels: list[Level]) -> Step:
        """The step for `denoise`."""


@dataclass(frozen=True, kw_only=True)
class SamplingMethod:
    """What methods share that draw a sample: from pure noise along the model's own levels."""

    def levels(self, schedule: Schedule, steps: int) -> list[Level]:
        """The model's levels."""
        return schedule.levels(steps)

    def start(self, problem: InverseProblem, noise: Noise) -> Tensor:
        """Pure noise."""
        return noise()


def at_least_zero(**values: float) -> None:
    """Refuse settings that are negative or not a number.

    Raises:
        UsageError: one is.
    """
    for name, value in values.items():
        if not value >= 0.0:
            raise UsageError(f"expected {name} of 0 or more, found {value}")


def within_noise(operator: Operator, y: Tensor, x: Tensor, noise_std: float) -> Tensor:
    """The image nearest to x, (N, 3, H, W), that misses the measurement by no more than its noise does.

    This is the discrepancy principle (Morozov 1966): the pull of the proximal map is chosen, for each image, so that
    the root mean square of y - A x becomes `noise_std`. Images that explain the measurement that well already stay as
    they are. Where the operator copies pixels that were measured without noise, they are put back exactly, and what
    they change is carried on to missing ones (`Operator.completed`). Costs at most 15 proximal maps an image.
    """
    if operator.noise_std == 0.0 and operator.copies_pixels:
        return x + operator.completed(operator.project(y, x) - x)
    return torch.cat([_within_noise(operator, *pair, noise_std) for pair in zip(y.split(1), x.split(1), strict=True)])


def _within_noise(operator: Operator, y: Tensor, x: Tensor, noise_std: float) -> Tensor:
    if residual(operator, y, x).item() <= noise_std:
        return x
    low, high, best = STRONGEST, WEAKEST, None  # residual(low) <= noise_std, if anything is
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        candidate = operator.prox(y, x, middle)
        missed = residual(operator, y, candidate).item()
        if missed <= noise_std:
            low, best = middle, candidate
            if missed >= NEAR_ENOUGH * noise_std:
                break
        else:
            high = middle
    return operator.prox(y, x, low) if best is None else best
