"""Which step of a run is the best so far, and whether more steps are worth their time, from what the log says.

The log alone decides: a run that is gone on with decides as one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from latentdiff.training.report.log import RunLog

_NOTEWORTHY = 1e-3  # share by which a loss must fall to count as fallen: less is rounding and luck


@dataclass(frozen=True)
class Choice:
    """What the log says.

    Attributes:
        step: the best so far; None before anything was measured.
        ended: whether to stop, with the reason in `why`.
        why: why this step, in words.
    """

    step: int | None
    ended: bool
    why: str


def choose(log: RunLog, *, patience: int, least_kept: float) -> Choice:
    """The best step so far, and whether to stop.

    A step's loss is the mean over the bands of timesteps of its held-out loss there, each as a share of that of the start
    model: a mean of the losses themselves would hang on the bands where they are large. Steps that kept less than
    `least_kept`, and those from the first on whose samples copy training images, are out of the question.

    Args:
        log: with `val_LOW_HIGH` of each band, perhaps `kept`, and perhaps `copies`, the number of samples that are
            suspiciously near a training image.
        patience: so many measurements in a row that are no better than the best end the run.
        least_kept: 0 to 1.
    """
    losses = relative_losses(log)
    steps = [step for step in losses if step]
    if not steps:
        return Choice(None, False, "nothing was measured yet")
    kept = dict(log["kept"])
    copying = min((step for step, count in log["copies"] if count), default=math.inf)
    allowed = [step for step in steps if kept.get(step, 1.0) >= least_kept and step < copying]
    best = _best(losses, allowed) if allowed else steps[0]
    forgot = [step for step in steps[-2:] if kept.get(step, 1.0) < least_kept]
    if copying < math.inf:
        return Choice(best, True, f"samples of step {copying} are copies of training images")
    if len(forgot) == 2:
        return Choice(best, True, f"at steps {forgot[0]} and {forgot[1]} less than {least_kept:g} of the old was kept")
    since = sum(step > best for step in steps)
    if since >= patience:
        return Choice(best, True, f"{since} measurements did not better its held-out loss, which {_rises(log, best)}")
    return Choice(best, False, "the held-out loss was lowest among the steps that keep the old and copy nothing")


def relative_losses(log: RunLog) -> dict[int, float]:
    """Mean over the bands of the held-out loss, as a share of that at the first measurement, by step."""
    bands = _bands(log)
    steps = sorted(set.intersection(*(set(points) for points in bands.values()))) if bands else []
    found = {}
    for step in steps:
        shares = [points[step] / points[steps[0]] for points in bands.values() if points[steps[0]]]
        if shares and all(map(math.isfinite, shares)):
            found[step] = sum(shares) / len(shares)
    return found


def _bands(log: RunLog) -> dict[str, dict[int, float]]:
    return {name: dict(points) for name, points in log.held_out_bands.items()}


def _best(losses: Mapping[int, float], steps: list[int]) -> int:
    """The first step of which no later one is noteworthily better."""
    best = steps[0]
    for step in steps[1:]:
        if losses[step] < losses[best] * (1 - _NOTEWORTHY):
            best = step
    return best


def _rises(log: RunLog, best: int) -> str:
    """In which bands the loss has risen since."""
    names = [
        "-".join(name.removeprefix("val_").split("_"))
        for name, points in _bands(log).items()
        if points[max(points)] > points.get(best, math.inf) * (1 + _NOTEWORTHY)
    ]
    return f"has risen since at timesteps {', '.join(names)}" if names else "stands still since then"
