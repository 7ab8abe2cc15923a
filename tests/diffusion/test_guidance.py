"""Guidance against its formulas, against diffusers, and against distributions whose guided score is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.guidance import Composition, Guidance, composed_denoiser, guided_denoiser, staged_denoiser
from latentdiff.diffusion.parameterization import Denoiser, Prediction, parameterization
from latentdiff.diffusion.samplers import get_sampler
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.errors import UsageError
from tests import analytic

EPSILON = parameterization("epsilon")
SCHEDULE = Schedule(ScheduleConfig())
LEVEL = SCHEDULE.level(500)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Spy:
    """A model whose output is x + context, which records the batch sizes that it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: float, context: Tensor) -> Tensor:
        self.batches.append(len(x))
        return x + context


def contexts(images: int = 2) -> tuple[Tensor, Tensor]:
    """A context and a negative context, each (N, 1, 1, 1)."""
    return randn(images, 1, 1, 1, seed=1), randn(images, 1, 1, 1, seed=2)


# The formulas


@given(scale=st.floats(-2.0, 20.0))
def test_guidance_extrapolates_from_the_negative_prompt(scale: float) -> None:
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    denoiser = guided_denoiser(Spy(), EPSILON, positive, negative, Guidance(scale=scale))
    expected = x + negative + scale * (positive - negative)
    torch.testing.assert_close(denoiser(x, LEVEL).raw, expected, rtol=1e-12, atol=1e-12)


def test_each_image_meets_its_own_context() -> None:
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    both = guided_denoiser(Spy(), EPSILON, positive, negative, Guidance(scale=4.0))(x, LEVEL).raw
    for i in range(2):
        one = slice(i, i + 1)
        alone = guided_denoiser(Spy(), EPSILON, positive[one], negative[one], Guidance(scale=4.0))(x[one], LEVEL).raw
        assert torch.equal(both[one], alone)


