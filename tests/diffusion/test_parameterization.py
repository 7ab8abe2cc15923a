"""The three kinds of prediction against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentdiff.diffusion.parameterization import PARAMETERIZATIONS, min_snr_weight, parameterization, training_target
from latentdiff.diffusion.samplers import ddim
from latentdiff.diffusion.schedule import NOISE_FREE, Level
from latentdiff.errors import ConfigError, UsageError

PURE_NOISE = Level(t=999.0, alpha_cumprod=0.0)
names = pytest.mark.parametrize("name", PARAMETERIZATIONS)


def latents(seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """x0 and eps, each (N, 4, 3, 5), float64."""
    return torch.randn(2, batch, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()


def as_tensors(*alphas_cumprod: float) -> tuple[Tensor, Tensor]:
    """alpha and sigma, each (N, 1, 1, 1), float64."""
    values = torch.tensor(alphas_cumprod, dtype=torch.float64).view(-1, 1, 1, 1)
    return values.sqrt(), (1.0 - values).sqrt()


@names
@given(alpha_cumprod=st.floats(1e-4, 1.0 - 1e-4), seed=st.integers(0, 100))
def test_a_perfect_prediction_gives_back_what_was_mixed(name: str, alpha_cumprod: float, seed: int) -> None:
    level = Level(t=0.0, alpha_cumprod=alpha_cumprod)
    x0, eps = latents(seed)
    raw = training_target(name, x0, eps, *as_tensors(alpha_cumprod, alpha_cumprod))
    prediction = parameterization(name)(raw, level.alpha * x0 + level.sigma * eps, level)
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-10, atol=1e-10)
    assert prediction.raw is raw


@names
@given(alpha_cumprod=st.floats(1e-4, 1.0 - 1e-4), seed=st.integers(0, 100))
def test_any_prediction_splits_the_latents_without_rest(name: str, alpha_cumprod: float, seed: int) -> None:
    level = Level(t=0.0, alpha_cumprod=alpha_cumprod)
    x, raw = latents(seed)
    prediction = parameterization(name)(raw, x, level)
    torch.testing.assert_close(level.alpha * prediction.x0 + level.sigma * prediction.eps, x, rtol=1e-10, atol=1e-10)


def test_a_ddim_step_with_velocity_is_a_rotation() -> None:
    level, next_level = Level(0.0, math.cos(1.2) ** 2), Level(0.0, math.cos(0.9) ** 2)
    x, v = latents(seed=0)
    convert = parameterization("v_prediction")
    moved, _ = ddim.step(lambda x, level: convert(v, x, level), x, level, next_level, None, None)
    torch.testing.assert_close(moved, math.cos(0.3) * x - math.sin(0.3) * v, rtol=0.0, atol=1e-14)


def test_velocity_is_defined_at_both_ends() -> None:
    x, v = latents(seed=1)
    noise, clean = (parameterization("v_prediction")(v, x, level) for level in (PURE_NOISE, NOISE_FREE))
    assert torch.equal(noise.x0, -v) and torch.equal(noise.eps, x)
    assert torch.equal(clean.x0, x) and torch.equal(clean.eps, v)


@pytest.mark.parametrize(("name", "level"), [("epsilon", PURE_NOISE), ("sample", NOISE_FREE)])
def test_an_undetermined_prediction_is_refused(name: str, level: Level) -> None:
    x, raw = latents(seed=2)
    with pytest.raises(UsageError, match="undetermined"):
        parameterization(name)(raw, x, level)


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="epsilon, v_prediction, sample, found 'flow'"):
        parameterization("flow")


def test_targets_follow_each_image_of_a_batch() -> None:
    x0, eps = latents(seed=3)
    alpha, sigma = as_tensors(0.9, 0.2)
    target = training_target("v_prediction", x0, eps, alpha, sigma)
    for i, alpha_cumprod in enumerate((0.9, 0.2)):
        expected = math.sqrt(alpha_cumprod) * eps[i] - math.sqrt(1.0 - alpha_cumprod) * x0[i]
        torch.testing.assert_close(target[i], expected, rtol=0.0, atol=1e-14)


@given(alpha_cumprod=st.floats(1e-6, 1.0 - 1e-6), gamma=st.floats(0.5, 20.0))
def test_min_snr_weights_are_those_of_the_paper(alpha_cumprod: float, gamma: float) -> None:
    snr = alpha_cumprod / (1.0 - alpha_cumprod)
    alpha, sigma = as_tensors(alpha_cumprod)
    expected = {
        "epsilon": min(snr, gamma) / snr,
        "v_prediction": min(snr, gamma) / (snr + 1.0),
        "sample": min(snr, gamma),
    }
    for name, weight in expected.items():
        found = min_snr_weight(name, alpha, sigma, gamma)
        assert found.shape == alpha.shape
        assert found.item() == pytest.approx(weight, rel=1e-9)


@given(alpha_cumprod=st.floats(1e-3, 1.0 - 1e-3), seed=st.integers(0, 100))
def test_min_snr_loss_is_the_same_in_every_parameterization(alpha_cumprod: float, seed: int) -> None:
    """The same error of x0, at the same x, costs the same however the model expresses it."""
    alpha, sigma = as_tensors(alpha_cumprod, alpha_cumprod)
    (x0, eps), (error, _) = latents(seed), latents(seed + 1)
    wrong_x0, wrong_eps = x0 + error, eps - alpha / sigma * error
    losses = [
        min_snr_weight(name, alpha, sigma, 5.0)
        * (training_target(name, wrong_x0, wrong_eps, alpha, sigma) - training_target(name, x0, eps, alpha, sigma)) ** 2
        for name in PARAMETERIZATIONS
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-8, atol=1e-8)


@names
def test_min_snr_weights_are_finite_without_signal(name: str) -> None:
    weight = min_snr_weight(name, *as_tensors(0.0), 5.0)
    assert weight.item() == {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}[name]
