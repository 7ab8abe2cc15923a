"""The noise schedule against its definition and against diffusers."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule, posterior_variance
from latentdiff.errors import ConfigError, LatentDiffError, UsageError

SPACINGS = ("leading", "trailing", "linspace")
BETAS = ("scaled_linear", "linear", "squaredcos_cap_v2")
SD15 = Schedule(ScheduleConfig())


def peer(cls: type, schedule: Schedule, spacing: str, **extra: object):
    """diffusers' scheduler with the same configuration."""
    config = {**schedule.config.to_diffusers(), "timestep_spacing": spacing, **extra}
    return cls.from_config({key: value for key, value in config.items() if key != "_class_name"})


# Level


@given(st.floats(1e-9, 1.0 - 1e-9))
def test_the_quantities_of_a_level_agree(alpha_cumprod: float) -> None:
    level = Level(t=0.0, alpha_cumprod=alpha_cumprod)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0, abs=1e-15)
    assert level.sigma_hat == pytest.approx(level.sigma / level.alpha)
    assert level.log_snr == pytest.approx(math.log(level.alpha / level.sigma), abs=1e-6)
    assert math.exp(-level.log_snr) == pytest.approx(level.sigma_hat, rel=1e-6)


def test_levels_without_signal_or_without_noise_have_limits() -> None:
    pure_noise = Level(t=999.0, alpha_cumprod=0.0)
    assert (pure_noise.alpha, pure_noise.sigma) == (0.0, 1.0)
    assert (pure_noise.sigma_hat, pure_noise.log_snr) == (math.inf, -math.inf)
    assert (NOISE_FREE.sigma_hat, NOISE_FREE.log_snr) == (0.0, math.inf)


# The sequence of alphas_cumprod


def test_stable_diffusion_schedule_has_its_known_ends() -> None:
    assert SD15.alphas_cumprod.dtype == torch.float64
    assert SD15.level(0).alpha_cumprod == pytest.approx(0.99915, abs=1e-12)
    assert SD15.level(999).alpha_cumprod == pytest.approx(0.004660, abs=5e-7)
    assert SD15.level(0).sigma_hat == pytest.approx(0.0292, abs=5e-5)
    assert SD15.level(999).sigma_hat == pytest.approx(14.61, abs=5e-3)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", BETAS)
def test_alphas_cumprod_are_those_of_diffusers(betas: str, zero_snr: bool) -> None:
    config = ScheduleConfig(beta_schedule=betas, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")
    schedule = Schedule(config)
    expected = peer(diffusers.DDIMScheduler, schedule, "leading").alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=2e-5, atol=1e-6)  # theirs are float32
    assert (schedule.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("betas", BETAS)
def test_zero_terminal_snr_keeps_the_first_level_and_empties_the_last(betas: str) -> None:
    plain = Schedule(ScheduleConfig(beta_schedule=betas, prediction_type="v_prediction"))
    zero = Schedule(ScheduleConfig(beta_schedule=betas, prediction_type="v_prediction", rescale_betas_zero_snr=True))
    assert zero.level(0).alpha_cumprod == pytest.approx(plain.level(0).alpha_cumprod, rel=1e-14)
    assert zero.level(999).alpha_cumprod == 0.0
    assert 0.0 < zero.with_finite_log_snr().level(999).alpha_cumprod < 1e-7
    assert zero.level(999).alpha_cumprod == 0.0, "the schedule itself stays as it was"


def test_zero_terminal_snr_refuses_epsilon_prediction() -> None:
    with pytest.raises(ConfigError, match="v_prediction or sample"):
        Schedule(ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="epsilon"))


# Timesteps


