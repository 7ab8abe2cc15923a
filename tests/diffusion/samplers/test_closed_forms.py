"""Samplers on distributions whose exact denoiser is known: means, variances, equalities and inversion in closed
form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.denoise import Step
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.samplers import SAMPLERS, get_sampler
from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule, posterior_variance
from tests import analytic

SD = Schedule(ScheduleConfig())
TO_ONE = Schedule(ScheduleConfig(set_alpha_to_one=True))
ZERO_SNR = Schedule(
    ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
)


def moments(step: Step, denoiser: Denoiser, levels: list[Level], mean: float, variance: float) -> tuple[float, float]:
    """The exact mean and variance at the last level of a sampler that is affine in x and in its noise.

    Each step is read off at three points: x = 0, x = 1, and x = 0 with unit noise.
    """
    probes = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    unit = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    for level, next_level in pairwise(levels):
        (shift, end, noisy), _ = step(denoiser, probes, level, next_level, None, lambda: unit)
        mean = (shift + (end - shift) * mean).item()
        variance = ((end - shift) ** 2 * variance + (noisy - shift) ** 2).item()
    return mean, variance


# DDIM


@pytest.mark.parametrize(("steps", "std"), [(10, 0.88036), (20, 0.93686), (50, 0.97361), (100, 0.98654)])
def test_ddim_on_unit_normal_data_leading(steps: int, std: float) -> None:
    levels = SD.levels(steps, "leading")
    found = math.sqrt(moments(get_sampler("ddim").step, analytic.gaussian(0.0, 1.0), levels, 0.0, 1.0)[1])
    angles = [math.acos(level.alpha) for level in levels]
    assert found == pytest.approx(math.prod(math.cos(t - s) for t, s in pairwise(angles)), rel=1e-12)
    assert found == pytest.approx(std, abs=5e-6)


@pytest.mark.parametrize(("steps", "std"), [(10, 0.86848), (20, 0.92948), (50, 0.96951), (100, 0.98395)])
def test_ddim_on_unit_normal_data_trailing(steps: int, std: float) -> None:
    levels = TO_ONE.levels(steps, "trailing")
    _, variance = moments(get_sampler("ddim").step, analytic.gaussian(0.0, 1.0), levels, 0.0, 1.0)
    assert math.sqrt(variance) == pytest.approx(std, abs=5e-6)


@pytest.mark.parametrize(("steps", "loss"), [(10, 0.2250), (20, 0.1223), (50, 0.0521), (100, 0.0267)])
def test_ddim_inversion_is_the_step_over_the_reversed_levels(steps: int, loss: float) -> None:
    """On unit-normal data each step is a factor cos, up as well as down, so there and back is known exactly."""
    levels, step = SD.levels(steps, "leading"), get_sampler("ddim").step
    x0 = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    inverted = analytic.sample(analytic.gaussian(0.0, 1.0), x0, levels[::-1], step)
    back = analytic.sample(analytic.gaussian(0.0, 1.0), inverted, levels, step)
    angles = [math.acos(level.alpha) for level in levels]
    product = math.prod(math.cos(t - s) ** 2 for t, s in pairwise(angles))
    torch.testing.assert_close(back, product * x0, rtol=1e-12, atol=1e-12)
    assert 1.0 - product == pytest.approx(loss, abs=5e-5)


def test_ddim_inversion_error_falls_linearly() -> None:
    def error(steps: int) -> float:
        levels, step = SD.levels(steps, "linspace"), get_sampler("ddim").step
        x0 = torch.linspace(-1.5, 1.5, 101, dtype=torch.float64)
        inverted = analytic.sample(analytic.mixture(), x0, levels[::-1], step)
        return (analytic.sample(analytic.mixture(), inverted, levels, step) - x0).square().mean().sqrt().item()

    errors = [error(steps) for steps in (50, 100, 200)]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(0.85 < slope < 1.15 for slope in slopes)


# DDPM

ANCHORS = [(0.25, 10, 0.1283), (0.25, 50, 0.2032), (0.25, 1000, 0.2452), (0.04, 50, 0.02322)]


@pytest.mark.parametrize(("data_variance", "steps", "expected"), ANCHORS)
def test_ddpm_variance_on_gaussian_data(data_variance: float, steps: int, expected: float) -> None:
    ddpm = get_sampler("ddpm")
    levels = ddpm.levels(SD, steps, "trailing")
    start = levels[0]
    exact = (start.alpha * 0.3, start.alpha_cumprod * data_variance + start.sigma**2)
    mean, variance = moments(ddpm.step, analytic.gaussian(0.3, math.sqrt(data_variance)), levels, *exact)
    assert mean == pytest.approx(0.3, abs=1e-12)
    assert variance == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("name", SAMPLERS)
@given(steps=st.integers(1, 60), mean=st.floats(-2.0, 2.0), std=st.floats(0.1, 2.0))
def test_the_mean_is_exact_at_every_number_of_steps(name: str, steps: int, mean: float, std: float) -> None:
    sampler = get_sampler(name).over(TO_ONE, steps)
    levels = sampler.levels(TO_ONE, steps, "trailing")
    x = torch.tensor([levels[0].alpha * mean], dtype=torch.float64)  # the mean of the noisy data
    noise = analytic.FixedNoise(torch.zeros_like(x))
    found = analytic.sample(analytic.gaussian(mean, std), x, levels, sampler.step, noise=noise)
    within = 1e-4 if name == "lcm" else 1e-9  # its boundary condition lets a trace of x through
    assert found.item() == pytest.approx(levels[-1].alpha * mean, abs=within)


@given(steps=st.integers(1, 100), mean=st.floats(-2.0, 2.0))
def test_ddpm_is_exact_for_a_single_point(steps: int, mean: float) -> None:
    """Between any two levels the noisy point keeps exactly the level's own variance."""
    ddpm = get_sampler("ddpm")
    levels = ddpm.levels(SD, steps, "trailing")
    for end in range(1, len(levels)):
        found = moments(
            ddpm.step, analytic.gaussian(mean, 0.0), levels[end - 1 : end + 1], 0.0, levels[end - 1].sigma ** 2
        )
        assert found[1] == pytest.approx(levels[end].sigma ** 2, abs=1e-12)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("schedule", [TO_ONE, ZERO_SNR], ids=["plain", "zero-snr"])
