"""Residual blocks and changes of resolution (Ho et al. 2020, appendix B; Rombach et al. 2022)."""

from __future__ import annotations

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
