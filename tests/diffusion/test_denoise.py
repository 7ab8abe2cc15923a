"""The loop: what it walks, what it reports, and how it stops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.denoise import denoise
from latentdiff.diffusion.latents import NoiseStream, start_noise
from latentdiff.diffusion.parameterization import Prediction
from latentdiff.diffusion.samplers import get_sampler
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.errors import NotFiniteError, UsageError
from tests import analytic

LEVELS = Schedule(ScheduleConfig()).levels(5, "trailing")
DDIM = get_sampler("ddim").step
X = start_noise([0, 1], (2, 3, 3), dtype=torch.float64)


def test_steps_are_the_neighbouring_pairs_of_levels() -> None:
    steps = list(denoise(analytic.mixture(), X, LEVELS, DDIM))
    assert [(step.level, step.next_level) for step in steps] == list(zip(LEVELS[:-1], LEVELS[1:], strict=True))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert {step.steps for step in steps} == {5}


def test_each_report_holds_its_own_latents_and_prediction() -> None:
    denoiser, x = analytic.mixture(), X
    for step in denoise(denoiser, X, LEVELS, DDIM):
        assert torch.equal(step.prediction.x0, denoiser(x, step.level).x0)
        x = step.x


def test_the_loop_is_lazy_so_that_leaving_it_cancels() -> None:
    calls = []

    def counting(x: Tensor, level: Level) -> Prediction:
        calls.append(level)
        return analytic.mixture()(x, level)

    for step in denoise(counting, X, LEVELS, DDIM):
        if step.index == 1:
            break
    assert calls == LEVELS[:2]


def test_after_step_sees_and_replaces_the_latents_of_every_step() -> None:
    known = torch.full_like(X[:, :1], 0.25)
    seen = []

    def keep_known(x: Tensor, level: Level) -> Tensor:
        seen.append(level)
        return torch.cat([level.alpha * known, x[:, 1:]], dim=1)

    *_, last = denoise(analytic.mixture(), X, LEVELS, DDIM, after_step=keep_known)
    assert seen == LEVELS[1:]
    assert torch.equal(last.x[:, :1], LEVELS[-1].alpha * known)


def test_the_latents_that_are_given_stay_as_they_are() -> None:
    for name in ("ddim", "ddpm", "euler", "dpmpp-2m"):
        before = X.clone()
        list(denoise(analytic.mixture(), X, LEVELS, get_sampler(name).step, noise=NoiseStream([0, 1], (2, 3, 3))))
        assert torch.equal(X, before)


def test_latents_that_are_not_finite_are_an_error_that_names_the_step() -> None:
    def overflowing(x: Tensor, level: Level) -> Prediction:
        eps = x / (0.0 if level == LEVELS[2] else 1.0)
        return Prediction(x0=x, eps=eps, raw=eps)

    with pytest.raises(NotFiniteError, match=r"after step 3 of 5 \(timestep 599\)"):
        list(denoise(overflowing, X, LEVELS, DDIM))


@pytest.mark.parametrize("bad", [0, 1, 3, 4])
def test_on_a_gpu_the_error_comes_a_step_later_and_names_the_right_step(
    monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    monkeypatch.setattr("latentdiff.diffusion.denoise.is_asynchronous", lambda device: True)
    seen = []

    def step(denoiser, x, level, next_level, state, noise):
        denoiser(x, level)
        return (x * float("nan") if level == LEVELS[bad] else x), None

    with pytest.raises(NotFiniteError, match=rf"after step {bad + 1} of 5 "):
        for done in denoise(lambda x, level: Prediction(x, x, x), X, LEVELS, step):
            seen.append(done.index)
    assert seen == list(range(min(bad + 1, 4)))


@pytest.mark.parametrize("step", [get_sampler("ddpm").step, get_sampler("ddim", eta=0.5).step])
def test_a_stochastic_step_without_noise_is_refused(step) -> None:
    with pytest.raises(UsageError, match="NoiseStream"):
        list(denoise(analytic.mixture(), X, LEVELS, step))
