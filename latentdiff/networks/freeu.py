"""FreeU (Si et al. 2023): on the way up, stronger features and weaker coarse parts of the skips; no training.

In each of the first two levels, half of the channels that come from below are multiplied by b, and of what the skips
bring, the lowest frequencies by s (section 3.2). Which levels these are is said as diffusers does, by their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from latentdiff.networks.taps import Tap
from latentdiff.networks.unet import UNet

NEUTRAL = (1.0, 1.0, 1.0, 1.0)
_LEVELS = 2


def freeu(unet: UNet, factors: Sequence[float] | None) -> AbstractContextManager[Any]:
    """Inside, the U-Net draws so.

    Args:
        factors: b of the first and the second level, s of the first and the second; all 1, or None, change nothing.
    """
    if factors is None or tuple(factors) == NEUTRAL:
        return nullcontext()
    widths = unet.config.block_out_channels[::-1]
    levels = list(unet.up_blocks)[:_LEVELS]
    own: dict[str, tuple[int, float, float]] = {}  # of each block: channels from below, b, s
    for place, level in enumerate(levels):
        for index in range(len(level.resnets)):
            channels = widths[place] if index else widths[max(place - 1, 0)]
            own[f"up_blocks.{place}.resnets.{index}"] = channels, factors[place], factors[_LEVELS + place]

    def scaled(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        joined, *others = arguments
        channels, backbone, skip = own[name]
        half = channels // 2
        below, brought = joined[:, :channels], joined[:, channels:]
        return torch.cat([below[:, :half] * backbone, below[:, half:], scaled_lows(brought, skip)], dim=1), *others

    return Tap(unet, own, arguments=scaled)


def scaled_lows(x: Tensor, factor: float) -> Tensor:
    """Maps (N, C, h, w) with their mean and their slowest negative frequencies, along each axis, times `factor`.

    Of the pair of frequencies 1 and -1 the authors' code scales the second, and keeps the real part.
    """
    spectrum = torch.fft.fft2(x.float())
    for row in {0, x.shape[2] - 1}:
        for column in {0, x.shape[3] - 1}:
            spectrum[:, :, row, column] *= factor
    return torch.fft.ifft2(spectrum).real.to(x.dtype)
