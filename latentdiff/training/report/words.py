"""How a run went, in sentences for people who do not read curves."""

from __future__ import annotations

import math
from pathlib import Path

from latentdiff.errors import DataError
from latentdiff.reading.json import read_object
from latentdiff.training.report.log import LOG, RESULT, RunLog
from latentdiff.training.report.memorization import read_copy_check

_NOTICEABLE = 0.005  # change of the held-out loss, as a share


def learned_in_words(run: Path) -> str:
    """What the losses on held-out images say; "" where there is nothing to say."""
    log = RunLog.read(run / LOG) if (run / LOG).is_file() else RunLog({})
    losses = [point for point in log.losses("val") if math.isfinite(point[1])]
    if not losses:
        return (
            "nothing was held out, so that nothing tells learning from learning by heart; --validation-share 0.1 would"
        )
    (_, first), (last_step, last), (step, best) = (
        losses[0],
        losses[-1],
        min(losses, key=lambda point: (point[1], point[0])),
    )
    if len(losses) < 2 or not first:
        return ""
    if first - best < _NOTICEABLE * first:
        return "its error on held-out images did not fall: what it learned does not carry over to other images"
    said = f"its error on held-out images fell by {100 * (1 - best / first):.1f} %"
    if step == last_step:
        return f"{said}, and still fell at the end: more steps may help"
    if last - best < _NOTICEABLE * first:
        return f"{said} until step {step}, and hardly changed after it"
    return f"{said} until step {step}, and rose after it, as when images are learned by heart: see --result best or --stop auto"


def copies_in_words(run: Path) -> str:
    """Whether samples are copies of training images; "" where that was not looked at."""
    check = read_copy_check(run)
    if check is None:
        return ""
    count = len(check.nearest)
    if not check.suspicious:
        return f"none of {count} samples is suspiciously near a training image"
    return f"{check.suspicious} of {count} samples are suspiciously near a training image; the report shows them"


def use_of_result(run: Path) -> str:
    """The command that uses the result, as the end of the run wrote it down."""
    path = run / RESULT
    return str(read_object(path, DataError, remedy="delete it").get("use", "")) if path.is_file() else ""


def duration(seconds: float) -> str:
    """Seconds in words: 2 h 05 min, 3 min 20 s, 4.2 s."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
