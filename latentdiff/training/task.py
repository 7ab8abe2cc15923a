"""What the training loop needs to know about what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from torch import nn

from latentdiff.training.optimizer import ParameterGroup


class Task(ABC):
    """One kind of training: a module with its loss, the data of every step, and how progress is measured.

    `batch` runs in background threads and must be a pure function of its arguments, so that a resumed run sees the same
    data.
    """

    module: nn.Module
    """Holds everything that is trained. `module(batch, step)` returns the loss as a scalar "loss", and its parts to
    log."""

    fingerprint: str
    """Names the data; a resumed run says if it has changed."""

    loader_threads: int = 2
    """Background threads that make batches."""

    measures_start: bool = False
    """Whether there is something to validate before the first step."""

    resume_hint: str = "the same command goes on from there"
    """What a run that was stopped says to its user."""

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """What is trained, by names unique in the task."""

    def averaged(self) -> set[str]:
        """Names of the parameter groups that have an averaged copy; all unless overridden."""
        return {group.name for group in self.parameter_groups()}

    def networks(self) -> list[nn.Module]:
        """Networks all of whose parameters are trained, which may be split over processes; none unless overridden."""
        return []

    def compile(self) -> None:
        """Compile the networks in place."""
        self.module.compile()

    @abstractmethod
    def batch(self, step: int, rows: range) -> dict[str, np.ndarray]:
        """Samples of the given rows of the global batch of `step`; numpy only, see `data.randomness`."""

    def stream(self, first_step: int, rows: range, micro_batch: int) -> Iterator[dict[str, np.ndarray]] | None:
        """Micro-batches of the given rows of each batch from `first_step` on, for ever; None to use `batch`."""
        return None

    @abstractmethod
    def sources(self, step: int) -> list[str]:
        """File names of the batch of `step`, for messages."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Measurements on held-out images; called with the averaged weights in place."""

    @abstractmethod
    def preview(self, folder: Path, step: int) -> dict[str, float] | None:
        """Write a sheet of images, and give what is to be logged about them; called with the averaged weights in place."""

    def after_step(self) -> None:  # noqa: B027 (optional)
        """Called when the optimizer has taken a step; does nothing unless overridden."""

    def is_done(self) -> bool:
        """Whether what the log says ends the run before its last step; asked after each measurement."""
        return False

    def steps_to_keep(self) -> Collection[int]:
        """Steps whose checkpoints stay on disk although there are newer ones."""
        return ()

    def preview_live(self, folder: Path, step: int) -> None:  # noqa: B027 (optional)
        """As `preview`, with the live weights in place; writes nothing unless overridden."""
