"""Small examples of what the fast forms compute, to try them on: about a millisecond each on one core.

Each function gives the name under which a choice is remembered, and what makes torch's form and the other one. Sizes
are sorted into a few kinds by what decides the matter: for a convolution as a product that is the number of pixels, not
the number of channels, since reordering the weights and multiplying by them grow alike with the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.networks.kernels.choice import NEEDED, Trial
from latentdiff.networks.kernels.onednn import product
from latentdiff.networks.layers.resnet import Upsample
from latentdiff.networks.layers.transformer import FeedForward

Named = tuple[str, Trial] | tuple[str, Trial, float]  # the last as `needed` of `takes_fast_form`
Fast = Callable[[Any, Tensor], Tensor]

FEW_ROWS = 256
SMALL_MAPS = (32, 128, 512)  # pixels of a batch
LARGE_MAPS = (1024, 512)
LARGE_KERNEL = 2**23  # bytes
LARGE_KERNEL_NEEDED = {32: 0.6, 128: 0.6, 512: 0.75}
FEED_FORWARD_NEEDED = 1.2
UPSAMPLING_NEEDED = {torch.float32: 0.5, torch.bfloat16: 1.0}


def linear(rows: int, dtype: torch.dtype) -> Named:
    """A linear layer over `rows` tokens or pixels."""
    few = rows <= FEW_ROWS
    count, width = (96, 640) if few else (384, 320)

    def trial() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        x, weight, bias = (
            numbers(count, width, dtype=dtype),
            numbers(width, width, dtype=dtype),
            numbers(width, dtype=dtype),
        )
        return lambda: F.linear(x, weight, bias), lambda: product(x, weight, bias)

    return f"linear {_short(dtype)} {'few' if few else 'many'} rows", trial


def pointwise(fast: Fast, dtype: torch.dtype) -> Named:
    """A 1x1 convolution."""
    name = f"1x1 convolution {_short(dtype)}"
    return name, _of_module(lambda: nn.Conv2d(320, 320, 1), fast, (2, 320, 16, 16), dtype)


def widened_linear(fast: Callable[[Tensor, Tensor, Tensor | None], Tensor], dtype: torch.dtype) -> Named:
    """A linear layer in a format that the processor has no instructions for."""

    def trial() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        x, weight, bias = numbers(32, 128, dtype=dtype), numbers(128, 128, dtype=dtype), numbers(128, dtype=dtype)
        return lambda: F.linear(x, weight, bias), lambda: fast(x, weight, bias)

    return f"widened linear {_short(dtype)}", trial


def widened_convolution(fast: Fast, dtype: torch.dtype) -> Named:
    """A convolution, likewise."""
    trial = _of_module(lambda: nn.Conv2d(16, 16, 3, padding=1), fast, (1, 16, 8, 8), dtype)
    return f"widened convolution {_short(dtype)}", trial


def convolution(fast: Fast, pixels: int, weight: Tensor) -> Named:
    """A 3x3 convolution of a small map.

    The kernels of the trial lie in a cache and are copied there, which a large kernel does not: its copy comes fresh
    from the system at every call. So the trial of a large one only makes sure that the product is no slow one.
    """
    most = next(most for most in SMALL_MAPS if pixels <= most)
    is_large = weight.numel() * weight.element_size() >= LARGE_KERNEL
    # Many outputs: the more, the less unfolding the map counts.
    width, side = {32: (128, 4), 128: (64, 8), 512: (32, 16)}[most]
    name = f"3x3 convolution {_short(weight.dtype)} up to {most} pixels{', large kernel' if is_large else ''}"
    trial = _of_module(lambda: nn.Conv2d(width, 640, 3, padding=1), fast, (2, width, side, side), weight.dtype)
    return name, trial, LARGE_KERNEL_NEEDED[most] if is_large else NEEDED


def upsample(fast: Fast, pixels: int, dtype: torch.dtype) -> Named:
    """Doubling a map of at least 512 pixels and convolving it.

    Of so few channels, moving the map takes a larger share of the time than in a network, and it is more of it in our
    form. In float32 that form was faster at all sizes of Stable Diffusion on all processors seen, so that the trial only
    makes sure that it is no slow one here.
    """
    least = next(least for least in LARGE_MAPS if pixels >= least)
    width, side = {512: (128, 16), 1024: (96, 23)}[least]
    name = f"upsampling {_short(dtype)} from {least} pixels"
    trial = _of_module(lambda: Upsample(width), fast, (2, width, side, side), dtype)
    return name, trial, UPSAMPLING_NEEDED[dtype]


def feed_forward(fast: Fast, dtype: torch.dtype) -> Named:
    """A gated feed-forward over a piece of the tokens. Wider ones gain less than this example, so it must gain more."""
    trial = _of_module(lambda: FeedForward(320), lambda block, x: fast(block, x[0])[None], (1, 96, 320), dtype)
    return f"feed-forward {_short(dtype)}", trial, FEED_FORWARD_NEEDED


def _of_module(build: Callable[[], nn.Module], fast: Fast, shape: tuple[int, ...], dtype: torch.dtype) -> Trial:
    """The plain forward of a module and a fast one; maps and kernels lie with channels last, as in the networks."""

    def trial() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
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

    return trial


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers between -0.5 and 0.5, spread evenly (Weyl's sequence): quicker than random ones, and no generator
    moves."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).mul_(0.6180339887).frac_().sub_(0.5).view(shape).to(dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
