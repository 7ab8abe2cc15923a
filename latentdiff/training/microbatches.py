"""What one process trains on: its micro-batches, made ahead in background threads."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.training.prefetch import Prefetch
from latentdiff.training.sections import StageSection
from latentdiff.training.task import Task


def micro_batches(
    task: Task, settings: StageSection, accelerator: Accelerator, first_step: int, size: int
) -> Generator[dict[str, Tensor]]:
    """Micro-batches of `size` rows of this process, from `first_step` to `max_steps`; on the CPU, pinned for a GPU."""
    own = accelerator.process_index * settings.accumulation
    stream = task.stream(first_step, range(own * size, (own + settings.accumulation) * size), size)

    def make(key: tuple[int, int]) -> dict[str, Tensor]:
        step, first = key
        arrays = next(stream) if stream else task.batch(step, range(first, first + size))
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        pin = accelerator.device.type == "cuda"
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch

    keys = (
        (step, (own + micro) * size)
        for step in range(first_step, settings.max_steps)
        for micro in range(settings.accumulation)
    )
    threads = 1 if stream else task.loader_threads  # a stream has an order
    yield from Prefetch(make, keys, workers=threads, depth=max(4, 2 * threads))
