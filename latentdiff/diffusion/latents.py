"""Noise: one generator per image, so that a picture depends on its seed and on nothing else.

All noise of an image, at the start and in stochastic steps, comes from one generator on the CPU that is seeded with
the image's seed, and is drawn in float32 before it moves; solvers of the stochastic equation take theirs from a
Brownian path of the same seed. So image i of a batch is the image made alone with its seed, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.brownian import BrownianNoise
from latentdiff.errors import UsageError


class NoiseStream:
    """Unit normal noise for a batch of images; every call gives the next (N, C, h, w).

    Args:
        seeds: one per image, 0 to 2**64 - 1.
        shape: (C, h, w) of one image's latents.
        device, dtype: where and as what the noise is wanted.

    Raises:
        UsageError: no seed, or one out of range.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not seeds:
            raise UsageError("at least one seed is needed, found none")
        for seed in seeds:
            if not 0 <= seed < 2**64:
                raise UsageError(f"a seed must be a whole number from 0 to 2**64 - 1, found {seed}")
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._brownian = BrownianNoise(seeds, tuple(shape))
        self._shape = tuple(shape)
        self._device = torch.device(device)
        self._dtype = dtype

    def __call__(self) -> Tensor:
        # In float32 whatever torch's default is: a seed draws other numbers in float64.
        draws = [torch.randn(self._shape, generator=each, dtype=torch.float32) for each in self._generators]
        noise = torch.stack(draws)
        return noise.to(self._device, self._dtype)  # (N, C, h, w)

    def between(self, sigma_hat: float, next_sigma_hat: float) -> Tensor:
        """What the images' Brownian paths add between two noise levels, as unit normal noise (N, C, h, w)."""
        return self._brownian.between(sigma_hat, next_sigma_hat).to(self._dtype).to(self._device)


def start_noise(
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise (N, C, h, w) that sampling starts from: the first draw of every image's stream."""
    return NoiseStream(seeds, shape, device=device, dtype=dtype)()
