"""Brownian paths: their moments, that asking in another order or more finely changes nothing, and whose they are."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.diffusion.brownian import BrownianNoise, BrownianPath
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.samplers import get_sampler
from latentdiff.diffusion.schedule import Schedule
from tests import analytic

SHAPE = (4, 60, 60)
CLOCKS = (0.0047, 0.03, 0.3, 0.7, 1.0, 1.9, 3.0, 40.0, 1170.0)
SD = Schedule(ScheduleConfig(set_alpha_to_one=True))


def test_increments_are_independent_normals_of_the_length_of_time() -> None:
    path = BrownianPath(3, SHAPE)
    increments = [(path(b) - path(a)) / math.sqrt(b - a) for a, b in pairwise(CLOCKS)]
    for one in increments:
        assert one.mean().abs() < 0.04 and one.var().item() == pytest.approx(1.0, abs=0.05)
        assert one.pow(4).mean().item() == pytest.approx(3.0, abs=0.4)
    correlations = torch.corrcoef(torch.stack([one.flatten() for one in increments])) - torch.eye(len(increments))
    assert correlations.abs().max() < 0.04


@settings(max_examples=15)
@given(first=st.floats(1e-3, 1e3), second=st.floats(1e-3, 1e3))
def test_the_covariance_is_the_earlier_of_two_times(first: float, second: float) -> None:
    """Seen from W(1) = 0: min - 1 above 1, 1 - max below, 0 across."""
    path = BrownianPath(11, SHAPE)
    found = (path(first) * path(second)).mean().item()
    low, high = sorted((first, second))
    expected = low - 1.0 if low > 1.0 else 1.0 - high if high < 1.0 else 0.0
    spread = math.sqrt(abs(first - 1.0) * abs(second - 1.0))
    assert found == pytest.approx(expected, abs=0.05 * spread + 1e-9)


def test_the_order_of_asking_changes_nothing() -> None:
    forth, back = BrownianPath(1, (2, 3, 3)), BrownianPath(1, (2, 3, 3))
    for value, again in zip([forth(c) for c in CLOCKS], [back(c) for c in CLOCKS[::-1]][::-1], strict=True):
        assert torch.equal(value, again)


@settings(max_examples=20)
@given(places=st.lists(st.floats(0.03, 14.0), min_size=1, max_size=6, unique=True))
def test_the_increment_of_a_step_is_the_sum_of_those_of_smaller_ones(places: list[float]) -> None:
    noise, sigmas = BrownianNoise([4, 5], (2, 3, 3)), sorted({14.6, 0.029, *places}, reverse=True)
    whole = noise.between(sigmas[0], sigmas[-1]) * math.sqrt(sigmas[-1] ** -2 - sigmas[0] ** -2)
    parts = sum(noise.between(a, b) * math.sqrt(b**-2 - a**-2) for a, b in pairwise(sigmas))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


def test_a_path_belongs_to_a_seed_and_is_no_part_of_its_stream() -> None:
    batch, alone = NoiseStream([7, 8], (2, 3, 3)), NoiseStream([8], (2, 3, 3))
    assert torch.equal(batch.between(3.0, 1.0)[1:], alone.between(3.0, 1.0))
    assert not torch.equal(batch.between(3.0, 1.0)[0], batch.between(3.0, 1.0)[1])
    assert torch.equal(alone(), NoiseStream([8], (2, 3, 3))()), "the stream goes on as if nothing had been asked"


@pytest.mark.parametrize("name", ["dpmpp-2m-sde", "dpmpp-3m-sde", "dpmpp-sde"])
def test_the_noise_of_a_walk_does_not_depend_on_the_number_of_steps(name: str) -> None:
    """For a single point x0 stays what it is, and the steps are exact: what is left is the noise of the path."""
    found = []
    for steps in (4, 9, 31):
        sampler, noise = get_sampler(name).over(SD, steps), NoiseStream([0], (1, 4, 4), dtype=torch.float64)
        levels = sampler.levels(SD, steps, "karras")[:-1]  # from 14.6 to 0.03, without the step to no noise
        found.append(analytic.sample(analytic.gaussian(0.3, 0.0), noise(), levels, sampler.step, noise=noise))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)
