"""PNDM without its Runge-Kutta steps, known as PLMS: Adams and Bashforth's weights in DDIM's step (Liu et al. 2022,
eq. 12 and 9)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser, parameterization
from latentdiff.diffusion.schedule import Level, Schedule

# Of the newest output and those before it, by how many there are.
WEIGHTS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@dataclass(frozen=True)
class History:
    """What the model said at the steps before, the newest first."""

    outputs: tuple[Tensor, ...]  # (N, C, h, w) each
    guided: bool


def step(
    denoiser: Denoiser,
    x: Tensor,
    level: Level,
    next_level: Level,
    state: History | None,
    noise: Noise,
    *,
    schedule: Schedule,
) -> tuple[Tensor, History]:
    """DDIM's step along the weighted outputs of up to four steps; the weights are those of equal strides.

    A first step has none to weigh: it asks again where it ends, and takes the mean. History starts over where guidance
    switched on or off. What is weighed is the model's output as it is, noise or velocity, as diffusers does.

    Args:
        schedule: tells what the output means.
    """
    prediction = denoiser(x, level)
    outputs = (prediction.raw,)
    if state is not None and state.guided == prediction.guided:
        outputs = (*outputs, *state.outputs)[:4]
    if len(outputs) > 1:
        raw = sum(weight * one for weight, one in zip(WEIGHTS[len(outputs)], outputs, strict=True))
    elif next_level.is_clean:
        raw = prediction.raw
    else:
        end = next_level.alpha * prediction.x0 + next_level.sigma * prediction.eps
        raw = 0.5 * (prediction.raw + denoiser(end, next_level).raw)
    mean = parameterization(schedule.config.prediction_type)(raw, x, level)
    return next_level.alpha * mean.x0 + next_level.sigma * mean.eps, History(outputs, prediction.guided)


def levels(schedule: Schedule, steps: int, spacing: str) -> list[Level]:
    """The schedule's levels, with a trace of signal where there is none."""
    return schedule.with_finite_log_snr().levels(steps, spacing)
