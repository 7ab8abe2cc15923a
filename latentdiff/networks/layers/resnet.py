"""Residual blocks, changes of resolution, and the embedding of the timestep (Ho et al. 2020, appendix B; Rombach et al.
2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual connection; the time embedding enters between them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; a 1x1 convolution adapts the residual where they differ.
        time_channels: width of the time embedding, or None for a block without one (the autoencoder's).
        groups: groups of the normalisation.
        eps: added to the variance by the normalisation.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, time_channels: int | None, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (N, C_in, h, w) and time (N, time_channels) -> (N, C_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return residual + h


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution.

    The U-Net pads on all sides; the autoencoder pads on the right and at the bottom only (`symmetric=False`).
    """

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, ceil(h/2), ceil(w/2)); rounded down instead where padding is one-sided."""
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Enlarge by nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        """(N, C, h, w) -> (N, C, *size); twice the resolution where no size is given."""
        x = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)
        return self.conv(x)


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
