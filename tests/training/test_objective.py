import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.training.objective import DiffusionObjective, draw_timesteps

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
    objective = DiffusionObjective(Schedule(ScheduleConfig(prediction_type=prediction_type)), None)
    scheduler = peer(prediction_type)
    noisy = scheduler.add_noise(latents, noise, TIMESTEPS)
    assert torch.allclose(objective.noisy(latents, noise, TIMESTEPS), noisy, atol=1e-5)
    target = {
        "epsilon": noise, "sample": latents, "v_prediction": scheduler.get_velocity(latents, noise, TIMESTEPS),
    }[prediction_type]  # fmt: skip
    expected = (prediction - target).square().mean(dim=(1, 2, 3))
    assert torch.allclose(objective.errors(prediction, latents, noise, TIMESTEPS), expected, rtol=1e-5)
    assert objective.weights(TIMESTEPS).tolist() == [1.0] * len(TIMESTEPS)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_min_snr_weight_agrees_with_the_recipe_of_diffusers(prediction_type):
    objective = DiffusionObjective(Schedule(ScheduleConfig(prediction_type=prediction_type)), 5.0)
    snr = compute_snr(peer(prediction_type), TIMESTEPS)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    assert torch.allclose(objective.weights(TIMESTEPS), snr.clamp(max=5.0) / divisor, rtol=1e-3)


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
