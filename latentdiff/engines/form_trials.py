"""Small examples of what the fast forms compute, to try them on: about a millisecond each on one core.

Each function makes torch's form and the other one, of a size that stands for all of its kind. What decides the matter
makes a kind: for a convolution as a product that is the number of pixels, not the number of channels, since reordering
the weights and multiplying by them grow alike with the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.networks.kernels import Form, product
from latentdiff.networks.layers import FeedForward, Upsample

Pair = tuple[Form, Form]
Fast = Callable[[Any, Tensor], Tensor]


def linear(few: bool, dtype: torch.dtype) -> Pair:
    """A linear layer over few tokens or pixels, or many."""
    count, width = (96, 640) if few else (384, 320)
    x, weight = numbers(count, width, dtype=dtype), numbers(width, width, dtype=dtype)
    bias = numbers(width, dtype=dtype)
    return lambda: F.linear(x, weight, bias), lambda: product(x, weight, bias)


def pointwise(fast: Fast, dtype: torch.dtype) -> Pair:
    """A 1x1 convolution."""
    return _of_module(lambda: nn.Conv2d(320, 320, 1), fast, (2, 320, 16, 16), dtype)


def widened_linear(fast: Callable[[Tensor, Tensor, Tensor | None], Tensor], dtype: torch.dtype) -> Pair:
    """A linear layer in a format that the processor has no instructions for."""
    x, weight, bias = numbers(32, 128, dtype=dtype), numbers(128, 128, dtype=dtype), numbers(128, dtype=dtype)
    return lambda: F.linear(x, weight, bias), lambda: fast(x, weight, bias)


def widened_convolution(fast: Fast, dtype: torch.dtype) -> Pair:
    """A convolution, likewise."""
    return _of_module(lambda: nn.Conv2d(16, 16, 3, padding=1), fast, (1, 16, 8, 8), dtype)


def convolution(fast: Fast, most: int, dtype: torch.dtype) -> Pair:
    """A 3x3 convolution of a map of at most 32, 128 or 512 pixels.

    The kernels of the trial lie in a cache and are copied there, which a large kernel does not: its copy comes fresh
    from the system at every call. So the trial of a large one only makes sure that the product is no slow one.
    """
    # Many outputs: the more, the less unfolding the map counts.
    width, side = {32: (128, 4), 128: (64, 8), 512: (32, 16)}[most]
    return _of_module(lambda: nn.Conv2d(width, 640, 3, padding=1), fast, (2, width, side, side), dtype)


def upsample(fast: Fast, least: int, dtype: torch.dtype) -> Pair:
    """Doubling a map of at least 512 or 1024 pixels and convolving it.

    Of so few channels, moving the map takes a larger share of the time than in a network, and it is more of it in our
    form. In float32 that form was faster at all sizes of Stable Diffusion on all processors seen, so that the trial only
    makes sure that it is no slow one here.
    """
    width, side = {512: (128, 16), 1024: (96, 23)}[least]
    return _of_module(lambda: Upsample(width), fast, (2, width, side, side), dtype)


def feed_forward(fast: Fast, dtype: torch.dtype) -> Pair:
    """A gated feed-forward over a piece of the tokens. Wider ones gain less than this example, so it must gain more."""
    return _of_module(lambda: FeedForward(320), lambda block, x: fast(block, x[0])[None], (1, 96, 320), dtype)


def _of_module(build: Callable[[], nn.Module], fast: Fast, shape: tuple[int, ...], dtype: torch.dtype) -> Pair:
    """The plain forward of a module and a fast one; maps and kernels lie with channels last, as in the networks."""
    with torch.device("meta"):  # without the time that initialising takes
        module = build()
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                value = numbers(*parameter.shape, dtype=dtype)
                part._parameters[name] = value.contiguous(
                    memory_format=torch.channels_last if value.ndim == 4 else torch.contiguous_format
                )
    x = numbers(*shape, dtype=dtype).contiguous(memory_format=order)
    plain = type(module).forward
    return lambda: plain(module, x), lambda: fast(module, x)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers between -0.5 and 0.5, spread evenly (Weyl's sequence): quicker than random ones, and no generator
    moves."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).mul_(0.6180339887).frac_().sub_(0.5).view(shape).to(dtype)
