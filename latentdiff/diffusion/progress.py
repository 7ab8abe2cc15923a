"""Watching the denoise loop: progress bar, callback and cancelling, the same for every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.diffusion.denoise import DenoiseStep
from latentdiff.errors import LatentDiffError

# (step from 0, timestep, predicted x0 (N, C, h, w)) -> False to cancel, anything else to go on.
Callback = Callable[[int, float, Tensor], Any]


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