@given(rescale=st.floats(0.0, 1.0), scale=st.floats(1.5, 20.0), seed=st.integers(0, 50))
def test_rescale_agrees_with_diffusers(rescale: float, scale: float, seed: int) -> None:
    negative, positive = randn(2, 3, 4, 8, 8, seed=seed).unbind()
    found = Guidance(scale=scale, rescale=rescale).combine(negative, positive)
    expected = rescale_noise_cfg(negative + scale * (positive - negative), positive, rescale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_full_rescale_restores_the_deviation_of_every_image() -> None:
    negative, positive = randn(2, 3, 4, 8, 8).unbind()
    found = Guidance(scale=9.0, rescale=1.0).combine(negative, positive)
    torch.testing.assert_close(found.std((1, 2, 3)), positive.std((1, 2, 3)), rtol=1e-12, atol=0.0)


# What is computed


def test_scale_one_computes_the_prompt_alone() -> None:
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    for negative_context in (None, negative):
        model = Spy()
        prediction = guided_denoiser(model, EPSILON, positive, negative_context, Guidance(rescale=0.7))(x, LEVEL)
        assert torch.equal(prediction.raw, x + positive)
        assert model.batches == [2]
        assert not prediction.guided


@pytest.mark.parametrize(
    ("interval", "guided_steps"), [((0.28, 5.42), 37), ((0.38, 3.22), 29), ((0.0, math.inf), 50), ((20.0, 30.0), 0)]
)
def test_outside_the_interval_the_unconditional_half_is_not_computed(
    interval: tuple[float, float], guided_steps: int
) -> None:
    x, (positive, negative), model = randn(2, 4, 3, 5), contexts(), Spy()
    denoiser = guided_denoiser(model, EPSILON, positive, negative, Guidance(scale=3.0, interval=interval))
    for level in SCHEDULE.levels(50, "trailing")[:-1]:
        inside = interval[0] < level.sigma_hat <= interval[1]
        prediction = denoiser(x, level)
        assert prediction.guided == inside
        assert model.batches[-1] == (4 if inside else 2)
        scale = 3.0 if inside else 1.0
        torch.testing.assert_close(prediction.raw, x + negative + scale * (positive - negative), rtol=1e-12, atol=1e-12)
    assert sum(model.batches) == 2 * (50 + guided_steps)


def test_the_interval_is_open_below_and_closed_above() -> None:
    guidance = Guidance(scale=2.0, interval=(SCHEDULE.level(100).sigma_hat, SCHEDULE.level(200).sigma_hat))
    assert [guidance.acts_at(SCHEDULE.level(t)) for t in (100, 101, 200, 201)] == [False, True, True, False]


def test_contexts_join_with_their_own_cat_once() -> None:
    class Projected:
        joins = 0

        def __init__(self, value: Tensor) -> None:
            self.value = value

        @classmethod
        def cat(cls, parts: list[Projected]) -> Projected:
            cls.joins += 1
            return cls(torch.cat([part.value for part in parts]))

    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    denoiser = guided_denoiser(
        lambda x, t, context: x + context.value, EPSILON, Projected(positive), Projected(negative), Guidance(scale=3.0)
    )
    for t in (900, 500, 100):
        expected = guided_denoiser(Spy(), EPSILON, positive, negative, Guidance(scale=3.0))(x, SCHEDULE.level(t))
        assert torch.equal(denoiser(x, SCHEDULE.level(t)).raw, expected.raw)
    assert Projected.joins == 1


def test_low_precision_output_is_used_in_the_precision_of_the_latents() -> None:
    x, (positive, negative) = randn(2, 4, 3, 5).float(), contexts()

    def model(x: Tensor, t: float, context: Tensor) -> Tensor:
        return (x + context).to(torch.bfloat16)

    low, high = (model(x, 0.0, context).float() for context in (negative, positive))
    for scale in (1.0, 7.5):
        prediction = guided_denoiser(model, EPSILON, positive, negative, Guidance(scale=scale))(x, LEVEL)
        expected = (x - LEVEL.sigma * (low + scale * (high - low))) / LEVEL.alpha
        torch.testing.assert_close(prediction.x0, expected, rtol=1e-5, atol=1e-5)


# Bad input


def test_guidance_without_a_negative_context_is_refused() -> None:
    with pytest.raises(UsageError, match="guidance scale 7.5 needs a negative context"):
        guided_denoiser(Spy(), EPSILON, contexts()[0], None, Guidance(scale=7.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": math.nan}, "scale must be a finite number, found nan"),
        ({"scale": math.inf}, "scale must be a finite number, found inf"),
        ({"rescale": 1.5}, "rescale must lie in 0 to 1, found 1.5"),
        ({"interval": (5.0, 0.3)}, "0 <= low < high, found 5.0 and 0.3"),
        ({"interval": (-1.0, 1.0)}, "0 <= low < high, found -1.0 and 1.0"),
    ],
)
def test_values_outside_their_domain_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Guidance(**values)


# Distributions whose guided score is known


def exact_model(positive: Denoiser, negative: Denoiser, levels: list[Level]):
    """The exact epsilon model of two one-dimensional distributions; context 1 asks for the first, 0 for the second."""
    by_t = {level.t: level for level in levels}

    def model(x: Tensor, t: float, context: Tensor) -> Tensor:
        return torch.where(context == 1.0, positive(x, by_t[t]).eps, negative(x, by_t[t]).eps)

    return model


def exact_guidance(
    positive: Denoiser, negative: Denoiser, levels: list[Level], images: int, guidance: Guidance
) -> Denoiser:
    model = exact_model(positive, negative, levels)
    ones, zeros = torch.ones(images, 1, 1, 1), torch.zeros(images, 1, 1, 1)
    return guided_denoiser(model, EPSILON, ones, zeros, guidance)


def numbered(levels: list[Level]) -> list[Level]:
    """The levels with their index as timestep, by which the exact model finds them again."""
    return [replace(level, t=float(i)) for i, level in enumerate(levels)]


# With one covariance, guidance by w moves the mean to m_u + w (m_c - m_u) and changes nothing else.
SPREAD, M_NEGATIVE, M_POSITIVE, SCALE = 0.4, -0.3, 0.5, 5.0
M_GUIDED = M_NEGATIVE + SCALE * (M_POSITIVE - M_NEGATIVE)


def shared_covariance_error(sampler: str, steps: int, guidance: Guidance, *, reset: bool = True) -> float:
    """The largest error after a guided walk over two Gaussians of one covariance, whose flow is known in closed
    form."""
    levels = numbered(analytic.uniform_log_snr_levels(steps))
    x = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64).view(-1, 1, 1, 1)
    positive, negative = analytic.gaussian(M_POSITIVE, SPREAD), analytic.gaussian(M_NEGATIVE, SPREAD)
    denoiser = exact_guidance(positive, negative, levels, len(x), guidance)

    def forgetting_where_guidance_switched(x: Tensor, level: Level) -> Prediction:
        return replace(denoiser(x, level), guided=False)

    expected = x
    for level, next_level in zip(levels[:-1], levels[1:], strict=True):
        mean = M_GUIDED if guidance.acts_at(level) else M_POSITIVE
        expected = analytic.gaussian_flow(expected, level, next_level, mean, SPREAD)
    walker = denoiser if reset else forgetting_where_guidance_switched
    return (analytic.sample(walker, x, levels, get_sampler(sampler).step) - expected).abs().max().item()


def test_guided_gaussians_of_one_covariance_are_a_gaussian() -> None:
    levels = numbered(SCHEDULE.levels(20, "trailing")[:-1])
    positive, negative = analytic.gaussian(M_POSITIVE, SPREAD), analytic.gaussian(M_NEGATIVE, SPREAD)
    denoiser = exact_guidance(positive, negative, levels, 7, Guidance(scale=SCALE))
    x = torch.linspace(-3.0, 3.0, 7, dtype=torch.float64).view(-1, 1, 1, 1)
    for level in levels:
        torch.testing.assert_close(
            denoiser(x, level).x0, analytic.gaussian(M_GUIDED, SPREAD)(x, level).x0, rtol=1e-9, atol=1e-9
        )


