"""The denoising loop: one for all samplers, and a generator, so that progress, previews and cancelling need no
callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.diffusion.parameterization import Denoiser, Prediction
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import LatentDiffError, NotFiniteError, UsageError


class Noise(Protocol):
    """Where stochastic steps draw unit normal noise (N, C, h, w) from; a `NoiseStream`."""

    def __call__(self) -> Tensor:
        """The next draw."""
        ...

    def between(self, sigma_hat: float, next_sigma_hat: float) -> Tensor:
        """The same for the same two noise levels; for solvers whose noise must not depend on the number of steps."""
        ...


# (denoiser, x, level, next_level, state, noise) -> (x at next_level, state). Pure; the first state is None.
Step = Callable[[Denoiser, Tensor, Level, Level, Any, Noise], tuple[Tensor, Any]]


# (step from 0, timestep, predicted x0 (N, C, h, w)) -> False to cancel, anything else to go on.
Callback = Callable[[int, float, Tensor], Any]


@dataclass(frozen=True)
class DenoiseStep:
    """What one step did."""

    index: int  # 0 … steps - 1
    steps: int
    level: Level  # where the step began
    next_level: Level
    x: Tensor  # (N, C, h, w), at next_level
    prediction: Prediction  # the first that the step asked for; its x0 is the preview


def denoise(
    denoiser: Denoiser,
    x: Tensor,
    levels: Sequence[Level],
    step: Step,
    *,
    noise: Noise | None = None,
    after_step: Callable[[Tensor, Level], Tensor] | None = None,
) -> Iterator[DenoiseStep]:
    """Walk `x` (N, C, h, w) from the first level to the last, one step per neighbouring pair; reversed levels walk up
    in noise.

    Args:
        noise: where stochastic steps draw from; samplers that are asked for randomness without it raise.
        after_step: (x, next_level) -> x, for what has to hold after every step (known regions, say); not between the
            evaluations of one step.

    Raises:
        NotFiniteError: the latents became NaN or infinite. On a GPU that is noticed one step later, so that the host
            need not wait for each step, and at the last step at once.
    """
    first = _RememberFirst(denoiser)
    state = None
    checks: list[_FiniteCheck] = []
    for index, (level, next_level) in enumerate(pairwise(levels)):
        first.is_open = True
        x, state = step(first, x, level, next_level, state, noise or _NoNoise())
        if after_step is not None:
            x = after_step(x, next_level)
        checks.append(_FiniteCheck(x, f"step {index + 1} of {len(levels) - 1} (timestep {level.t:g})"))
        may_wait = is_asynchronous(x.device) and index + 2 < len(levels)
        while len(checks) > may_wait:
            checks.pop(0).read()
        yield DenoiseStep(index, len(levels) - 1, level, next_level, x, first.prediction)


def is_asynchronous(device: torch.device) -> bool:
    """Whether reading a number from `device` makes the host wait for all work that it was given."""
    return device.type == "cuda"


class _FiniteCheck:
    """Whether latents are finite: asked at once, read later, without waiting for what the GPU was given since."""

    def __init__(self, x: Tensor, where: str) -> None:
        self._where, self._done = where, None
        self._answer = torch.isfinite(x).all()
        if x.device.type == "cuda":
            self._answer = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self._answer, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(x.device))

    def read(self) -> None:
        if self._done is not None:
            self._done.synchronize()
        if not self._answer:
            raise NotFiniteError(
                f"latents must stay finite, found NaN or infinity after {self._where}; use a higher precision"
            )


class _RememberFirst:
    """A denoiser that keeps the first prediction of each step, for the loop to report; a step may ask for more."""

    prediction: Prediction
    is_open = True

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        prediction = self._denoiser(x, level)
        if self.is_open:
            self.prediction, self.is_open = prediction, False
        return prediction


class _NoNoise:
    def __call__(self) -> Tensor:
        raise UsageError("this sampler draws noise at its steps; give denoise() a NoiseStream")

    def between(self, sigma_hat: float, next_sigma_hat: float) -> Tensor:
        return self()


class Cancelled(LatentDiffError):
    """The callback returned False; no image was made."""


def report(step: DenoiseStep, callback: Callback | None) -> None:
    """Tell the callback what a step did.

    Raises:
        Cancelled: it returned False.
    """
    if callback is not None and callback(step.index, step.level.t, step.prediction.x0) is False:
        raise Cancelled(f"cancelled by the callback after step {step.index + 1} of {step.steps}")


def progress_bar(total: int, show: bool, unit: str = "step") -> tqdm[NoReturn]:
    """A bar over `total` steps on a terminal or in a notebook, and nothing elsewhere."""
    return tqdm(total=total, unit=unit, disable=None if show else True, leave=False)
