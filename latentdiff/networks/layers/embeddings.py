"""Embeddings of the timestep, and of what is added to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal_embedding(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5), cosines first as in Stable
    Diffusion.

    Args:
        t: timesteps (N,), whole or fractional.
        channels: width of the embedding, even.
        max_period: 2π times the longest wavelength.

    Returns:
        (N, channels) in float32.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (N, channels / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """A two-layer perceptron on the sinusoidal embedding.

    Args:
        condition_channels: width of another embedding, if there is one: `cond_proj` makes of it what is added to the
            first. See `told_guidance`.
    """

    def __init__(self, in_channels: int, out_channels: int, condition_channels: int | None = None) -> None:
        super().__init__()
        if condition_channels is not None:
            self.cond_proj = nn.Linear(condition_channels, in_channels, bias=False)
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels) -> (N, out_channels)."""
        return self.linear_2(F.silu(self.linear_1(x)))


def added_embedding(pooled: Tensor, sizes: Tensor, size_channels: int) -> Tensor:
    """Pooled text and the sinusoids of some numbers, side by side (Podell et al. 2023, section 2.2).

    Args:
        pooled: (N, P).
        sizes: (N, K), in pixels; see `networks.sizes`.
        size_channels: width of each number's sinusoids.

    Returns:
        (N, P + K size_channels), in the dtype of `pooled`.
    """
    sinusoids = sinusoidal_embedding(sizes.flatten(), size_channels).unflatten(0, sizes.shape).flatten(1)
    return torch.cat([pooled, sinusoids.to(pooled)], dim=1)
