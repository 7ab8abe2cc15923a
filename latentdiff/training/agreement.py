"""What several processes of one run have to agree on; each of these functions must be called by all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from latentdiff.errors import DataError

Answer = TypeVar("Answer")


def any_says(accelerator: Accelerator, yes: bool) -> bool:
    """Whether any process says yes."""
    if accelerator.num_processes == 1:
        return yes
    flag = torch.tensor([float(yes)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())


def from_main(accelerator: Accelerator, ask: Callable[[], Answer]) -> Answer:
    """What the main process answers; the others are not asked, since they may not see its files, or not yet."""
    answer = [ask() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    return answer[0]  # type: ignore[return-value]


def check_same_step(accelerator: Accelerator, step: int, place: object) -> None:
    """Make sure that all processes begin at one step.

    Raises:
        DataError: they found different checkpoints in `place`.
    """
    main = from_main(accelerator, lambda: step)
    if any_says(accelerator, step != main):
        raise DataError(
            f"the processes found different checkpoints in {place}: one stands at step {step}, the main one at step {main};"
            " the folder must lie on storage that all machines see"
        )
