"""How sure a score is: Wilson's interval of a proportion, and a bootstrap of a mean of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
RESAMPLES = 2000


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927).

    Raises:
        ValueError: there is nothing to count.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"expected 0 <= correct <= total and total > 0, found {correct} of {total}")
    share, weight = correct / total, Z_95**2 / total
    middle = share + weight / 2
    spread = sqrt(share * (1 - share) * weight + weight**2 / 4)
    # At 0 and 1 rounding would put the share itself outside by one bit.
    return max(0.0, min(share, (middle - spread) / (1 + weight))), min(
        1.0, max(share, (middle + spread) / (1 + weight))
    )


def bootstrap_interval(groups: Sequence[Sequence[float]], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of the groups' means (Efron 1979); the members of each group are drawn again.

    Args:
        groups: for each task, the share of right images of each prompt.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        means += values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1) / len(groups)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
