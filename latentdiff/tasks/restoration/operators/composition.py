"""Operators made of others: one after the other, on a part of the image, or a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import UsageError
from latentdiff.tasks.restoration.operators.operator import Operator, Shape, conjugate_gradient, per_image_norm

GAUSS_NEWTON_STEPS = 10
HALVINGS = 12


class Composition(Operator):
    """y = A_k … A_2 A_1 x + n: blur, then loss of resolution, say. The proximal map is found by conjugate gradients.

    Args:
        operators: in the order in which they happen to the image.

    Raises:
        UsageError: none given, or one that is not linear.
    """

    def __init__(self, *operators: Operator, noise_std: float = 0.0) -> None:
        super().__init__(noise_std=noise_std)
        if not operators:
            raise UsageError("expected at least one operator to compose, found none")
        if any(isinstance(operator, Nonlinear) for operator in operators):
            raise UsageError("expected linear operators to compose; write the whole as one function for Nonlinear")
        self.operators = operators
        self.border = next((operator.border for operator in operators if operator.border), None)

    def apply(self, x: Tensor) -> Tensor:
        """See the class."""
        for operator in self.operators:
            x = operator.apply(x)
        return x

    def measurement_shape(self, image: Shape) -> Shape:
        """What is left at the end."""
        for operator in self.operators:
            image = operator.measurement_shape(image)
        return image

    def image_shape(self, measurement: Shape) -> Shape:
        """What there was at the beginning."""
        for operator in reversed(self.operators):
            measurement = operator.image_shape(measurement)
        return measurement

    def adjoint(self, y: Tensor) -> Tensor:
        """A_1ᵀ A_2ᵀ … y."""
        for operator in reversed(self.operators):
            y = operator.adjoint(y)
        return y

    def read(self, damaged: Tensor) -> Tensor:
        """As the last operator reads it."""
        return self.operators[-1].read(damaged)

    def observed(self, image: Shape) -> Tensor:
        """What the last operator lets through."""
        for operator in self.operators[:-1]:
            image = operator.measurement_shape(image)
        return self.operators[-1].observed(image)


class Inside(Operator):
    """An operator that acts on the upper left part of a larger image, of whose rest nothing is known.

    This is how an image is restored whose sides the VAE cannot make: its proximal map is that of the operator on the
    part, and leaves the rest alone.

    Args:
        operator: what happened to the part.
        part: (height, width) of the part.
        whole: (height, width) of the image.
    """

    def __init__(self, operator: Operator, part: tuple[int, int], whole: tuple[int, int]) -> None:
        super().__init__(noise_std=operator.noise_std)
        if part[0] > whole[0] or part[1] > whole[1]:
            raise UsageError(f"expected a part within {whole[1]}x{whole[0]} pixels, found {part[1]}x{part[0]}")
        self.operator, self.part, self.whole = operator, part, whole
        self.border, self.copies_pixels = operator.border, operator.copies_pixels

    def crop(self, x: Tensor) -> Tensor:
        """The part (N, C, *part) of images (N, C, *whole)."""
        return x[..., : self.part[0], : self.part[1]]

    def apply(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.operator.apply(self.crop(x))

    def measurement_shape(self, image: Shape) -> Shape:
        """What the operator gives for the part."""
        if tuple(image[1:]) != self.whole:
            raise UsageError(
                f"expected an image of {self.whole[1]}x{self.whole[0]} pixels, found {image[2]}x{image[1]}"
            )
        return self.operator.measurement_shape((image[0], *self.part))

    def image_shape(self, measurement: Shape) -> Shape:
        """The whole."""
        return (self.operator.image_shape(measurement)[0], *self.whole)

    def adjoint(self, y: Tensor) -> Tensor:
        """The adjoint on the part, 0 beside it."""
        return self._embed(self.operator.adjoint(y))

    def pinv(self, y: Tensor) -> Tensor:
        """The pseudo-inverse on the part, 0 beside it."""
        return self._embed(self.operator.pinv(y))

    def prox(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        """The proximal map on the part, z beside it."""
        part = self.crop(z)
        return z + self._embed(self.operator.prox(y, part, rho) - part)

    def completed(self, change: Tensor) -> Tensor:
        """As the operator does on the part; beside it nothing changes."""
        return self._embed(self.operator.completed(self.crop(change)))

    def read(self, damaged: Tensor) -> Tensor:
        """As the operator reads it."""
        return self.operator.read(damaged)

    def observed(self, image: Shape) -> Tensor:
        """What the operator observes of the part."""
        return self.operator.observed((image[0], *self.part))

    def _embed(self, part: Tensor) -> Tensor:
        rows, columns = self.whole[0] - self.part[0], self.whole[1] - self.part[1]
        return F.pad(part, (0, columns, 0, rows))


class Function(Operator):
    """A linear function of the user's own: the adjoint by autograd, pseudo-inverse and proximal map by conjugate
    gradients.

    Args:
        function: images (N, 3, H, W) -> measurements (N, c, h, w), differentiable, each image of the batch on its
            own.
        image: (3, H, W), the shape of the images that it takes.

    Raises:
        UsageError: the function does not take such images, gives something else than a batch of measurements, or is
            not linear (see `Nonlinear`).
    """

    linear = True

    def __init__(self, function: Callable[[Tensor], Tensor], image: Shape, *, noise_std: float = 0.0) -> None:
        super().__init__(noise_std=noise_std)
        self.function, self.image = function, tuple(image)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(2, *self.image, generator=generator, dtype=torch.float32)
        found = self._probe(probe)
        self.measurement = tuple(found.shape[1:])
        if self.linear:
            self._check_linear(probe, found)

    def apply(self, x: Tensor) -> Tensor:
        """The function."""
        return self.function(x)

    def measurement_shape(self, image: Shape) -> Shape:
        """What the function gave for an image of its shape."""
        if tuple(image) != self.image:
            raise UsageError(f"expected an image of the function's shape {self.image}, found {tuple(image)}")
        return self.measurement

    def image_shape(self, measurement: Shape) -> Shape:
        """The shape that the function was given with."""
        if tuple(measurement) != self.measurement:
            raise UsageError(
                f"expected a measurement of the function's shape {self.measurement}, found {tuple(measurement)}"
            )
        return self.image

    def _probe(self, x: Tensor) -> Tensor:
        try:
            y = self.function(x.requires_grad_())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UsageError(
                f"the operator's function does not take images of shape {self.image}: {error}"
            ) from error
        if not isinstance(y, Tensor) or y.ndim != 4 or y.shape[0] != x.shape[0]:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise UsageError(f"expected the operator's function to give a batch of (N, c, h, w), found {found}")
        if not y.requires_grad:
            raise UsageError("expected a differentiable function of torch operations, found one that cuts the gradient")
        return y.detach()

    def _check_linear(self, x: Tensor, y: Tensor) -> None:
        x = x.detach()
        doubled = self.function(torch.cat([2.0 * x, x[:1] + x[1:]])).detach()
        expected = torch.cat([2.0 * y, y[:1] + y[1:]])
        if not torch.allclose(doubled, expected, rtol=1e-3, atol=1e-3 * y.abs().max().item()):
            raise UsageError("the operator's function is not linear; give it to Nonlinear instead of Function")


class Nonlinear(Function):
    """A function of the user's own that is not linear: clipping, gamma, JPEG made smooth.

    The proximal map is found by damped Gauss-Newton steps, image by image, from z; there may be several minima.
    `adjoint` is the transpose of the derivative at 0, and `pinv` is `prox` with next to no pull towards 0.
    """

    linear = False

    def pinv(self, y: Tensor) -> Tensor:
        """An image (N, 3, H, W) whose measurement comes near to y."""
        return self.prox(y, y.new_zeros(y.shape[0], *self.image), 1e-6)

    def prox(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        """See the class; never worse than z itself."""
        with torch.enable_grad():
            return torch.cat(
                [self._prox_of_one(*pair, rho) for pair in zip(y.split(1), z.detach().split(1), strict=True)]
            )

    def _prox_of_one(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        def cost(x: Tensor) -> float:
            with torch.no_grad():
                return (per_image_norm(y - self.apply(x)).square() + rho * per_image_norm(x - z).square()).item()

        x, best = z, cost(z)
        for _ in range(GAUSS_NEWTON_STEPS):
            value, pull = torch.func.vjp(self.apply, x)

            def curvature(v: Tensor, x: Tensor = x, pull: Callable = pull) -> Tensor:
                return pull(torch.func.jvp(self.apply, (x,), (v,))[1])[0] + rho * v

            right = (pull(y - value)[0] + rho * (z - x)).detach()
            step = conjugate_gradient(lambda v, c=curvature: c(v).detach(), right, torch.zeros_like(x))
            for halving in range(HALVINGS):
                candidate = x + 0.5**halving * step
                if (found := cost(candidate)) < best:
                    break
            else:
                return x
            gain, best, x = best - found, found, candidate
            if gain <= 1e-12 * best:
                break
        return x
