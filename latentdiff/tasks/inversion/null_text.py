"""Null-text inversion (Mokady et al. 2023): per step, the "empty" embedding with which guided sampling stays on the
trajectory.

The unguided inversion gives the trajectory (the pivots); guidance would leave it, because what was inverted did not
follow the prompt that strongly. So the unconditional embedding is optimised, step by step, until guided sampling
returns to the pivots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import DenoiseStep
from latentdiff.diffusion.guidance import Guidance
from latentdiff.diffusion.parameterization import Denoiser, Parameterization, Prediction
from latentdiff.diffusion.schedule import Level

Predict = Callable[[Tensor], Prediction]  # of a null embedding


@dataclass(frozen=True, kw_only=True)
class NullTextSettings:
    """The paper's settings for 50 steps, with the two ramps over steps given as shares, so that they hold for any
    number.

    The learning rate falls to half of its value at the last step; the mean squared error at which a step stops early
    grows by `tolerance_growth` over all steps.
    """

    guidance_scale: float = 5.0
    inner_steps: int = 10
    learning_rate: float = 1e-2
    tolerance: float = 1e-5
    tolerance_growth: float = 1e-3


@dataclass(frozen=True)
class NullTextStep:
    """What was found for one step."""

    done: DenoiseStep  # the guided step with it
    null: Tensor  # like the first one
    losses: list[float]  # mean squared distance to the pivot before each inner step


def optimise(
    conditional: Denoiser,
    unconditional: Callable[[Tensor], Denoiser],
    parameterization: Parameterization,
    null: Tensor,
    levels: Sequence[Level],
    pivots: Sequence[Tensor],
    settings: NullTextSettings,
) -> Iterator[NullTextStep]:
    """Find the null embedding of each step.

    Args:
        conditional: follows the prompt of the source.
        unconditional: null embedding -> the denoiser that follows it, differentiable in it.
        parameterization: of the raw predictions, on which guidance acts.
        null: where to begin, (1, L, C) say; each later step begins where the one before it ended.
        levels, pivots: of the stored trajectory, noisiest first; pivots are (N, C, h, w).

    Cost: a step takes one evaluation of `conditional` and, per inner step, one of `unconditional` with its backward
        pass.
    No graph lives longer than an inner step.
    """
    guidance = Guidance(scale=settings.guidance_scale)
    x = pivots[0]
    steps = len(levels) - 1
    for index, (level, next_level) in enumerate(pairwise(levels)):
        with torch.no_grad():
            positive = conditional(x, level).raw
        pivot = pivots[index + 1]

        def predict(null: Tensor, x: Tensor = x, level: Level = level, positive: Tensor = positive) -> Prediction:
            raw = guidance.combine(unconditional(null)(x, level).raw, positive)
            return parameterization(raw, x, level)

        def loss_of(null: Tensor, predict: Predict = predict, to: Level = next_level, pivot: Tensor = pivot) -> Tensor:
            return (_land(predict(null), to) - pivot).square().mean()

        share = index / steps
        learning_rate = settings.learning_rate * (1.0 - 0.5 * share)
        tolerance = settings.tolerance + settings.tolerance_growth * share
        null, losses = _minimise(loss_of, null, settings.inner_steps, learning_rate, tolerance)
        with torch.no_grad():
            prediction = predict(null)
            x = _land(prediction, next_level)
        yield NullTextStep(DenoiseStep(index, steps, level, next_level, x, prediction), null, losses)


def _land(prediction: Prediction, level: Level) -> Tensor:
    """The DDIM step to `level`."""
    return level.alpha * prediction.x0 + level.sigma * prediction.eps


def _minimise(
    loss_of: Callable[[Tensor], Tensor], null: Tensor, steps: int, learning_rate: float, tolerance: float
) -> tuple[Tensor, list[float]]:
    """Adam from `null` on; returns the best embedding on the way, and its losses."""
    null = null.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([null], lr=learning_rate)
    best, losses = null.detach().clone(), []
    with torch.enable_grad():
        for _ in range(steps + 1):  # the last loss is only measured
            loss = loss_of(null)
            losses.append(loss.item())
            if losses[-1] == min(losses):
                best = null.detach().clone()
            if losses[-1] < tolerance or len(losses) > steps:
                break
            (null.grad,) = torch.autograd.grad(loss, null)
            optimizer.step()
    return best, losses
