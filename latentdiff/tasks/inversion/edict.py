"""EDICT (Wallace et al. 2023): two coupled latents, each moved by what the model says about the other, so exactly
invertible.

The pair (x, y) goes through the loop as one tensor (2 N, C, h, w), the N latents x before the N latents y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError
from latentdiff.tasks.inversion.ddim import Quantity, coefficients, read


def mixing_for(steps: int, quantity: Quantity = "eps") -> float:
    """The share p of its own that each latent keeps in a step: the paper's 0.93 up to 50 steps.

    On the way up the two drift apart by a factor p**-2 a step, so p depends on the number of steps. Moved by the noise
    they also shrink together, by alpha_T in all; moved by the velocity they do not, and p has to be nearer to 1.
    """
    return {"eps": 0.93, "v": 0.98}[quantity] ** min(50.0 / steps, 1.0)


def quantity_for(levels: Sequence[Level]) -> Quantity:
    """The paper's, the noise; the velocity where the noisiest level holds no signal."""
    return "eps" if levels[0].alpha > 0.0 else "v"


def sampling_step(levels: Sequence[Level], p: float, quantity: Quantity = "eps") -> Step:
    """Down in noise over `levels`, which also say who goes first: the two take turns.

    Cost: 2 evaluations of N latents a step. Float32 at the least: half precision loses the pair.

    Raises:
        UsageError: p is not in (0.5, 1], where alone the mixing can be undone stably.
    """
    _check_mixing(p)
    number = {level: index for index, level in enumerate(levels)}

    def step(
        denoiser: Denoiser, pair: Tensor, level: Level, next_level: Level, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        first, second = _in_turn(pair, number[level])
        a, b = coefficients(level, next_level, quantity)
        first = a * first + b * read(denoiser(second, level), level, quantity)
        second = a * second + b * read(denoiser(first, level), level, quantity)
        first = p * first + (1.0 - p) * second
        second = p * second + (1.0 - p) * first
        return _pair(first, second, number[level]), None

    return step


def inversion_step(levels: Sequence[Level], p: float, quantity: Quantity = "eps") -> Step:
    """Up in noise, undoing `sampling_step` with the same arguments; `levels` are in the order of sampling here too."""
    _check_mixing(p)
    number = {level: index for index, level in enumerate(levels)}

    def step(
        denoiser: Denoiser, pair: Tensor, level: Level, next_level: Level, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        first, second = _in_turn(pair, number[next_level])
        a, b = coefficients(next_level, level, quantity)  # of the sampling step
        second = (second - (1.0 - p) * first) / p
        first = (first - (1.0 - p) * second) / p
        second = (second - b * read(denoiser(first, next_level), next_level, quantity)) / a
        first = (first - b * read(denoiser(second, next_level), next_level, quantity)) / a
        return _pair(first, second, number[next_level]), None

    return step


def _in_turn(pair: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The two latents, in the order in which step `number` moves them."""
    x, y = pair.chunk(2)
    return (x, y) if number % 2 == 0 else (y, x)


def _pair(first: Tensor, second: Tensor, number: int) -> Tensor:
    return torch.cat([first, second] if number % 2 == 0 else [second, first])


def _check_mixing(p: float) -> None:
    if not 0.5 < p <= 1.0:
        raise UsageError(f"expected a mixing p of EDICT above 0.5 and at most 1, found {p}")
