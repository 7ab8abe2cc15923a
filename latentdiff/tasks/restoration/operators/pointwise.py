"""Operators that look at one pixel at a time: noise alone, missing pixels, lost colour. All have closed forms."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.errors import UsageError
from latentdiff.tasks.masks import pulled_and_pushed
from latentdiff.tasks.restoration.operators.operator import Operator, Shape

# The share of red, green and blue in the luminance (ITU-R BT.601), as Pillow and the reference methods have it.
LUMINANCE = (0.299, 0.587, 0.114)


class Denoise(Operator):
    """y = x + n."""

    copies_pixels = True

    def apply(self, x: Tensor) -> Tensor:
        """See the class."""
        return x

    def measurement_shape(self, image: Shape) -> Shape:
        """The same."""
        return image

    def image_shape(self, measurement: Shape) -> Shape:
        """The same."""
        return measurement

    def adjoint(self, y: Tensor) -> Tensor:
        """y."""
        return y

    def pinv(self, y: Tensor) -> Tensor:
        """y."""
        return y

    def prox(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        """(y + rho z) / (1 + rho)."""
        return (y + rho * z) / (1.0 + rho)


class Inpaint(Operator):
    """y = M x + M n: pixels are missing, at known places.

    A measurement has the size of the image and 0 where nothing is known.

    Args:
        missing: (H, W), more than 0.5 where the pixel is missing.

    Raises:
        UsageError: the mask is not of two dimensions.
    """

    copies_pixels = True

    def __init__(self, missing: Tensor, *, noise_std: float = 0.0) -> None:
        super().__init__(noise_std=noise_std)
        if missing.ndim != 2:
            raise UsageError(f"expected a mask of shape (H, W), found {tuple(missing.shape)}")
        self.known = missing.detach().float() <= 0.5  # (H, W)

    def apply(self, x: Tensor) -> Tensor:
        """M x."""
        return x * self.known.to(x)

    def measurement_shape(self, image: Shape) -> Shape:
        """The same, if the mask has that size."""
        if tuple(image[1:]) != tuple(self.known.shape):
            height, width = self.known.shape
            raise UsageError(
                f"expected an image of the mask's {width}x{height} pixels, found {image[2]}x{image[1]}"
            )
        return image

    def image_shape(self, measurement: Shape) -> Shape:
        """The same."""
        return self.measurement_shape(measurement)

    def adjoint(self, y: Tensor) -> Tensor:
        """M y."""
        return self.apply(y)

    def pinv(self, y: Tensor) -> Tensor:
        """M y: black out what is not known (to mid-grey, 0)."""
        return self.apply(y)

    def prox(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        """(M y + rho z) / (M + rho)."""
        known = self.known.to(z)
        return (known * y + rho * z) / (known + rho)

    def completed(self, change: Tensor) -> Tensor:
        """Missing pixels take on the smooth mean of the known ones around them."""
        known = self.known.to(change)[None, None]
        return pulled_and_pushed(change * known, known) if known.any() else change

    def read(self, damaged: Tensor) -> Tensor:
        """The known pixels.

        Raises:
            UsageError: the mask has another size.
        """
        self.image_shape(tuple(damaged.shape[1:]))
        return self.apply(damaged)

    def observed(self, image: Shape) -> Tensor:
        """M."""
        return self.known.float().expand(self.measurement_shape(image))


class Colourise(Operator):
    """y = 0.299 red + 0.587 green + 0.114 blue + n: a grey image (N, 1, H, W) of a coloured one."""

    def apply(self, x: Tensor) -> Tensor:
        """See the class."""
        return (self._weights(x) * x).sum(dim=1, keepdim=True)

    def measurement_shape(self, image: Shape) -> Shape:
        """One channel of the same size."""
        if image[0] != len(LUMINANCE):
            raise UsageError(f"expected an image of 3 channels to take the luminance of, found {image[0]}")
        return (1, *image[1:])

    def image_shape(self, measurement: Shape) -> Shape:
        """Three channels of the same size."""
        if measurement[0] != 1:
            raise UsageError(f"expected a grey measurement of one channel, found {measurement[0]}")
        return (len(LUMINANCE), *measurement[1:])

    def adjoint(self, y: Tensor) -> Tensor:
        """The luminance, handed back to the channels by their shares."""
        return self._weights(y) * y

    def pinv(self, y: Tensor) -> Tensor:
        """The adjoint over the sum of the squared shares."""
        return self.adjoint(y) / _SQUARES

    def prox(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        """z + Aᵀ (y - A z) / (A Aᵀ + rho)."""
        return z + self.adjoint(y - self.apply(z)) / (_SQUARES + rho)

    def read(self, damaged: Tensor) -> Tensor:
        """The luminance of a grey image that is stored as a coloured one."""
        return self.apply(damaged)

    @staticmethod
    def _weights(like: Tensor) -> Tensor:
        return torch.tensor(LUMINANCE, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)


_SQUARES = sum(share**2 for share in LUMINANCE)
