"""The newer samplers against closed forms: order of convergence, variance, equalities and limits."""

from __future__ import annotations

import math
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.denoise import denoise
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.samplers import (
    dpm2,
    dpmpp_2s,
    dpmpp_multistep_sde,
    dpmpp_sde,
    get_sampler,
    heun,
    lms,
    pndm,
    restart,
)
from latentdiff.diffusion.samplers.churn import Churn
from latentdiff.diffusion.samplers.split import split
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.errors import UsageError
from tests import analytic

SD = Schedule(ScheduleConfig())
TO_ONE = Schedule(ScheduleConfig(set_alpha_to_one=True))
X = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
OF_SCHEDULE = {"schedule": analytic.Continuous()}

ORDERS = {
    "heun": (heun.step, 2),
    "dpm2": (partial(dpm2.step, **OF_SCHEDULE), 2),
    "dpmpp-2s": (dpmpp_2s.alternating_step, 2),
    "dpmpp-2s-a without noise": (partial(dpmpp_2s.step, **OF_SCHEDULE, eta=0.0), 2),
    "dpmpp-sde without noise": (partial(dpmpp_sde.step, **OF_SCHEDULE, eta=0.0), 2),
    "dpmpp-2m-sde without noise": (partial(dpmpp_multistep_sde.step, eta=0.0), 2),
    "lms-2": (partial(lms.step, order=2), 2),
    "euler-a without noise": (get_sampler("euler-a", eta=0.0).step, 1),
}


@cache
def exact() -> Tensor:
    first, *_, last = analytic.uniform_log_snr_levels(1)
    return analytic.flow(analytic.mixture(), X, first, last)


def error(step, steps: int) -> float:
    found = analytic.sample(analytic.mixture(), X, analytic.uniform_log_snr_levels(steps), step)
    return (found - exact()).square().mean().sqrt().item()


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str) -> None:
    step, order = ORDERS[name]
    coarse, fine = error(step, 80), error(step, 160)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("order", [2, 3])
def test_order_of_the_multistep_sde_solver_after_an_exact_start(order: int) -> None:
    """Two for both: 3M weighs the curvature as k-diffusion and diffusers do, half of what a third order would take."""
    step = partial(dpmpp_multistep_sde.step, eta=0.0, order=order)

    def error_after_exact_start(steps: int) -> float:
        levels = analytic.uniform_log_snr_levels(steps)

        def exact_at_first(x: Tensor, level: Level) -> Tensor:
            return analytic.gaussian_flow(X, levels[0], level, 0.3, 0.5) if level in levels[:3] else x

        *_, last = denoise(analytic.gaussian(0.3, 0.5), X, levels, step, after_step=exact_at_first)
        return (last.x - analytic.gaussian_flow(X, levels[0], levels[-1], 0.3, 0.5)).square().mean().sqrt().item()

    assert math.log2(error_after_exact_start(80) / error_after_exact_start(160)) == pytest.approx(2, abs=0.25)


def test_heun_has_the_published_errors() -> None:
    assert error(heun.step, 80) == pytest.approx(1.31e-3, rel=0.03)


@pytest.mark.parametrize(("step", "name"), [(lms.step, "lms"), (partial(pndm.step, **OF_SCHEDULE), "pndm")])
def test_the_longer_multistep_methods_beat_the_second_order(step, name: str) -> None:
    assert error(step, 160) < 0.5 * error(heun.step, 160), name


