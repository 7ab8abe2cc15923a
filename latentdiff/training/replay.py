"""Proof that a run can be gone on with: the steps before its newest checkpoint, taken again."""

from __future__ import annotations

import contextlib

import torch

from latentdiff.errors import CheckpointError, UsageError
from latentdiff.training.agreement import from_main
from latentdiff.training.checkpoint import Checkpoint, load_checkpoint, whole_checkpoints
from latentdiff.training.loop import Trainer


def verify_resume(trainer: Trainer, steps: int) -> tuple[int, int]:
    """Replay at least so many steps up to the newest checkpoint, from an older one, and compare every bit.

    Weights, averages and the optimizer's moments are compared. The trainer stands where its newest checkpoint is
    afterwards, as after `Trainer.start`.

    Returns:
        The steps of the older and of the newest checkpoint.

    Raises:
        UsageError: there are no two checkpoints that far apart.
        CheckpointError: something differs; the message names the first.
    """
    paths = whole_checkpoints(trainer.folder / "checkpoints")
    numbers = [int(path.name.removeprefix("step-")) for path in paths]
    older = next((n for n, number in enumerate(numbers) if number <= numbers[0] - steps), None)
    if older is None:
        there = ", ".join(map(str, numbers)) or "none"
        raise UsageError(
            f"expected a checkpoint at least {steps} steps before the newest in {trainer.folder}, found steps {there};"
            " take fewer steps, or keep more with keep_checkpoints"
        )
    newest = load_checkpoint(paths[0])
    trainer.take(load_checkpoint(paths[older]), paths[older])
    trainer.replay(newest.step)
    state = trainer.state()
    differing = from_main(trainer.accelerator, lambda: _first_difference(state, newest))
    trainer.take(newest, paths[0])
    if differing:
        raise CheckpointError(
            f"steps {numbers[older]} to {newest.step} of {trainer.folder}, taken again, give another {differing};"
            " the data, the settings, the device or a library has changed since"
        )
    return numbers[older], newest.step


def _first_difference(now: Checkpoint, then: Checkpoint) -> str | None:
    for kind in ("weights", "ema", "optimizer"):
        found, expected = getattr(now, kind), getattr(then, kind)
        for name in sorted({*found, *expected}):
            with contextlib.suppress(KeyError):
                if torch.equal(found[name].detach().cpu(), expected[name]):
                    continue
            return f"{name} ({kind})"
    return None
