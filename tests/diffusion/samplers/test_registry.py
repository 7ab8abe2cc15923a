"""Samplers by name, the levels they walk, and the seed contract that all of them keep."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.samplers import SAMPLERS, SPACINGS, get_sampler
from latentdiff.diffusion.schedule import NOISE_FREE, Schedule
from latentdiff.errors import UsageError
from latentdiff.request.options import SamplerName, SpacingName
from tests import analytic

SD = Schedule(ScheduleConfig())
ALL = [(name, None) for name in SAMPLERS] + [("ddim", 0.5), ("ddim", 1.0)]


def test_the_names_are_these() -> None:
    assert tuple(SAMPLERS) == get_args(SamplerName)
    assert all(sampler.name == name for name, sampler in SAMPLERS.items())
    assert set(SPACINGS) == set(get_args(SpacingName))


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match="ddim, ddpm, euler, dpmpp-2m, unipc, .*restart, found 'plms'"):
        get_sampler("plms")


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(UsageError, match="eta must lie in 0 to 1"):
        get_sampler("ddim", eta=eta)


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.eta is None])
def test_eta_for_another_sampler_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"eta 0.5 with {name}"):
        get_sampler(name, eta=0.5)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "dpmpp-2m", "pndm", "tcd"])  # all ways to make levels
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_levels_fall_in_noise_at_every_number_of_steps(name: str, spacing: str, zero_snr: bool) -> None:
    schedule = Schedule(ScheduleConfig(rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"))
    for steps in (*range(1, 40), 61, 499, 500, 501, 998, 999, 1000):
        if spacing == "lcm" and steps > 50:
            continue
        levels = get_sampler(name).levels(schedule, steps, spacing)
        assert len(levels) == steps + 1 or spacing in ("ddim-uniform", "beta-comfy")
        *noisy, clean = levels
        assert clean.is_clean and not any(level.is_clean for level in noisy)
        assert all(level.alpha_cumprod < quieter.alpha_cumprod for level, quieter in pairwise(noisy))
        # The published last level of Align Your Steps, 0.029, lies a rounding below the smallest noise of the model, 0.0292.
        assert noisy[-1].alpha_cumprod <= clean.alpha_cumprod + 2e-5
        assert all(0 <= level.t <= schedule.num_train_timesteps - 1 for level in noisy)


def test_an_unknown_spacing_is_refused_with_the_choices() -> None:
    with pytest.raises(
        UsageError, match="leading, trailing, linspace, karras, uniform-lambda, ays, .*lcm, found 'even'"
    ):
        get_sampler("euler").levels(SD, 10, "even")


@pytest.mark.parametrize("spacing", ["karras", "uniform-lambda", "ays"])
@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(spacing: str, steps: int) -> None:
    with pytest.raises(UsageError, match="steps must be 1 to 1000"):
        get_sampler("euler").levels(SD, steps, spacing)


@pytest.mark.parametrize(
    ("spacing", "even"),
    [("karras", lambda level: level.sigma_hat ** (1 / 7)), ("uniform-lambda", lambda level: level.log_snr)],
)
@given(steps=st.integers(3, 200))
def test_levels_are_even_in_what_the_spacing_says(spacing: str, even, steps: int) -> None:
    *noisy, clean = get_sampler("euler").levels(SD, steps, spacing)
    assert clean == NOISE_FREE
    assert noisy[0].sigma_hat == pytest.approx(SD.level(999).sigma_hat)
    assert noisy[-1].sigma_hat == pytest.approx(SD.level(0).sigma_hat)
    gaps = [even(b) - even(a) for a, b in pairwise(noisy)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-6)


@pytest.mark.parametrize("spacing", ["karras", "uniform-lambda", "ays"])
def test_the_model_is_told_the_timestep_of_the_noise(spacing: str) -> None:
    for name, within in (("euler", 1e-3), ("ddim", 1e-3), ("unipc", 0.5)):
        for level in get_sampler(name).levels(SD, 17, spacing)[:-1]:
            after = min(math.floor(level.t + within + 1e-9) + 1, 999)
            before = max(math.ceil(level.t - within - 1e-9) - 1, 0)
            assert SD.level(before).sigma_hat * 0.9999 <= level.sigma_hat <= SD.level(after).sigma_hat * 1.0001
            assert name != "unipc" or level.t == int(level.t)


def test_other_numbers_of_aligned_steps_are_between_the_ten() -> None:
    ten, twenty = (get_sampler("euler").levels(SD, steps, "ays") for steps in (10, 20))
    assert [level.sigma_hat for level in twenty[:-1:2]] == pytest.approx([level.sigma_hat for level in ten[:-1]])
    for low, high, between in zip(ten[1:-1], ten, twenty[1::2], strict=False):
        assert between.sigma_hat == pytest.approx(math.sqrt(low.sigma_hat * high.sigma_hat))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddim", "pndm", "tcd")])
def test_all_but_ddim_and_its_kin_end_without_noise(name: str) -> None:
    assert SD.clean.sigma > 0.0
    assert get_sampler(name).levels(SD, 10)[-1].sigma == 0.0


@pytest.mark.parametrize(("name", "eta"), ALL)
@given(steps=st.integers(1, 12), first_seed=st.integers(0, 2**32), images=st.integers(1, 8))
def test_image_i_of_a_batch_is_the_image_made_alone(
    name: str, eta: float | None, steps: int, first_seed: int, images: int
) -> None:
    sampler, shape = get_sampler(name, eta=eta).over(SD, steps), (2, 3, 3)
    levels = sampler.levels(SD, steps, "trailing")

    def make(seeds: list[int]) -> torch.Tensor:
        stream = NoiseStream(seeds, shape)
        x = stream() * sampler.start_scale(SD, "trailing")
        return analytic.sample(analytic.mixture(), x, levels, sampler.step, noise=stream)

    seeds = [first_seed + i for i in range(images)]
    torch.testing.assert_close(make(seeds), torch.cat([make([seed]) for seed in seeds]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_keep_the_precision_of_the_latents(name: str) -> None:
    sampler = get_sampler(name).over(SD, 3)
    for dtype in (torch.float32, torch.float64):
        stream = NoiseStream([0], (2, 3, 3), dtype=dtype)
        assert (
            analytic.sample(analytic.mixture(), stream(), sampler.levels(SD, 3), sampler.step, noise=stream).dtype
            == dtype
        )
