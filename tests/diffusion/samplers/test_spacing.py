"""The spacings of noise levels against their definitions in the programs that they come from, and levels of one's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.samplers import NOISE_SPACINGS, get_sampler
from latentdiff.diffusion.samplers.beta import beta_quantile
from latentdiff.diffusion.samplers.spacing import ALIGNED_SD
from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule
from latentdiff.errors import UsageError

SD = Schedule(ScheduleConfig())
TABLE = np.exp(SD.log_sigma_hats)
EULER = get_sampler("euler")


def levels(spacing: str, steps: int, **options) -> list[Level]:
    return EULER.levels(SD, steps, spacing, **options)


def sigmas(spacing: str, steps: int, **options) -> list[float]:
    return [level.sigma_hat for level in levels(spacing, steps, **options)]


def timesteps(spacing: str, steps: int) -> list[float]:
    return [level.t for level in levels(spacing, steps)[:-1]]


@pytest.mark.parametrize("steps", [5, 10, 25])
def test_those_in_timesteps(steps: int) -> None:
    assert timesteps("normal", steps) == pytest.approx(np.linspace(999, 0, steps))
    assert timesteps("sgm-uniform", steps) == pytest.approx(np.linspace(999, 0, steps + 1)[:-1])
    assert timesteps("simple", steps) == [999 - i * 1000 // steps for i in range(steps)]
    assert timesteps("ddim-uniform", steps) == list(range(1, 1000, 1000 // steps))[::-1]


def test_between_timesteps_noise_is_even_in_its_logarithm() -> None:
    level = levels("normal", 3)[1]
    assert level.t == 499.5 and level.sigma_hat == pytest.approx(math.sqrt(TABLE[499] * TABLE[500]))


def test_ddim_uniform_takes_more_steps_where_its_stride_does_not_come_out_even() -> None:
    assert len(levels("ddim-uniform", 30)) - 1 == 31


def test_those_in_noise() -> None:
    low, high = TABLE[0], TABLE[-1]
    assert (low, high) == pytest.approx((0.0292, 14.6146), abs=5e-5)
    ramp = np.linspace(0, 1, 8)
    expected = {
        "karras": (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
        "exponential": np.exp(np.log(high) + ramp * (np.log(low) - np.log(high))),
        "polyexponential": np.exp(np.log(high) + ramp * (np.log(low) - np.log(high))),
        "beta": low + stats.beta.ppf(1 - ramp, 0.6, 0.6) * (high - low),
        "kl-optimal-comfy": np.tan(ramp * np.arctan(low) + (1 - ramp) * np.arctan(high)),
    }
    for spacing, values in expected.items():
        assert sigmas(spacing, 8) == pytest.approx([*values, 0.0], rel=1e-7), spacing


def test_rho() -> None:
    low, high = TABLE[0], TABLE[-1]
    ramp = np.linspace(1, 0, 6)
    expected = np.exp(ramp**3 * (np.log(high) - np.log(low)) + np.log(low))
    assert sigmas("polyexponential", 6, rho=3.0)[:-1] == pytest.approx(expected)
    assert sigmas("karras", 6, rho=1.0)[:-1] == pytest.approx(np.linspace(high, low, 6))
    with pytest.raises(UsageError, match="rho is a number above 0 for the spacings karras and polyexponential"):
        levels("beta", 6, rho=3.0)
    with pytest.raises(UsageError, match="rho belongs to spacings that are even in noise"):
        levels("trailing", 6, rho=3.0)


def test_kl_optimal_of_the_web_ui_ends_at_the_least_noise() -> None:
    steps, low, high = 9, math.atan(TABLE[0]), math.atan(TABLE[-1])
    expected = [math.tan(i / steps * low + (1 - i / steps) * high) for i in range(steps + 1)]
    *noisy, end = levels("kl-optimal", steps)
    assert [level.sigma_hat for level in (*noisy, end)] == pytest.approx(expected)
    assert end.is_clean and not noisy[-1].is_clean


def test_beta_of_comfyui_is_whole_timesteps_each_once() -> None:
    for steps in (5, 20, 60):
        quantiles = stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6)
        expected = list(dict.fromkeys(np.rint(quantiles * 999).astype(int)))
        assert timesteps("beta-comfy", steps) == expected


def test_beta_quantiles_are_those_of_scipy() -> None:
    share = np.linspace(0, 1, 501)
    assert np.abs(beta_quantile(share, 0.6) - stats.beta.ppf(share, 0.6, 0.6)).max() < 1e-9


def test_align_your_steps_of_the_web_ui_is_the_published_list() -> None:
    assert sigmas("ays-a1111", 11) == pytest.approx([*ALIGNED_SD, 0.0])
    assert sigmas("ays-a1111", 21)[::2] == pytest.approx(ALIGNED_SD)
    assert sigmas("ays-a1111-xl", 11)[1] == pytest.approx(6.315)


def test_lcm_takes_from_the_fifty_timesteps_of_its_training() -> None:
    assert timesteps("lcm", 4) == [999, 759, 499, 259]
    assert timesteps("lcm", 50) == list(range(999, 0, -20))


@pytest.mark.parametrize("spacing", [*NOISE_SPACINGS, "trailing"])
def test_the_penultimate_level_can_be_left_out(spacing: str) -> None:
    if spacing == "beta-comfy":
        return  # repeats are dropped: one step more need not be one level more
    full = levels(spacing, 9)
    assert levels(spacing, 8, discard_penultimate=True) == [*full[:-2], full[-1]]


# Levels of one's own


def test_own_sigmas() -> None:
    expected = [SD.at_sigma_hat(sigma) for sigma in (14.0, 3.0, 0.2)]
    assert EULER.own_levels(SD, sigmas=[14.0, 3.0, 0.2]) == [*expected, NOISE_FREE]
    assert EULER.own_levels(SD, sigmas=(14.0, 3.0, 0.2, 0.0)) == [*expected, NOISE_FREE]
    for level in expected:
        assert SD.level(level.t).sigma_hat == pytest.approx(level.sigma_hat, rel=1e-3)


def test_own_timesteps_end_where_the_sampler_ends() -> None:
    for name, end in (("euler", NOISE_FREE), ("ddim", SD.clean)):
        found = get_sampler(name).own_levels(SD, timesteps=[900, 400.5, 3])
        assert [level.t for level in found[:-1]] == [900, 400.5, 3] and found[-1] == end


@pytest.mark.parametrize(
    "given",
    [
        {"sigmas": [1.0, 2.0]},
        {"sigmas": [1.0, 1.0]},
        {"sigmas": []},
        {"sigmas": [0.0]},
        {"sigmas": [1.0, -1.0]},
        {"timesteps": [3, 5]},
        {"timesteps": [1000, 5]},
        {},
        {"sigmas": [1.0], "timesteps": [5]},
    ],
    ids=str,
)
def test_own_levels_that_make_no_walk_are_refused(given: dict) -> None:
    with pytest.raises(UsageError, match="expected|must lie in"):
        EULER.own_levels(SD, **given)
