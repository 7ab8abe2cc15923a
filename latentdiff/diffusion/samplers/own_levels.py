"""The levels of a walk that the caller writes down, as noise levels or as timesteps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule
from latentdiff.errors import UsageError


def own_levels(
    schedule: Schedule, end: Level, *, sigmas: Sequence[float] | None = None, timesteps: Sequence[float] | None = None
) -> list[Level]:
    """Levels of falling noise and their clean end.

    Args:
        end: where a walk over timesteps ends.
        sigmas: sigma_hat of each, falling; a 0 at the end may be left out.
        timesteps: of each, falling, 0 to T - 1; fractions are allowed.

    Raises:
        UsageError: none or both are given, or they do not fall, or lie outside of their range.
    """
    if (sigmas is None) == (timesteps is None):
        raise UsageError("expected either sigmas or timesteps, found both or neither")
    schedule = schedule.with_finite_log_snr()
    if timesteps is not None:
        _check_falling("timesteps", timesteps)
        return [*map(schedule.level, map(float, timesteps)), end]
    _check_falling("sigmas", sigmas)
    noisy = list(sigmas[:-1] if sigmas[-1] == 0 else sigmas)
    if not noisy or not 0.0 < noisy[-1] <= noisy[0] < math.inf:
        raise UsageError(f"expected sigmas above 0, the last perhaps 0, found {list(sigmas)}")
    return [*map(schedule.at_sigma_hat, map(float, noisy)), NOISE_FREE]


def _check_falling(name: str, values: Sequence[float]) -> None:
    if not len(values) or not all(after < before for before, after in pairwise(values)):
        raise UsageError(f"expected {name} that fall from each to the next, found {list(values)}")
