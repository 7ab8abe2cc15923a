"""Inversion against closed forms and the exact denoiser of a mixture, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from itertools import pairwise

import pytest
import torch

import tests.scenes  # noqa: F401 - puts tools/ on the path
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.denoise import denoise
from latentdiff.diffusion.guidance import Guidance
from latentdiff.diffusion.parameterization import Prediction, parameterization
from latentdiff.diffusion.samplers import ddim
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import UsageError
from latentdiff.tasks.inversion import edict
from latentdiff.tasks.inversion.ddim import coefficients, high_step, low_step
from latentdiff.tasks.inversion.null_text import NullTextSettings, optimise
from tests.analytic import MEANS, STDS, WEIGHTS, gaussian, mixture, normal_quantiles, sample

on_pivots = import_module("editing_measures").on_pivots

CONFIG = ScheduleConfig(beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False)
SCHEDULE = Schedule(CONFIG)
X = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64).view(2, 1, 2, 2)


def data() -> torch.Tensor:
    """A thousand values, spread as the mixture is."""
    parts = [m + s * normal_quantiles(round(1000 * w)) for m, s, w in zip(MEANS, STDS, WEIGHTS, strict=True)]
    return torch.cat(parts).view(-1, 1, 1, 1)


def up(denoiser, x, levels, step):
    return sample(denoiser, x, levels[::-1], step)


def round_trip(denoiser, x, levels, step):
    return sample(denoiser, up(denoiser, x, levels, step), levels, ddim.step)


def rms(x) -> float:
    return x.square().mean().sqrt().item()


def guided(positive, negative, scale):
    """Guidance between two analytic denoisers."""

    def denoiser(x, level):
        c, u = positive(x, level), negative(x, level)
        x0, eps = u.x0 + scale * (c.x0 - u.x0), u.eps + scale * (c.eps - u.eps)
        return Prediction(x0, eps, eps)

    return denoiser


# --- DDIM and its fixed-point corrections ---------------------------------------------------------


@pytest.mark.parametrize(("steps", "lost"), [(10, 0.2250), (20, 0.1223), (50, 0.0521), (100, 0.0267)])
def test_low_on_unit_normal_data_keeps_the_product_of_squared_cosines(steps, lost):
    levels = SCHEDULE.levels(steps, "leading")
    cosines = [coefficients(a, b, "v")[0] for a, b in pairwise(levels)]
    back = round_trip(gaussian(0.0, 1.0), X, levels, low_step)
    torch.testing.assert_close(back, math.prod(cosines) ** 2 * X, rtol=1e-12, atol=0)
    assert 1 - (back / X).mean().item() == pytest.approx(lost, abs=5e-5)


def test_high_on_unit_normal_data_has_its_closed_form():
    levels = SCHEDULE.levels(20, "leading")
    factors = [hi.alpha * (1 - lo.sigma * hi.sigma) / lo.alpha + hi.sigma**2 for hi, lo in pairwise(levels)]
    torch.testing.assert_close(
        up(gaussian(0, 1), X, levels, high_step("eps")), math.prod(factors) * X, rtol=1e-12, atol=0
    )
    # The velocity of unit normal data is 0: the step is the rotation and nothing is guessed.
    cosines = [coefficients(a, b, "v")[0] for a, b in pairwise(levels)]
    torch.testing.assert_close(
        up(gaussian(0, 1), X, levels, high_step("v")), math.prod(cosines) * X, rtol=1e-12, atol=0
    )


ERRORS = {  # RMS of a round trip: low, high, then with 1, 3 and 10 fixed-point iterations
    10: (1.6e-1, 7.6e-2, 3.3e-2, 9.8e-3, None),
    50: (4.5e-2, 1.6e-2, 2.1e-3, 2.2e-4, 1.2e-6),
    100: (2.4e-2, 7.8e-3, 4.3e-4, 1.1e-5, 7e-10),
}


@pytest.mark.parametrize("steps", ERRORS)
def test_round_trip_errors_on_the_mixture(steps):
    levels, x = SCHEDULE.levels(steps, "linspace"), data()
    methods = [low_step, *(high_step("eps", k) for k in (0, 1, 3, 10))]
    errors = [rms(round_trip(mixture(), x, levels, step) - x) for step in methods]
    assert errors == sorted(errors, reverse=True)
    for error, expected in zip(errors, ERRORS[steps], strict=True):
        assert expected is None or error == pytest.approx(expected, rel=0.25)


def test_the_error_of_a_round_trip_falls_as_one_over_the_steps():
    x = data()
    for step in (low_step, high_step("eps")):
        coarse, fine = (rms(round_trip(mixture(), x, SCHEDULE.levels(n, "linspace"), step) - x) for n in (250, 500))
        assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.15)


def test_fixed_point_iterations_converge_to_the_exact_inverse_in_both_quantities():
    levels, x = SCHEDULE.levels(50, "trailing"), data()
    noises = [up(mixture(), x, levels, high_step(quantity, 50)) for quantity in ("eps", "v")]
    torch.testing.assert_close(*noises, rtol=0, atol=1e-9)
    assert rms(sample(mixture(), noises[0], levels, ddim.step) - x) < 1e-10


def test_iterations_that_run_away_stop_at_their_best():
    level, next_level = SCHEDULE.levels(10, "trailing")[-3:-1][::-1]
    _, shift = coefficients(next_level, level, "eps")
    down = level.alpha / next_level.alpha
    slopes = (
        torch.tensor([0.5, -3.0], dtype=torch.float64) * down / shift
    )  # each correction is so many times the last one

    def steep(slopes):
        def denoiser(x, level):
            eps = slopes.view(-1, 1, 1, 1) * x
            return Prediction((x - level.sigma * eps) / level.alpha, eps, eps)

        return denoiser

    def walked(slopes, x, iterations):
        calls = []
        found, _ = high_step("eps", iterations, calls.append)(steep(slopes), x, level, next_level, None, None)
        return found, calls

    together, calls = walked(slopes, X, 8)
    assert calls == [next_level]
    converging, calls = walked(slopes[:1], X[:1], 8)
    assert not calls and together[:1].equal(converging)
    first, calls = walked(slopes[1:], X[1:], 0)
    assert not calls and together[1:].equal(first)  # every correction is larger than the one before
    exact = X[:1] / (down + shift * slopes[0])
    assert rms(converging - exact) < 0.01 * rms(walked(slopes[:1], X[:1], 1)[0] - exact)


def test_corrections_that_overflow_leave_the_last_good_latents():
    level, next_level = SCHEDULE.levels(10, "trailing")[-3:-1][::-1]
    turns = []

    def denoiser(x, level):
        turns.append(level)
        eps = torch.full_like(x, math.inf if len(turns) > 1 else 0.5)
        return Prediction(x, eps, eps)

    astray = []
    found, _ = high_step("eps", 4, astray.append)(denoiser, X, level, next_level, None, None)
    assert torch.isfinite(found).all() and len(turns) == 2 and astray == [next_level]


def test_the_velocity_inverts_where_no_signal_is_left():
    schedule = Schedule(replace(CONFIG, prediction_type="v_prediction", rescale_betas_zero_snr=True))
    levels = schedule.levels(50, "trailing")
    assert levels[0].alpha == 0.0
    # Pure noise tells nothing about the mean, so what comes back from it can only be what the last step down left.
    noise = up(gaussian(0.3, 0.5), X, levels, high_step("v", 5))
    assert torch.isfinite(noise).all()
    back = sample(gaussian(0.3, 0.5), noise, levels, ddim.step)
    torch.testing.assert_close(back, X, rtol=0, atol=1e-2)


def test_inverting_what_was_sampled_recovers_its_noise():
    noise, errors = normal_quantiles(200).view(-1, 1, 1, 1), []
    for steps in (50, 200):
        levels = SCHEDULE.levels(steps, "trailing")
        made = sample(mixture(), noise, levels, ddim.step)
        errors.append(rms(up(mixture(), made, levels, high_step("eps")) - noise))
    assert errors[1] < errors[0] / 3


def test_inverted_data_are_unit_normal():
    noise = up(mixture(), data(), SCHEDULE.levels(100, "trailing"), high_step("eps", 2))
    assert abs(noise.mean().item()) < 0.05
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)


def test_iterations_below_zero_are_refused():
    with pytest.raises(UsageError, match="0 or more iterations"):
        high_step("eps", -1)


# --- EDICT ----------------------------------------------------------------------------------------


def edict_round_trip(x, steps, p, quantity):
    levels = SCHEDULE.levels(steps, "trailing")
    pair = torch.cat([x, x])
    noise = sample(mixture(), pair, levels[::-1], edict.inversion_step(levels, p, quantity))
    return noise, sample(mixture(), noise, levels, edict.sampling_step(levels, p, quantity)) - pair


@pytest.mark.parametrize("quantity", ["eps", "v"])
@pytest.mark.parametrize("steps", [49, 50, 100])
def test_edict_inverts_exactly(steps, quantity):
    noise, error = edict_round_trip(data(), steps, edict.mixing_for(steps, quantity), quantity)
    assert error.abs().max() < 1e-11
    x, y = noise.chunk(2)
    assert (x - y).abs().max() < 1.0  # the two stay together
    _, error = edict_round_trip(data().float(), steps, edict.mixing_for(steps, quantity), quantity)
    assert error.abs().max() < 1e-4


def test_mixing_depends_on_the_steps():
    assert edict.mixing_for(50) == pytest.approx(0.93)
    drifted, _ = edict_round_trip(data(), 100, 0.93, "eps")
    assert drifted.std() > 3.0  # the trap: 50 steps' mixing at 100
    with pytest.raises(UsageError, match="mixing"):
        edict.sampling_step(SCHEDULE.levels(10), 0.5)


# --- Under guidance -------------------------------------------------------------------------------


CONDITIONAL, UNCONDITIONAL = mixture(), mixture(weights=(0.6, 0.4))


def pivots(steps=50, x=None):
    """The unguided trajectory under the source's prompt, noisiest first."""
    levels, x = SCHEDULE.levels(steps, "trailing"), data() if x is None else x
    trajectory = [x, *(done.x for done in denoise(CONDITIONAL, x, levels[::-1], high_step("eps")))]
    return levels, trajectory[::-1]