@given(steps=st.integers(1, 60), seed=st.integers(0, 100))
def test_ddim_with_eta_one_is_ddpm(schedule: Schedule, spacing: str, steps: int, seed: int) -> None:
    x = NoiseStream([seed], (1, 4, 4), dtype=torch.float64)()
    finals = []
    for sampler, levels in (
        (get_sampler("ddim", eta=1.0), [*schedule.levels(steps, spacing)[:-1], NOISE_FREE]),
        (get_sampler("ddpm"), get_sampler("ddpm").levels(schedule, steps, spacing)),
    ):
        noise = NoiseStream([seed + 1], (1, 4, 4), dtype=torch.float64)
        finals.append(analytic.sample(analytic.gaussian(0.3, 0.5), x, levels, sampler.step, noise=noise))
    torch.testing.assert_close(*finals, rtol=1e-9, atol=1e-9)


def test_ddim_with_eta_one_survives_rounding_next_to_the_clean_end() -> None:
    level, next_level = Level(0.0, 0.09904253123841464), Level(0.0, 1.0 - 3 * 2.0**-53)
    assert posterior_variance(level, next_level) > next_level.sigma**2, "the case that the sampler has to survive"
    x = torch.ones(1, dtype=torch.float64)
    found, _ = get_sampler("ddim", eta=1.0).step(analytic.gaussian(0.3, 0.5), x, level, next_level, None, lambda: x)
    assert torch.isfinite(found).all()


# Euler


@given(steps=st.integers(1, 50), seed=st.integers(0, 100))
def test_euler_steps_along_sigma_hat(steps: int, seed: int) -> None:
    """The step as it is computed equals the step as it is defined, in EDM's variables."""
    euler, x = get_sampler("euler"), NoiseStream([seed], (1, 4, 4), dtype=torch.float64)()
    for level, next_level in pairwise(euler.levels(SD, steps, "linspace")):
        slope = analytic.mixture()(x, level).eps
        expected = next_level.alpha * (x / level.alpha + (next_level.sigma_hat - level.sigma_hat) * slope)
        found, _ = euler.step(analytic.mixture(), x, level, next_level, None, None)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        x = found


