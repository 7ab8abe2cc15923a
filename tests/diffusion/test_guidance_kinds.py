"""Kinds of guidance against diffusers' functions, closed forms, and plain guidance at their neutral values."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.guidance import Composition, Guidance, composed_denoiser, guided_denoiser
from latentdiff.diffusion.guidance_kinds import Projection
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS, parameterization
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import UsageError
from latentdiff.recipe import read_recipe
from tests import peers
from tests.diffusion.test_guidance import Spy, contexts, randn
from tests.tasks.images import apart

SCHEDULE = Schedule(ScheduleConfig())
LEVELS = [SCHEDULE.level(t) for t in (900, 500, 100)]
EPSILON = parameterization("epsilon")


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(st.floats(0, 15), st.sampled_from(list(PARAMETERIZATIONS)))
def test_neutral_values_are_plain_guidance(scale, name):
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    own = parameterization(name)
    neutral = Guidance(scale=scale, kind="apg", projection=Projection(eta=1.0, bound=0.0, momentum=0.0))
    plain, apg = (guided_denoiser(Spy(), own, positive, negative, one) for one in (Guidance(scale=scale), neutral))
    for level in LEVELS:
        expected, found = plain(x, level), apg(x, level)
        for field in ("x0", "eps", "raw"):
            torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-6, atol=1e-6)
        assert found.guided == expected.guided


@pytest.mark.parametrize("kind", ["apg", "zero-star", "threshold"])
def test_scale_one_follows_the_prompt_alone(kind):
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    spy = Spy()
    denoiser = guided_denoiser(spy, EPSILON, positive, negative, Guidance(scale=1.0, kind=kind))
    close(denoiser(x, LEVELS[0]).raw, x + positive)
    assert spy.batches == [2]


@pytest.mark.parametrize(
    "projection", [Projection(), Projection(0.3, 0.5, 0.0), Projection(0.0, 0.0, 0.4), Projection(1.0, 2.0, -0.75)]
)
def test_apg_is_that_of_diffusers(projection):
    """Over a walk, so that the momentum has something to remember."""
    (positive, negative), scale = contexts(), 7.5
    denoiser = guided_denoiser(
        Spy(), EPSILON, positive, negative, Guidance(scale=scale, kind="apg", projection=projection)
    )
    buffer = MomentumBuffer(projection.momentum)
    for number, level in enumerate(LEVELS):
        x = randn(2, 4, 3, 5, seed=number)
        followed, avoided = (EPSILON(x + context, x, level).x0 for context in (positive, negative))
        expected = normalized_guidance(
            followed, avoided, scale - 1, buffer, projection.eta, projection.bound, use_original_formulation=True
        )
        found = denoiser(x, level)
        close(found.x0, expected)
        close(level.alpha * found.x0 + level.sigma * found.eps, x)


def test_the_momentum_of_a_new_walk_is_new():
    (positive, negative), x = contexts(), randn(2, 4, 3, 5)
    guidance = Guidance(scale=5.0, kind="apg")
    denoiser = guided_denoiser(Spy(), EPSILON, positive, negative, guidance)
    first = denoiser(x, LEVELS[0])
    later = denoiser(x, LEVELS[1])
    again = denoiser(x, LEVELS[0])
    close(again.x0, first.x0)
    fresh = guided_denoiser(Spy(), EPSILON, positive, negative, guidance)(x, LEVELS[1])
    assert not torch.allclose(fresh.x0, later.x0)


def test_zero_star_is_that_of_diffusers():
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    found = guided_denoiser(Spy(), EPSILON, positive, negative, Guidance(scale=6.0, kind="zero-star"))(x, LEVELS[0]).raw
    followed, avoided = x + positive, x + negative
    share = cfg_zero_star_scale(followed.flatten(1), avoided.flatten(1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, share * avoided + 6.0 * (followed - share * avoided), rtol=1e-5, atol=1e-5)
    # Where the positive output is a multiple of the negative one, nothing is left to guide.
    double = guided_denoiser(lambda x, t, c: x * c, EPSILON, 2.0 * torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1),
                             Guidance(scale=9.0, kind="zero-star"))  # fmt: skip
    close(double(x, LEVELS[0]).raw, 2.0 * x)


@pytest.mark.parametrize("percentile", [0.8, 0.95, 1.0])
def test_threshold_is_that_of_diffusers(percentile):
    """Whose range is -1 to 1: so x0 is given in units of the largest value of the positive prediction."""
    x, (positive, negative), level = randn(2, 4, 3, 5), contexts(), LEVELS[1]
    guidance = Guidance(scale=9.0, kind="threshold", percentile=percentile)
    found = guided_denoiser(Spy(), EPSILON, positive, negative, guidance)(x, level)
    plain = guided_denoiser(Spy(), EPSILON, positive, negative, Guidance(scale=9.0))(x, level)
    unit = EPSILON(x + positive, x, level).x0.abs().amax((1, 2, 3), keepdim=True)
    theirs = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=math.inf)
    expected = unit * theirs._threshold_sample(plain.x0 / unit)
    torch.testing.assert_close(found.x0, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found.x0, plain.x0)
    close(level.alpha * found.x0 + level.sigma * found.eps, x)
    assert (found.x0.abs() <= unit * (1 + 1e-6)).all()


@given(st.floats(0, 1))
def test_cfg_plus_plus_step(scale):
    """The DDIM step of the paper: x' = alpha' x0(guided) + sigma' eps(negative)."""
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    level, below = LEVELS[:2]
    found = guided_denoiser(Spy(), EPSILON, positive, negative, Guidance(scale=scale, kind="cfg++"))(x, level)
    eps = x + negative + scale * (positive - negative)
    expected = below.alpha * (x - level.sigma * eps) / level.alpha + below.sigma * (x + negative)
    close(below.alpha * found.x0 + below.sigma * found.eps, expected)
    if scale == 0.0:
        close(found.x0, EPSILON(x + negative, x, level).x0)