def test_negative_prompt_inversion_does_not_depend_on_guidance_which_ruins_the_plain_one():
    levels, latents = pivots()
    unguided = sample(CONDITIONAL, latents[0], levels, ddim.step)
    for scale in (3.0, 7.5):
        own = sample(guided(CONDITIONAL, CONDITIONAL, scale), latents[0], levels, ddim.step)
        torch.testing.assert_close(own, unguided, rtol=0, atol=1e-10)
    plain = sample(guided(CONDITIONAL, UNCONDITIONAL, 7.5), latents[0], levels, ddim.step)
    assert rms(plain - latents[-1]) > 10 * rms(unguided - latents[-1])


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_direct_inversion_is_exact_and_leaves_the_edit_alone(scale):
    levels, latents = pivots()
    denoiser = guided(CONDITIONAL, UNCONDITIONAL, scale)
    both = torch.cat([latents[0], latents[0]])
    *_, last = denoise(denoiser, both, levels, ddim.step, after_step=on_pivots(levels, latents))
    source, edit = last.x.chunk(2)
    assert source.equal(latents[-1])
    assert edit.equal(sample(denoiser, latents[0], levels, ddim.step))


def test_direct_inversion_is_the_paper_s_offset():
    levels, latents = pivots(steps=10)
    denoiser = guided(CONDITIONAL, UNCONDITIONAL, 7.5)
    x = latents[0]
    for (level, next_level), pivot in zip(pairwise(levels), latents[1:], strict=True):
        stepped, _ = ddim.step(denoiser, x, level, next_level, None, None)
        offset = pivot - ddim.step(denoiser, x, level, next_level, None, None)[0]
        x = stepped + offset
        torch.testing.assert_close(x, pivot, rtol=0, atol=1e-14)


