"""Blur kernels. All sum to 1, so that a plain image stays what it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentdiff.errors import UsageError
from latentdiff.request.domains import Real
from latentdiff.request.task_options import MOTION, check_blur

# How many points the path of a moving camera is drawn with, for each pixel of its length.
POINTS_PER_PIXEL = 32


def gaussian_blur(std: float) -> Tensor:
    """The kernel (k, k) of Gaussian blur with that standard deviation in pixels, cut at 4 of them.

    Raises:
        UsageError: the standard deviation is not a number above 0 up to 128.
    """
    std = check_blur(std)
    line = gaussian_kernel(std, size=2 * math.ceil(4 * std) + 1)
    return torch.outer(line, line)


def motion_blur(length: float, angle: float = 0.0) -> Tensor:
    """The kernel (k, k) of a camera that moves `length` pixels straight on, `angle` degrees anticlockwise from
    rightwards.

    Raises:
        UsageError: the length is below 1 or above 1024, or the angle is not finite.
    """
    length, angle = MOTION("the motion in pixels", length), Real()("the angle in degrees", angle)
    radius = math.ceil((length - 1.0) / 2.0)
    # The exposure is a line from the centre of the first pixel to that of the last; every point of it is shared
    # among the four pixels around it.
    path = torch.linspace(-0.5, 0.5, max(2, round(length * POINTS_PER_PIXEL)), dtype=torch.float64) * (length - 1.0)
    radians = math.radians(angle)
    rows, columns = radius - path * math.sin(radians), radius + path * math.cos(radians)
    grid = torch.arange(2 * radius + 1, dtype=torch.float64)
    down = (1.0 - (rows[:, None] - grid).abs()).clamp(min=0.0)  # (points, k)
    across = (1.0 - (columns[:, None] - grid).abs()).clamp(min=0.0)
    kernel = down.T @ across
    return kernel / kernel.sum()


def gaussian_kernel(std: float, *, size: int) -> Tensor:
    """(size,), float64."""
    position = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-0.5 * (position / std).square())
    return line / line.sum()


def box_kernel(factor: int) -> Tensor:
    """(factor,), float64."""
    return torch.full((factor,), 1.0 / factor, dtype=torch.float64)


def cubic_kernel(factor: int) -> Tensor:
    """Keys' cubic (1981, a = -1/2) stretched for an image that gets `factor` times smaller, float64.

    Of 4 factor entries, or one less where the factor is odd, so that the low pixel's centre is that of the kernel.
    """
    size = 4 * factor - factor % 2
    position = ((torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / factor).abs()
    near = 1.5 * position**3 - 2.5 * position**2 + 1.0
    far = -0.5 * position**3 + 2.5 * position**2 - 4.0 * position + 2.0
    line = torch.where(position <= 1.0, near, far)
    return line / line.sum()


def check_kernel(kernel: Tensor) -> Tensor:
    """The kernel in float64.

    Raises:
        UsageError: it is not two-dimensional, not finite, or does not sum to something positive.
    """
    kernel = torch.as_tensor(kernel).detach().to("cpu", torch.float64)
    if kernel.ndim != 2 or not kernel.numel():
        raise UsageError(f"expected a blur kernel of shape (height, width), found {tuple(kernel.shape)}")
    if not torch.isfinite(kernel).all() or kernel.sum() <= 0.0:
        raise UsageError("expected a blur kernel of finite numbers with a positive sum")
    return kernel
