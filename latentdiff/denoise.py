"""The denoising loop: one for all samplers, and a generator, so that progress, previews and cancelling need no callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import NotFiniteError, UsageError
from latentdiff.parameterization import Denoiser, Prediction
from latentdiff.schedule import Level

# () -> unit normal noise (N, C, h, w); a `NoiseStream`. Only stochastic steps call it.
Noise = Callable[[], Tensor]

# (denoiser, x, level, next_level, state, noise) -> (x at next_level, state). Pure; the first state is None.
Step = Callable[[Denoiser, Tensor, Level, Level, Any, Noise], tuple[Tensor, Any]]


@dataclass(frozen=True)
class DenoiseStep:
    """What one step did."""

    index: int  # 0 … steps - 1
    steps: int
    level: Level  # where the step began and the prediction was made
    next_level: Level
    x: Tensor  # (N, C, h, w), at next_level
    prediction: Prediction  # its x0 is the preview


def denoise(
    denoiser: Denoiser,
    x: Tensor,
    levels: Sequence[Level],
    step: Step,
    *,
    noise: Noise | None = None,
    after_step: Callable[[Tensor, Level], Tensor] | None = None,
) -> Iterator[DenoiseStep]:
    """Walk `x` (N, C, h, w) from the first level to the last, one step per neighbouring pair; reversed levels walk up in noise.

    Args:
        noise: where stochastic steps draw from; samplers that are asked for randomness without it raise.
        after_step: (x, next_level) -> x, for what has to hold after every step (known regions, say).

    Raises:
        NotFiniteError: the latents became NaN or infinite.
    """
    last = _Remember(denoiser)
    state = None
    for index, (level, next_level) in enumerate(pairwise(levels)):
        x, state = step(last, x, level, next_level, state, noise or _no_noise)
        if after_step is not None:
            x = after_step(x, next_level)
        if not torch.isfinite(x).all():
            raise NotFiniteError(
                f"latents must stay finite, found NaN or infinity after step {index + 1} of {len(levels) - 1} "
                f"(timestep {level.t:g}); use a higher precision"
            )
        yield DenoiseStep(index, len(levels) - 1, level, next_level, x, last.prediction)


class _Remember:
    """A denoiser that keeps its last prediction, for the loop to report."""

    prediction: Prediction

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        self.prediction = self._denoiser(x, level)
        return self.prediction


def _no_noise() -> Tensor:
    raise UsageError("this sampler draws noise at its steps; give denoise() a NoiseStream")