def test_the_sde_solver_without_noise_is_dpmpp_2m() -> None:
    levels = SD.levels(12, "trailing")[:-1]
    found = analytic.sample(analytic.mixture(), X, levels, ORDERS["dpmpp-2m-sde without noise"][0])
    expected = analytic.sample(analytic.mixture(), X, levels, get_sampler("dpmpp-2m").step)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_euler_ancestral_is_ddpm_on_the_same_levels() -> None:
    levels, noise = (
        get_sampler("ddpm").levels(SD, 9, "trailing"),
        [NoiseStream([1], (1, 4, 4), dtype=torch.float64) for _ in range(2)],
    )
    x = NoiseStream([0], (1, 4, 4), dtype=torch.float64)()
    found, expected = (
        analytic.sample(analytic.mixture(), x, levels, get_sampler(name).step, noise=own)
        for name, own in zip(("euler-a", "ddpm"), noise, strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_split_keeps_the_variance() -> None:
    for eta in (0.0, 0.3, 1.0):
        down, up = split(3.0, 1.0, eta)
        assert down**2 + up**2 == pytest.approx(1.0)
    assert split(3.0, 1.0, 1.0)[1] == pytest.approx(math.sqrt(8.0 / 9.0))
    assert split(3.0, 1.0, 0.0) == (1.0, 0.0) and split(3.0, 0.0, 1.0) == (0.0, 0.0)
    with pytest.raises(UsageError, match="must lower the noise level"):
        split(1.0, 3.0, 1.0)


def moments(step, denoiser, levels: list[Level], mean: float, variance: float) -> tuple[float, float]:
    """The exact mean and variance at the last level of a sampler that is affine in x and in the noise of its steps."""
    probes = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    noise = analytic.FixedNoise(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    for level, next_level in pairwise(levels):
        (shift, end, noisy), _ = step(denoiser, probes, level, next_level, None, noise)
        mean, variance = (
            (shift + (end - shift) * mean).item(),
            ((end - shift) ** 2 * variance + (noisy - shift) ** 2).item(),
        )
    return mean, variance


@pytest.mark.parametrize("name", ["euler-a", "dpm2-a", "dpmpp-2s-a", "dpmpp-2m-sde", "ddpm"])
def test_the_variance_of_a_single_point_is_that_of_each_level(name: str) -> None:
    sampler = get_sampler(name).over(TO_ONE, 15)
    levels = sampler.levels(TO_ONE, 15, "trailing")[:-1]
    mean, variance = moments(
        sampler.step, analytic.gaussian(0.3, 0.0), levels, levels[0].alpha * 0.3, levels[0].sigma ** 2
    )
    assert mean == pytest.approx(levels[-1].alpha * 0.3) and variance == pytest.approx(levels[-1].sigma ** 2, rel=1e-9)


@pytest.mark.parametrize("name", ["euler-a", "dpm2-a", "dpmpp-2s-a", "dpmpp-2m-sde"])
def test_the_variance_of_gaussian_data_comes_out_of_many_steps(name: str) -> None:
    sampler = get_sampler(name).over(TO_ONE, 400)
    first, *_ = levels = sampler.levels(TO_ONE, 400, "karras")
    start = first.alpha * 0.3, first.alpha_cumprod * 0.25 + first.sigma**2
    mean, variance = moments(sampler.step, analytic.gaussian(0.3, 0.5), levels, *start)
    assert mean == pytest.approx(0.3, abs=1e-6) and variance == pytest.approx(0.25, rel=0.03)


def test_s_noise_scales_the_noise_of_every_step() -> None:
    level, next_level = SD.level(600), SD.level(300)
    noise = analytic.FixedNoise(torch.ones_like(X))
    for name in ("euler-a", "dpm2-a", "dpmpp-2s-a", "dpmpp-2m-sde", "dpmpp-3m-sde"):
        none, one, two = (
            get_sampler(name, s_noise=factor)
            .over(SD, 10)
            .step(analytic.gaussian(0.3, 0.0), X, level, next_level, None, noise)[0]
            for factor in (0.0, 1.0, 2.0)
        )
        torch.testing.assert_close(two - none, 2.0 * (one - none))
        assert (one - none).abs().max() > 0.1


# Churn


def test_churn_raises_the_level_and_only_within_its_range() -> None:
    churn = Churn(amount=4.0, low=0.5, high=5.0)
    level = SD.at_sigma_hat(2.0)
    assert churn.raised(level, 20, SD).sigma_hat == pytest.approx(2.0 * 1.2)
    assert churn.raised(level, 2, SD).sigma_hat == pytest.approx(2.0 * math.sqrt(2.0))
    for outside in (0.4, 6.0):
        assert churn.raised(SD.at_sigma_hat(outside), 20, SD).sigma_hat == pytest.approx(outside)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2"])
def test_churn_of_a_single_point_is_gone_at_the_next_level(name: str) -> None:
    """The step is exact there: what was stirred in keeps the variance of the raised level, which shrinks to the next."""
    sampler = get_sampler(name, s_churn=10.0).over(SD, 10)
    level, next_level = SD.level(600), SD.level(300)
    mean, variance = moments(
        sampler.step, analytic.gaussian(0.3, 0.0), [level, next_level], level.alpha * 0.3, level.sigma**2
    )
    assert mean == pytest.approx(next_level.alpha * 0.3) and variance == pytest.approx(next_level.sigma**2)
    assert get_sampler(name, s_churn=0.0).over(SD, 10).churn.amount == 0.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "ddim", "s_churn": 1.0}, "s_churn belongs to the samplers euler, heun, dpm2"),
        ({"name": "euler", "s_churn": -1.0}, "s_churn must be"),
        ({"name": "euler", "s_churn": 1.0, "s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin and s_tmax"),
        ({"name": "heun", "s_noise": 1.1}, "heun draws none"),
        ({"name": "euler", "sde_noise": "draws"}, "sde_noise belongs to"),
    ],
)
def test_options_of_another_sampler_are_refused(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        get_sampler(**options)


# LCM and TCD


def test_lcm_keeps_what_its_consistency_function_says() -> None:
    """At a large timestep that is x0; with noise of the next level on top."""
    level, next_level = SD.level(799), SD.level(399)
    zero, one = analytic.FixedNoise(torch.zeros_like(X)), analytic.FixedNoise(torch.ones_like(X))
    step, x0 = get_sampler("lcm").step, analytic.mixture()(X, level).x0
    quiet, _ = step(analytic.mixture(), X, level, next_level, None, zero)
    noisy, _ = step(analytic.mixture(), X, level, next_level, None, one)
    torch.testing.assert_close(quiet, next_level.alpha * x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noisy - quiet, torch.full_like(X, next_level.sigma))


def test_tcd_ranges_from_ddim_to_the_clean_end_and_back() -> None:
    level, next_level, noise = SD.level(799), SD.level(399), analytic.FixedNoise(torch.ones_like(X))
    prediction = analytic.mixture()(X, level)
    found, _ = get_sampler("tcd", eta=0.0).over(SD, 4).step(analytic.mixture(), X, level, next_level, None, noise)
    torch.testing.assert_close(found, next_level.alpha * prediction.x0 + next_level.sigma * prediction.eps)
    variance = moments(
        get_sampler("tcd", eta=0.3).over(SD, 4).step,
        analytic.gaussian(0.3, 0.0),
        [level, next_level],
        0.0,
        level.sigma**2,
    )[1]
    assert variance == pytest.approx(next_level.sigma**2)


def test_lcm_and_tcd_are_customary_with_four_steps_and_no_guidance() -> None:
    for name in ("lcm", "tcd"):
        sampler = get_sampler(name)
        assert (sampler.customary_steps, sampler.customary_guidance) == (4, 1.0)
        assert [level.t for level in sampler.levels(SD, 4)[:-1]] == [999.0, 759.0, 499.0, 259.0]
        with pytest.raises(UsageError, match="steps must be 1 to 50 with the spacing lcm"):
            sampler.levels(SD, 51)


# Restart


@pytest.mark.parametrize(("steps", "times", "again"), [(19, 0, 0), (20, 1, 9), (35, 1, 9), (36, 2, 9), (50, 2, 12)])
def test_restart_spends_as_many_steps_as_are_asked(steps: int, times: int, again: int) -> None:
    assert restart.repeats(steps) == (times, again)
    levels = get_sampler("restart").levels(SD, steps)
    ups = [(a, b) for a, b in pairwise(levels) if b.alpha_cumprod < a.alpha_cumprod]
    assert len(ups) == times and len(levels) - 1 == steps + times
    for low, high in ups:
        assert low.sigma_hat < 0.3 and 1.3 < high.sigma_hat < 3.0


def test_going_back_up_keeps_the_distribution() -> None:
    low, high = SD.level(100), SD.level(500)
    mean, variance = moments(
        restart.step, analytic.gaussian(0.3, 0.5), [low, high], low.alpha * 0.3, low.alpha_cumprod * 0.25 + low.sigma**2
    )
    assert mean == pytest.approx(high.alpha * 0.3) and variance == pytest.approx(
        high.alpha_cumprod * 0.25 + high.sigma**2
    )


# Two evaluations


@pytest.mark.parametrize(
    ("name", "calls"),
    [("euler", 10), ("heun", 19), ("dpm2", 19), ("dpmpp-2s-a", 19), ("dpmpp-sde", 19), ("pndm", 11), ("lms", 10)],
)
def test_calls_of_the_model_are_known_beforehand(name: str, calls: int) -> None:
    sampler, counted = get_sampler(name).over(SD, 10), []

    def counting(x: Tensor, level: Level):
        counted.append(level)
        return analytic.mixture()(x, level)

    levels = sampler.levels(SD, 10)
    analytic.sample(
        counting, X.view(1, 1, 1, -1), levels, sampler.step, noise=NoiseStream([0], (1, 1, 101), dtype=torch.float64)
    )
    assert len(counted) == sampler.calls(levels) == calls
