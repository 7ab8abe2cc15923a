"""What a degradation is: y = A x + n, with an image x, a measurement y and noise n of known size.

Images are (N, 3, H, W) in [-1, 1]. The noise level is a standard deviation in that range: 0.1 is 12.75 of 255 grey
levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Self

import torch
from torch import Tensor

from latentdiff.errors import UsageError

Shape = tuple[int, int, int]  # (channels, height, width) of one image or measurement

# Conjugate gradients end here: relative residual, and steps. The systems are (AᵀA + rho I), and rho bounds their
# condition.
TOLERANCE = {torch.float32: 5e-4, torch.float64: 1e-12}
MAX_ITERATIONS = 100


class Operator(ABC):
    """A linear map A from images to measurements, with what restoration needs of it.

    A member says how it maps (`apply`) and between which shapes. Adjoint, pseudo-inverse and proximal map then follow
    by autograd and conjugate gradients; members with a closed form replace them.

    Attributes:
        noise_std: standard deviation of the noise n, in [-1, 1] units; 0 is an exact measurement.
        border: what lies beyond the border of the image: "periodic", "reflect", or None where no neighbours are
            touched.
        copies_pixels: whether measurements are pixels of the image themselves, so that they can be put back.
    """

    border: str | None = None
    copies_pixels: bool = False

    def __init__(self, *, noise_std: float = 0.0) -> None:
        if not 0.0 <= noise_std < float("inf"):
            raise UsageError(f"expected a noise level of 0 or more, found {noise_std}")
        self.noise_std = float(noise_std)

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x: images (N, 3, H, W) -> measurements (N, c, h, w), differentiable in x."""

    @abstractmethod
    def measurement_shape(self, image: Shape) -> Shape:
        """The shape of a measurement of one image.

        Raises:
            UsageError: the operator does not fit an image of that shape.
        """

    @abstractmethod
    def image_shape(self, measurement: Shape) -> Shape:
        """The shape of the image that one measurement is of.

        Raises:
            UsageError: the operator does not give measurements of that shape.
        """

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y: (N, c, h, w) -> (N, 3, H, W), with <A x, y> = <x, Aᵀ y> exactly."""
        zero = y.new_zeros(y.shape[0], *self.image_shape(y.shape[1:]))
        _, pull = torch.func.vjp(self.apply, zero)
        return pull(y)[0].detach()

    def pinv(self, y: Tensor) -> Tensor:
        """A⁺ y: the shortest of all images (N, 3, H, W) whose measurements come nearest to y."""
        start = y.new_zeros(y.shape[0], *self.image_shape(y.shape[1:]))
        return conjugate_gradient(
            lambda x: self.adjoint(self.apply(x)), self.adjoint(y), start, iterations=10 * MAX_ITERATIONS
        )

    def project(self, y: Tensor, z: Tensor) -> Tensor:
        """The image nearest to z among those whose measurements come nearest to y: z + A⁺ (y - A z)."""
        return z + self.pinv(y - self.apply(z))

    def prox(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        """The minimum over x of |y - A x|² + rho |x - z|²; y (N, c, h, w), z and x (N, 3, H, W), rho > 0."""
        right = self.adjoint(y) + rho * z
        return conjugate_gradient(lambda x: self.adjoint(self.apply(x)) + rho * x, right, z)

    def completed(self, change: Tensor) -> Tensor:
        """What the measurement changed in images (N, 3, H, W), carried on to where it says nothing.

        Where an image is wrong, it is wrong in the neighbourhood as well. Most operators see all of it and leave the
        change as it is.
        """
        return change

    def observed(self, image: Shape) -> Tensor:
        """Which entries of a measurement say something, (c, h, w) of 1 and 0; all of them, unless a mask hides some."""
        return torch.ones(self.measurement_shape(image), dtype=torch.float32)

    def read(self, damaged: Tensor) -> Tensor:
        """The measurement (N, c, h, w) that damaged images (N, 3, h, w) hold; for most operators they are the
        measurement."""
        return damaged

    def with_noise(self, noise_std: float) -> Self:
        """The same operator with another noise level."""
        other = copy(self)
        Operator.__init__(other, noise_std=noise_std)
        return other


def residual(operator: Operator, y: Tensor, x: Tensor) -> Tensor:
    """How far images x miss the measurements y: the root mean square of y - A x over what was observed, (N,)."""
    count = operator.observed(tuple(x.shape[1:])).sum().clamp(min=1.0).item()
    return (per_image_norm(y - operator.apply(x)).square() / count).sqrt()


def per_image_norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each image of a batch, (N,)."""
    return x.flatten(1).norm(dim=1)


def conjugate_gradient(
    matrix: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    *,
    iterations: int = MAX_ITERATIONS,
    allowed: float = 0.0,
    precondition: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Solve `matrix(x) = right` for a symmetric positive (semi)definite matrix (Hestenes & Stiefel 1952); all (N, C, H,
    W).

    Every image of the batch is its own system: the others change nothing for it.

    Args:
        allowed: what may be missing at the end, root mean square, where that is more than the tolerance.
        precondition: x -> about the solution for the right side x, symmetric and positive definite as well.
    """
    tiny = torch.finfo(right.dtype).tiny

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(1, 2, 3), keepdim=True)  # (N, 1, 1, 1)

    x, missing = start, right - matrix(start)
    enough = (TOLERANCE[right.dtype] ** 2 * inner(right, right)).clamp(min=allowed**2 * right[0].numel())
    better = precondition(missing)
    direction, size = better, inner(missing, better)
    for _ in range(iterations):
        active = inner(missing, missing) > enough
        if not active.any():
            break
        image = matrix(direction)
        length = torch.where(active, size / inner(direction, image).clamp(min=tiny), 0.0)
        x = x + length * direction
        missing = missing - length * image
        better = precondition(missing)
        new_size = inner(missing, better)
        direction = better + new_size / size.clamp(min=tiny) * direction
        size = new_size
    return x
