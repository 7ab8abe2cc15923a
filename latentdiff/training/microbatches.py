"""What one process trains on: its micro-batches, made ahead in background threads."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from latentdiff.errors import ConfigError
from latentdiff.training.prefetch import Prefetch
from latentdiff.training.sections import StageSection
from latentdiff.training.task import Task

# They change the parameters that the optimizer and the averages were made of, which would then train nothing.
_OTHER_KINDS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def micro_batch_size(settings: StageSection, accelerator: Accelerator) -> int:
    """Rows of a micro-batch.

    Raises:
        ConfigError: the batch cannot be split over processes and micro-batches, or the processes work by other means than
            those that are known.
    """
    if accelerator.distributed_type in _OTHER_KINDS:
        raise ConfigError(
            f"expected processes that work by DDP or FSDP, found {accelerator.distributed_type.value} in accelerate's"
            " configuration; configs/accelerate/ddp.yaml is one that works"
        )
    splits = accelerator.num_processes * settings.accumulation
    if settings.batch_size % splits:
        raise ConfigError(
            f"batch_size {settings.batch_size} must be divisible by processes x accumulation ="
            f" {accelerator.num_processes} x {settings.accumulation}"
        )
    return settings.batch_size // splits


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