def with_null(null):
    """An unconditional denoiser to whose noise prediction the embedding is added."""

    def denoiser(x, level):
        eps = UNCONDITIONAL(x, level).eps + null
        return parameterization("epsilon")(eps, x, level)

    return denoiser


def null_text(levels, latents, scale, **settings):
    return list(
        optimise(
            CONDITIONAL,
            with_null,
            parameterization("epsilon"),
            torch.zeros_like(latents[0]),
            levels,
            latents,
            NullTextSettings(guidance_scale=scale, tolerance=0.0, tolerance_growth=0.0, **settings),
        )
    )


def test_null_text_changes_nothing_without_guidance():
    levels, latents = pivots(5, X)
    steps = null_text(levels, latents, 1.0)
    assert all(step.null.equal(torch.zeros_like(X)) for step in steps)
    torch.testing.assert_close(steps[-1].done.x, sample(CONDITIONAL, latents[0], levels, ddim.step), rtol=0, atol=1e-12)


def test_null_text_lowers_every_step_s_loss_and_comes_nearer_than_plain_guidance():
    levels, latents = pivots(20, X)
    steps = null_text(levels, latents, 5.0)
    guidance = Guidance(scale=5.0)
    assert guidance.combine(torch.zeros(1), torch.ones(1)).item() == 5.0
    assert all(min(step.losses) <= step.losses[0] for step in steps)
    plain = sample(guided(CONDITIONAL, UNCONDITIONAL, 5.0), latents[0], levels, ddim.step)
    assert rms(steps[-1].done.x - latents[-1]) < 0.2 * rms(plain - latents[-1])


def test_null_text_reaches_the_closed_form_of_an_additive_null():
    levels, latents = pivots(5, X)
    step = null_text(levels[:2], latents[:2], 5.0, inner_steps=400)[0]
    level, next_level = levels[:2]
    plain, _ = ddim.step(guided(CONDITIONAL, UNCONDITIONAL, 5.0), latents[0], level, next_level, None, None)
    _, b = coefficients(level, next_level, "eps")  # what a unit of predicted noise moves the step
    expected = (latents[1] - plain) / ((1.0 - 5.0) * b)
    torch.testing.assert_close(step.null, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(step.done.x, latents[1], rtol=0, atol=1e-4)


def test_null_text_stops_early_and_returns_the_best_of_the_way():
    levels, latents = pivots(3, X)
    read = parameterization("epsilon")
    settings = NullTextSettings(guidance_scale=5.0, tolerance=1e3)
    steps = list(optimise(CONDITIONAL, with_null, read, torch.zeros_like(X), levels, latents, settings))
    assert [len(step.losses) for step in steps] == [1, 1, 1]
    assert all(step.null.equal(torch.zeros_like(X)) for step in steps)
    wild = null_text(levels, latents, 5.0, learning_rate=30.0)
    assert all(min(step.losses) <= step.losses[0] for step in wild)
    assert all(not step.null.requires_grad for step in wild)