def test_full_guidance_converges_to_its_closed_form() -> None:
    full = Guidance(scale=SCALE)
    ddim = [shared_covariance_error("ddim", steps, full) for steps in (40, 160)]
    solver = [shared_covariance_error("dpmpp-2m", steps, full) for steps in (40, 160)]
    assert ddim == pytest.approx([5.9e-2, 1.5e-2], rel=0.03)
    assert solver == pytest.approx([3.6e-3, 2.3e-4], rel=0.03)


@pytest.mark.parametrize(("sampler", "order"), [("dpmpp-2m", 1.85), ("unipc", 2.6)])
def test_multistep_solver_keeps_its_order_across_the_ends_of_the_interval(sampler: str, order: float) -> None:
    interval = Guidance(scale=SCALE, interval=(0.28, 5.42))
    reset, plain = (
        [shared_covariance_error(sampler, steps, interval, reset=reset) for steps in (40, 160, 640)]
        for reset in (True, False)
    )
    assert math.log2(reset[0] / reset[2]) / 4 > order
    assert math.log2(plain[0] / plain[2]) / 4 < 1.0
    assert all(good < bad / 2 for good, bad in zip(reset, plain, strict=True))


@pytest.mark.parametrize(("scale", "everywhere", "in_the_interval"), [(4.0, 0.035, 0.286), (8.0, 0.002, 0.250)])
def test_an_interval_keeps_the_rarer_mode(scale: float, everywhere: float, in_the_interval: float) -> None:
    """Guidance starves the rarer of two modes, which holds 0.35 of the data; guidance at middle noise levels does
    not."""
    levels = numbered(analytic.uniform_log_snr_levels(400))
    modes, stds = (-1.0, 1.0), (0.25, 0.25)
    positive, negative = analytic.mixture(modes, stds, (0.35, 0.65)), analytic.mixture(modes, stds, (0.6, 0.4))
    x = analytic.normal_quantiles(1000).view(-1, 1, 1, 1)

    def share_of_the_rarer_mode(guidance: Guidance) -> float:
        denoiser = exact_guidance(positive, negative, levels, len(x), guidance)
        return (analytic.sample(denoiser, x, levels, get_sampler("dpmpp-2m").step) < 0).double().mean().item()

    assert share_of_the_rarer_mode(Guidance()) == pytest.approx(0.35, abs=0.003)
    assert share_of_the_rarer_mode(Guidance(scale=scale)) == pytest.approx(everywhere, abs=0.003)
    narrow = Guidance(scale=scale, interval=(0.2, 0.7))
    assert share_of_the_rarer_mode(narrow) == pytest.approx(in_the_interval, abs=0.005)


# Composition and stages


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_composition_adds_weighted_differences(scale: float) -> None:
    """D = D_neg + sum_i w_i scale (D_i - D_neg), image by image, whatever the number of its texts."""
    x, negative, texts = randn(2, 4, 3, 5), randn(2, 1, 1, 1, seed=1), randn(3, 1, 1, 1, seed=2)
    composition = Composition(texts, images=[0, 1, 1], weights=[1.0, 0.7, -0.4])
    raw = composed_denoiser(Spy(), EPSILON, composition, negative, Guidance(scale=scale))(x, LEVEL).raw
    shift = torch.stack(
        [scale * (texts[0] - negative[0]), scale * (0.7 * (texts[1] - negative[1]) - 0.4 * (texts[2] - negative[1]))]
    )
    torch.testing.assert_close(raw, x + negative + shift, rtol=1e-12, atol=1e-12)


def test_one_text_of_weight_one_is_plain_guidance() -> None:
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    guidance = Guidance(scale=3.0, rescale=0.5)
    plain = guided_denoiser(Spy(), EPSILON, positive, negative, guidance)(x, LEVEL)
    composed = composed_denoiser(Spy(), EPSILON, Composition(positive, [0, 1], [1.0, 1.0]), negative, guidance)(
        x, LEVEL
    )
    torch.testing.assert_close(composed.x0, plain.x0, rtol=1e-12, atol=1e-12)


def test_stages_follow_the_steps_and_what_lies_between() -> None:
    levels = SCHEDULE.levels(5, "trailing")
    seen: list[int] = []

    def of_step(step: int) -> Denoiser:
        seen.append(step)
        return guided_denoiser(Spy(), EPSILON, contexts(1)[0])

    denoiser = staged_denoiser(of_step, levels)
    between = SCHEDULE.level((levels[1].t + levels[2].t) / 2)
    for level in (*levels[:-1], between, levels[-1]):
        denoiser(randn(1, 4, 3, 5), level)
    assert seen == [1, 2, 3, 4, 5, 2, 5]
