import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import ConfigError
from latentdiff.training.finetuning.config import make_config
from latentdiff.training.noise import pyramid_noise
from latentdiff.training.objective import DiffusionObjective, draw_timesteps
from latentdiff.training.sections import ObjectiveSection

TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEPS = torch.tensor([0, 1, 300, 700, 999])


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(TIMESTEPS), 4, 3, 3, generator=generator) for _ in range(3)]


def peer(prediction_type):
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


@pytest.mark.parametrize("prediction_type", TYPES)
def test_noise_target_and_error_agree_with_diffusers(tensors, prediction_type):
    latents, noise, prediction = tensors
    objective = DiffusionObjective(Schedule(ScheduleConfig(prediction_type=prediction_type)), ObjectiveSection())
    scheduler = peer(prediction_type)
    noisy = scheduler.add_noise(latents, noise, TIMESTEPS)
    assert torch.allclose(objective.noisy(latents, noise, TIMESTEPS), noisy, atol=1e-5)
    target = {
        "epsilon": noise, "sample": latents, "v_prediction": scheduler.get_velocity(latents, noise, TIMESTEPS),
    }[prediction_type]  # fmt: skip
    differences = objective.differences(prediction, latents, noise, TIMESTEPS)
    assert torch.allclose(differences, prediction - target, atol=1e-5)
    assert torch.equal(objective.costs(differences, TIMESTEPS), differences.square())
    assert objective.weights(TIMESTEPS).tolist() == [1.0] * len(TIMESTEPS)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_min_snr_weight_agrees_with_the_recipe_of_diffusers(prediction_type):
    settings = ObjectiveSection(min_snr_gamma=5.0)
    objective = DiffusionObjective(Schedule(ScheduleConfig(prediction_type=prediction_type)), settings)
    snr = compute_snr(peer(prediction_type), TIMESTEPS)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    assert torch.allclose(objective.weights(TIMESTEPS), snr.clamp(max=5.0) / divisor, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_debiased_weight_is_one_over_the_root_of_the_snr_for_epsilon(tensors, prediction_type):
    """Wherever the error of x0 is the same, the three kinds of prediction cost the same."""
    latents, noise, error = tensors
    schedule = Schedule(ScheduleConfig(prediction_type=prediction_type))
    objective = DiffusionObjective(schedule, ObjectiveSection(debiased=True))
    alpha, sigma = (levels[TIMESTEPS].view(-1, 1, 1, 1) for levels in (objective.alpha, objective.sigma))
    raw = {"epsilon": -alpha / sigma * error, "sample": error, "v_prediction": -error / sigma}[prediction_type]
    exact = {"epsilon": noise, "sample": latents, "v_prediction": alpha * noise - sigma * latents}[prediction_type]
    differences = objective.differences(exact + raw, latents, noise, TIMESTEPS)
    cost = objective.weights(TIMESTEPS) * objective.costs(differences, TIMESTEPS).mean((1, 2, 3))
    snr = compute_snr(peer("epsilon"), TIMESTEPS)
    of_epsilon = (alpha / sigma * error).square().mean((1, 2, 3)) / snr.sqrt()
    assert torch.allclose(cost, of_epsilon, rtol=1e-2)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_the_huber_loss_is_the_published_one(tensors, schedule):
    """Khrapov et al. 2024, section 3: c from 1 down to its least value."""
    differences = 3 * tensors[0]
    objective = DiffusionObjective(Schedule(ScheduleConfig()), ObjectiveSection(loss="huber", huber_schedule=schedule))
    found = objective.costs(differences, TIMESTEPS)
    for one, d, t in zip(found, differences, TIMESTEPS.tolist(), strict=True):
        kept = peer("epsilon").alphas_cumprod[t].item()
        c = {
            "constant": 0.1,
            "exponential": math.exp(math.log(0.1) / 1000 * t),
            "snr": 0.9 / (1 + math.sqrt((1 - kept) / kept)) ** 2 + 0.1,
        }[schedule]  # fmt: skip
        torch.testing.assert_close(one, 2 * c * ((d**2 + c**2).sqrt() - c), rtol=1e-4, atol=1e-5)


def test_pyramid_noise():
    """Each image has variance 1, neighbours agree the more, and an image's noise does not depend on its batch."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((64, 4, 16, 12), dtype=np.float32)
    found = pyramid_noise(noise, 0.5, (0, "pyramid noise", 7), range(64))
    assert np.allclose(found.std((1, 2, 3), ddof=1), 1, atol=1e-5)
    assert found.mean((2, 3)).std() > 1.5 * noise.mean((2, 3)).std()
    assert np.array_equal(pyramid_noise(noise[20:23], 0.5, (0, "pyramid noise", 7), range(20, 23)), found[20:23])
    coarse = 0.25 + 0.0625 + 0.25**3 + 0.25**4  # variances of the grids before their enlargement, which lessens them
    assert 1 / (1 + coarse) < np.corrcoef(found.ravel(), noise.ravel())[0, 1] ** 2 < 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"debiased": True, "min_snr_gamma": 5}, "both weigh timesteps"),
        ({"huber_c": 0.2}, "go with loss huber"),
        ({"pyramid_noise": 1.5}, "less than 1"),
    ],
)
def test_what_does_not_fit_together(values, message):
    with pytest.raises(ConfigError, match=message):
        make_config({"data": "x", **values}, "test")


def test_timesteps_are_uniform_and_spread_over_the_batch():
    counts = np.zeros(10)
    for step in range(300):
        drawn = draw_timesteps((0, "timesteps", step), range(20), 20, 1000)
        assert sorted(np.bincount(drawn // 50, minlength=20)) == [1] * 20
        counts += np.bincount(drawn[:1] // 100, minlength=10)
    assert counts.min() > 10  # the first row alone, 30 expected in each tenth


def test_timesteps_of_a_part_of_the_batch():
    whole = draw_timesteps((0, "timesteps", 3), range(24), 24, 1000)
    assert np.array_equal(draw_timesteps((0, "timesteps", 3), range(8, 16), 24, 1000), whole[8:16])
    assert whole.min() >= 0 and whole.max() <= 999


def test_the_noisiest_tenth_can_get_a_share_of_its_own():
    drawn = np.concatenate([draw_timesteps((0, step), range(100), 100, 1000, 0.5) for step in range(40)])
    high = drawn[drawn >= 900]
    assert len(high) / len(drawn) == pytest.approx(0.55, abs=0.01)
    assert drawn.min() < 20 and drawn.max() > 995
    assert drawn[drawn < 900].mean() == pytest.approx(450, abs=10) and high.mean() == pytest.approx(950, abs=2)
