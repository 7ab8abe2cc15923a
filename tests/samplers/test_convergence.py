"""Order of convergence on a mixture, over levels at equal distances in log SNR that never reach zero noise."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from latentdiff.samplers import get_sampler
from tests import analytic

X = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
STEPS = (20, 40, 80, 160)


@cache
def exact() -> Tensor:
    first, *_, last = analytic.uniform_log_snr_levels(1)
    return analytic.flow(analytic.mixture(), X, first, last)


def error(name: str, steps: int) -> float:
    levels = analytic.uniform_log_snr_levels(steps)
    found = analytic.sample(analytic.mixture(), X, levels, get_sampler(name).step)
    return (found - exact()).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("name", "expected", "low", "high"),
    [
        ("ddim", (8.32e-2, 4.24e-2, 2.13e-2, 1.07e-2), 0.9, 1.1),
        ("euler", (8.32e-2, 4.24e-2, 2.13e-2, 1.07e-2), 0.9, 1.1),
        ("dpmpp-2m", (1.41e-2, 3.32e-3, 8.03e-4, 1.97e-4), 1.9, 2.15),
    ],
)
def test_order_of_convergence(name: str, expected: tuple[float, ...], low: float, high: float) -> None:
    errors = [error(name, steps) for steps in STEPS]
    assert errors == pytest.approx(expected, rel=0.01)
    *_, slope = (math.log2(coarse / fine) for coarse, fine in pairwise(errors))
    assert low < slope < high
