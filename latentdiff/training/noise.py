"""The noise that training adds to latents: independent in every place, or with parts that are large."""

from __future__ import annotations

from itertools import count, takewhile

import numpy as np
import torch
from torch.nn import functional as F

from latentdiff.training.data.randomness import Key, normal
from latentdiff.training.sections import DenoisingSection


def diffusion_noise(
    noise: np.ndarray, settings: DenoisingSection, seed: int, step: int, rows: range
) -> np.ndarray:
    """Noise of a step's rows, (n, C, h, w) float32, from independent standard normal numbers of that shape."""
    if settings.noise_offset:  # constant over each channel (Guttenberg 2023, "Diffusion with Offset Noise")
        channels = (noise.shape[1], 1, 1)
        noise = noise + settings.noise_offset * normal((seed, "noise offset", step), rows, channels)
    if settings.pyramid_noise:
        noise = pyramid_noise(noise, settings.pyramid_noise, (seed, "pyramid noise", step), rows)
    return noise


def pyramid_noise(noise: np.ndarray, discount: float, key: Key, rows: range) -> np.ndarray:
    """Noise (n, C, h, w) and discount^i times noise of grids 2^i as coarse, each image with standard deviation 1.

    After Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training", there with random factors between grids.
    """
    channels, *sides = noise.shape[1:]
    total = torch.from_numpy(noise).clone()
    for level in takewhile(lambda level: 2 ** (level - 1) < max(sides), count(1)):
        shape = (channels, *(-(-side // 2**level) for side in sides))
        coarse = torch.from_numpy(normal((*key, level), rows, shape))
        total += discount**level * F.interpolate(coarse, sides, mode="bilinear", align_corners=False)
    return (total / total.flatten(1).std(1).view(-1, 1, 1, 1)).numpy()