def test_ten_timesteps_of_every_spacing() -> None:
    assert SD15.timesteps(10, "leading") == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert SD15.timesteps(10, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert SD15.timesteps(10, "linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


def test_spacing_comes_from_the_configuration_unless_given() -> None:
    trailing = Schedule(ScheduleConfig(timestep_spacing="trailing"))
    assert trailing.timesteps(10) == SD15.timesteps(10, "trailing")
    assert trailing.timesteps(10, "leading") == SD15.timesteps(10, "leading")
    assert Schedule(ScheduleConfig(timestep_spacing=None)).timesteps(10) == SD15.timesteps(10, "leading")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_has_its_length_and_its_ends(spacing: str) -> None:
    for steps in range(1, 1001):
        timesteps = SD15.timesteps(steps, spacing)
        assert len(timesteps) == steps
        assert all(t > s for t, s in pairwise(timesteps))
        first, last = timesteps[0], timesteps[-1]
        match spacing:
            case "leading":
                offset = 1 if steps < 1000 else 0  # offset 1 would ask for timestep 1000 of 0 … 999
                assert (first, last) == ((steps - 1) * (1000 // steps) + offset, offset)
            case "trailing":
                assert (first, last) == (999, round(1000 / steps) - 1)
            case "linspace":
                assert (first, last) == (999, 0 if steps > 1 else 999)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers_wherever_those_are_right(spacing: str) -> None:
    scheduler = peer(diffusers.DDIMScheduler, SD15, spacing)
    wrong = []
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()
        if len(theirs) != steps or theirs[0] > 999 or (spacing == "linspace" and theirs[0] != 999):
            wrong.append(steps)
            continue
        for i, (our, their) in enumerate(zip(SD15.timesteps(steps, spacing), theirs, strict=True)):
            # Ties are rounded to even here; there, float noise decides.
            tie = spacing != "leading" and is_tie(steps, i, spacing)
            assert our == their or (tie and abs(our - their) == 1), (steps, i)
    # leading: out of range at the end; trailing: rounding in arange makes one step too many; linspace: one step, at t =
    # 0.
    assert len(wrong) == {"leading": 1, "trailing": 62, "linspace": 1}[spacing]


def is_tie(steps: int, i: int, spacing: str) -> bool:
    """Whether the i-th of the evenly spaced timesteps falls halfway between two integers."""
    total, intervals = (1000, steps) if spacing == "trailing" else (999, max(steps - 1, 1))
    return 2 * total * (intervals - i) % (2 * intervals) == intervals


@given(st.data(), st.integers(1, 1500), st.integers(0, 3), st.sampled_from(SPACINGS))
def test_timesteps_fit_any_training_length(data: st.DataObject, total: int, offset: int, spacing: str) -> None:
    schedule = Schedule(ScheduleConfig(num_train_timesteps=total, steps_offset=min(offset, total)))
    steps = data.draw(st.integers(1, total))
    timesteps = schedule.timesteps(steps, spacing)
    assert len(timesteps) == steps
    assert all(t > s for t, s in pairwise(timesteps))
    assert timesteps[0] < total and timesteps[-1] >= 0


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(UsageError, match=f"steps must be 1 to 1000.*found {steps}"):
        SD15.timesteps(steps)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="leading, trailing or linspace, found 'karras'"):
        SD15.timesteps(10, "karras")
    with pytest.raises(LatentDiffError, match="found 'sigmoid'"):
        Schedule(ScheduleConfig(beta_schedule="sigmoid"))


# Levels


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_levels_end_at_the_clean_level_of_the_configuration(set_alpha_to_one: bool) -> None:
    schedule = Schedule(ScheduleConfig(set_alpha_to_one=set_alpha_to_one))
    levels = schedule.levels(30, "leading")
    assert [level.t for level in levels[:-1]] == schedule.timesteps(30, "leading")
    assert [level.is_clean for level in levels] == [False] * 30 + [True]
    expected = peer(diffusers.DDIMScheduler, schedule, "leading").final_alpha_cumprod.item()
    assert levels[-1].alpha_cumprod == pytest.approx(expected, abs=1e-7)


def test_sigma_hat_is_linear_between_timesteps() -> None:
    below, between, above = SD15.level(500), SD15.level(500.25), SD15.level(501)
    assert between.t == 500.25
    assert between.sigma_hat == pytest.approx(0.75 * below.sigma_hat + 0.25 * above.sigma_hat, rel=1e-12)


@pytest.mark.parametrize("t", [-1, 999.5, 1000, math.nan])
def test_timesteps_outside_the_schedule_are_refused(t: float) -> None:
    with pytest.raises(UsageError, match="0 to 999"):
        SD15.level(t)


def test_noise_is_added_as_in_diffusers() -> None:
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    timesteps = torch.tensor([0, 500, 999])
    expected = peer(diffusers.DDPMScheduler, SD15, "leading").add_noise(x0, noise, timesteps)
    torch.testing.assert_close(SD15.add_noise(x0, noise, timesteps), expected, rtol=1e-5, atol=1e-5)


# The variance of a stochastic step


def test_posterior_variance_is_beta_tilde_between_neighbours() -> None:
    betas = 1.0 - SD15.alphas_cumprod[1:] / SD15.alphas_cumprod[:-1]
    for t in (1, 500, 999):
        level, next_level = SD15.level(t), SD15.level(t - 1)
        expected = betas[t - 1].item() * next_level.sigma**2 / level.sigma**2
        assert posterior_variance(level, next_level) == pytest.approx(expected, rel=1e-12)


@given(st.floats(1e-9, 1.0), st.floats(1e-9, 1.0))
def test_posterior_variance_leaves_room_for_the_predicted_noise(one: float, other: float) -> None:
    level, next_level = (Level(0.0, alpha_cumprod) for alpha_cumprod in sorted((one, other)))
    assert 0.0 <= posterior_variance(level, next_level) <= next_level.sigma**2 + 1e-15


def test_stochastic_steps_up_in_noise_are_refused() -> None:
    with pytest.raises(UsageError, match="lower the noise level"):
        posterior_variance(SD15.level(1), SD15.level(500))