@pytest.mark.parametrize("kind", ["cfg++", "apg", "zero-star", "threshold"])
def test_composed_prompts_are_guided_alike(kind):
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    guidance = Guidance(scale=0.7, kind=kind)
    composition = Composition(positive, [0, 1], [1.0, 1.0])
    composed = composed_denoiser(Spy(), EPSILON, composition, negative, guidance)(x, LEVELS[0])
    close(composed.x0, guided_denoiser(Spy(), EPSILON, positive, negative, guidance)(x, LEVELS[0]).x0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cfg++", "scale": 5.0}, "scale of 0 to 1 with cfg\\+\\+, found 5"),
        ({"kind": "apg", "rescale": 0.5}, "goes with cfg and zero-star, found 0.5 with apg"),
        ({"kind": "threshold", "rescale": 0.5}, "goes with cfg and zero-star, found 0.5 with threshold"),
        ({"kind": "magic"}, "kind of guidance of cfg"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(UsageError, match=message):
        Guidance(**options)


def test_in_a_pipeline():
    pipe = peers.ours("sd1")
    quick = {"steps": 3, "seed": 1, "progress": False}
    plain = pipe("cat", **quick)[0]
    for options in (
        {"guidance_kind": "apg"},
        {"guidance_kind": "zero-star"},
        {"guidance_kind": "threshold", "guidance_scale": 15.0, "threshold_percentile": 0.9},
        {"guidance_kind": "cfg++", "guidance_scale": 0.6},
    ):
        image = pipe("cat", **options, **quick)[0]
        recipe = read_recipe(image.info)
        assert recipe.guidance_kind == options["guidance_kind"] and apart(image, plain) > 0
        assert apart(pipe("cat", **recipe.sampling(), progress=False)[0], image) == 0
        assert read_recipe({"parameters": recipe.to_parameters()}).guidance_kind == recipe.guidance_kind
    neutral = pipe("cat", guidance_kind="apg", apg_eta=1.0, apg_bound=0.0, apg_momentum=0.0, **quick)[0]
    assert apart(neutral, plain) <= 1
    with pytest.raises(UsageError, match="cfg\\+\\+ goes with ddim, euler, euler-a, found the sampler heun"):
        pipe("cat", guidance_kind="cfg++", guidance_scale=0.5, sampler="heun", **quick)
    assert math.isfinite(recipe.apg_bound)
