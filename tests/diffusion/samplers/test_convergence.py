"""Order of convergence on a mixture, over levels at equal distances in log SNR that never reach zero noise."""

from __future__ import annotations

import math
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.denoise import Step
from latentdiff.diffusion.samplers import get_sampler, unipc
from latentdiff.diffusion.schedule import Schedule
from tests import analytic

SD = Schedule(ScheduleConfig())
X = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
STEPS = (20, 40, 80, 160)
METHODS: dict[str, Step] = {
    "ddim": get_sampler("ddim").step,
    "euler": get_sampler("euler").step,
    "dpmpp-2m": get_sampler("dpmpp-2m").step,
    "unipc": get_sampler("unipc").step,
    "unipc-3": partial(unipc.step, order=3),
    "unip-1": partial(unipc.step, order=1, correct=False),
    "unip-2": partial(unipc.step, order=2, correct=False),
}


@cache
def exact() -> Tensor:
    first, *_, last = analytic.uniform_log_snr_levels(1)
    return analytic.flow(analytic.mixture(), X, first, last)


def error(name: str, steps: int) -> float:
    levels = analytic.uniform_log_snr_levels(steps)
    found = analytic.sample(analytic.mixture(), X, levels, METHODS[name])
    return (found - exact()).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("name", "expected", "low", "high"),
    [
        ("ddim", (8.32e-2, 4.24e-2, 2.13e-2, 1.07e-2), 0.9, 1.1),
        ("euler", (8.32e-2, 4.24e-2, 2.13e-2, 1.07e-2), 0.9, 1.1),
        ("dpmpp-2m", (1.41e-2, 3.32e-3, 8.03e-4, 1.97e-4), 1.9, 2.15),
        ("unipc", (5.39e-3, 7.1e-4, 9.2e-5, 1.18e-5), 2.8, 3.2),
        ("unipc-3", (2.86e-3, 1.9e-4, 1.3e-5, 9.1e-7), 3.6, 4.2),
        ("unip-1", (8.32e-2, 4.24e-2, 2.13e-2, 1.07e-2), 0.9, 1.1),
        ("unip-2", (1.41e-2, 3.32e-3, 8.03e-4, 1.97e-4), 1.9, 2.15),
    ],
)
def test_order_of_convergence(name: str, expected: tuple[float, ...], low: float, high: float) -> None:
    errors = [error(name, steps) for steps in STEPS]
    assert errors == pytest.approx(expected, rel=0.03)
    *_, slope = (math.log2(coarse / fine) for coarse, fine in pairwise(errors))
    assert low < slope < high


@pytest.mark.parametrize(("predictor", "sampler"), [("unip-1", "ddim"), ("unip-2", "dpmpp-2m")])
@pytest.mark.parametrize("steps", [2, 3, 7, 40])
def test_the_predictor_alone_is_an_older_solver(predictor: str, sampler: str, steps: int) -> None:
    """To the last bits: what differs is the order of one multiplication."""
    for levels in (analytic.uniform_log_snr_levels(steps), SD.levels(steps, "trailing")[:-1]):
        found, expected = (
            analytic.sample(analytic.mixture(), X, levels, METHODS[name]) for name in (predictor, sampler)
        )
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_constant_prediction_is_solved_exactly(order: int) -> None:
    """Then x0 has no slope to weigh, whatever the distances between the levels."""
    denoiser, x0 = analytic.gaussian(0.3, 0.0), 0.3
    for levels in (SD.levels(9, "trailing")[:-1], SD.levels(30, "leading")):
        found = analytic.sample(denoiser, X, levels, partial(unipc.step, order=order))
        expected = levels[-1].alpha * x0 + levels[-1].sigma / levels[0].sigma * (X - levels[0].alpha * x0)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
