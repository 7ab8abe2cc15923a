"""A Brownian path for each image, so that a stochastic solver meets the same noise however many steps it takes.

The path W runs over a clock, the signal-to-noise ratio 1 / sigma_hat². In that clock the noise of the reverse
diffusion of Karras et al. 2022 is itself a Brownian motion: with x in units of sigma_hat and a fixed x0, the exact
solution is d(x / sigma_hat²) = x0 d(clock) + dW(clock). So steps that are exact for a fixed x0 end at the same latents
at any number of steps, as far as the noise is concerned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

# Halvings of an octave of the clock; between the points that are left, the path is a straight line. What that misses
# of the variance of a step is below a millionth of it at a thousand steps.
DEPTH = 30


class BrownianPath:
    """W(clock) of one image, for clocks above 0, with W(1) = 0; float64, (C, h, w).

    Every value follows from the seed and the clock alone, whatever was asked before: between 2^k and 2^(k+1) stands one
    draw, and each half of an interval gets its share by one more draw (Lévy's construction), from a generator that is
    seeded with the image's seed and the place of the interval. Nothing is stored.
    """

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self._seed, self._shape = seed, shape

    def __call__(self, clock: float) -> Tensor:
        mantissa, octave = math.frexp(clock)  # clock = mantissa 2^octave, mantissa in [1/2, 1)
        octave -= 1
        value = torch.zeros(self._shape, dtype=torch.float64)
        for whole in range(min(octave, 0), max(octave, 0)):
            value += math.copysign(math.sqrt(2.0**whole), octave) * self._draw(whole, 0)
        return value + self._within(octave, 2.0 * mantissa - 1.0)

    def _within(self, octave: int, place: float) -> Tensor:
        """W(clock) - W(2^octave) at `place`, 0 to 1, of the octave."""
        width = 2.0**octave
        start, rise = torch.zeros(self._shape, dtype=torch.float64), math.sqrt(width) * self._draw(octave, 0)
        node = 1
        for _ in range(DEPTH):
            if place == 0.0:
                return start
            middle = 0.5 * rise + 0.5 * math.sqrt(width) * self._draw(octave, node)
            right = place >= 0.5
            start, rise = (start + middle, rise - middle) if right else (start, middle)
            width, place, node = 0.5 * width, 2.0 * place - right, 2 * node + right
        return start + place * rise

    def _draw(self, octave: int, node: int) -> Tensor:
        """Unit normal noise that belongs to one node of the tree of an octave; node 0 is the octave itself."""
        digest = blake2b(f"brownian {self._seed} {octave} {node}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
        return torch.randn(self._shape, generator=generator, dtype=torch.float32).double()


class BrownianNoise:
    """The paths of a batch of images, and what each adds on the way between two levels.

    Args:
        seeds: one per image.
        shape: (C, h, w) of one image's latents.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]) -> None:
        self._paths = [BrownianPath(seed, shape) for seed in seeds]
        self._known: dict[float, Tensor] = {}

    def between(self, sigma_hat: float, next_sigma_hat: float) -> Tensor:
        """Unit normal noise (N, C, h, w), float64: the increment of the paths over its standard deviation.

        Increments over distinct intervals are independent; those that overlap are correlated as they should be.
        """
        start, end = sigma_hat**-2, next_sigma_hat**-2
        self._known = {clock: self._known[clock] if clock in self._known else self._at(clock) for clock in (start, end)}
        return (self._known[end] - self._known[start]) / math.sqrt(end - start)

    def _at(self, clock: float) -> Tensor:
        return torch.stack([path(clock) for path in self._paths])