# All samplers on a mixture: the data's own mean and variance come out


def mixture_moments() -> tuple[float, float]:
    mean = sum(w * m for w, m in zip(analytic.WEIGHTS, analytic.MEANS, strict=True))
    second = sum(w * (s**2 + m**2) for w, m, s in zip(analytic.WEIGHTS, analytic.MEANS, analytic.STDS, strict=True))
    return mean, second - mean**2


@pytest.mark.parametrize(
    ("name", "eta", "steps"),
    [
        ("ddim", 0.0, 250),
        ("ddim", 0.5, 500),
        ("ddpm", 0.0, 1000),
        ("euler", 0.0, 250),
        ("dpmpp-2m", 0.0, 50),
        ("unipc", 0.0, 50),
    ],
)
def test_mean_and_variance_of_a_mixture(name: str, eta: float, steps: int) -> None:
    sampler, count = get_sampler(name, eta=eta), 8000
    levels = sampler.levels(TO_ONE, steps, "trailing")
    start = levels[0]
    # Starting from the noisy data itself leaves the sampler's own error as the only one.
    x = noisy_mixture_quantiles(count, start).view(count, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        half = torch.randn(count // 2, 1, 1, 1, dtype=torch.float64, generator=generator)
        return torch.cat([half, -half])[torch.randperm(count, generator=generator)]

    final = analytic.sample(analytic.mixture(), x, levels, sampler.step, noise=noise)
    mean, variance = mixture_moments()
    assert final.mean().item() == pytest.approx(mean, abs=0.02)
    assert final.var().item() == pytest.approx(variance, rel=0.03)


def noisy_mixture_quantiles(count: int, level: Level) -> Tensor:
    """Evenly weighted points of the mixture diffused to `level`, by inverting its distribution function."""
    grid = torch.linspace(-6.0, 6.0, 20_001, dtype=torch.float64)
    cdf = sum(
        w * torch.special.ndtr((grid - level.alpha * m) / math.sqrt((level.alpha * s) ** 2 + level.sigma**2))
        for w, m, s in zip(analytic.WEIGHTS, analytic.MEANS, analytic.STDS, strict=True)
    )
    return grid[torch.searchsorted(cdf, (torch.arange(count, dtype=torch.float64) + 0.5) / count)]


# Zero terminal SNR


@pytest.mark.parametrize(("mean", "std", "bias"), [(0.8, 0.5, -0.0274), (-0.9, 0.2, 0.0123)])
def test_zero_terminal_snr_takes_the_bias_from_the_start(mean: float, std: float, bias: float) -> None:
    """Noisy data at the last timestep are not quite N(0, 1); starting as if they were shifts the mean of all
    samples."""
    ddim, data = get_sampler("ddim"), analytic.gaussian(mean, std)
    last = TO_ONE.level(999)
    expected = -last.alpha * mean * std / math.sqrt((last.alpha * std) ** 2 + last.sigma**2)
    assert expected == pytest.approx(bias, abs=5e-5)
    found, _ = moments(ddim.step, data, TO_ONE.levels(1000, "trailing"), 0.0, 1.0)
    assert found - mean == pytest.approx(expected, rel=0.02)
    found, _ = moments(ddim.step, data, ZERO_SNR.levels(1000, "trailing"), 0.0, 1.0)
    assert found == pytest.approx(ZERO_SNR.clean.alpha * mean, abs=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_stays_finite(name: str) -> None:
    noise = NoiseStream([0], (1, 4, 4), dtype=torch.float64)
    for steps in (1, 2, 10, 50):
        sampler = get_sampler(name).over(ZERO_SNR, steps)
        levels = sampler.levels(ZERO_SNR, steps)
        assert torch.isfinite(
            analytic.sample(analytic.gaussian(0.3, 0.5), noise(), levels, sampler.step, noise=noise)
        ).all()
