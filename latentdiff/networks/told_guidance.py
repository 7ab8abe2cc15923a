"""U-Nets that are told how strongly to follow the prompt, in place of a second, unguided evaluation.

Latent consistency models are distilled so (Luo et al. 2023, section 4.2; the embedding is that of Meng et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.networks.taps import Tap
from latentdiff.networks.unet import UNet

PLACE = "time_embedding"
SCALING = 1000.0


def told_guidance(unet: UNet, scale: float) -> Tap:
    """Inside, a U-Net that is told the guidance scale is told this one."""
    condition = guidance_embedding(scale, unet.config.time_cond_proj_dim)

    def add(name: str, arguments: tuple[Tensor]) -> tuple[Tensor]:
        (time,) = arguments  # (N, channels)
        return (time + unet.time_embedding.cond_proj(condition.to(time)),)

    return Tap(unet, [PLACE], arguments=add)


def guidance_embedding(scale: float, width: int) -> Tensor:
    """Sinusoids of scale - 1, (1, width), float32; sines first, and the slowest frequency is a 10,000th."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32) / (half - 1)
    angles = (scale - 1.0) * SCALING * torch.exp(-torch.log(torch.tensor(10_000.0, dtype=torch.float32)) * exponent)
    return torch.cat([angles.sin(), angles.cos()])[None]
