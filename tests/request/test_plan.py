from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import UsageError
from latentdiff.request.options import FAST
from latentdiff.request.plan import Sampling, batches, one_per_image, seed_of_each


@given(st.integers(1, 200), st.none() | st.integers(1, 250))
def test_batches_cut_all_images_into_parts(count, batch_size):
    parts = batches(count, batch_size)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert all(1 <= part.stop - part.start <= (batch_size or 4) for part in parts)


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5), st.integers(1, 4))
def test_one_per_image(prompts, num_images):
    ours, negatives = one_per_image(prompts, "no", num_images)
    assert ours[::num_images] == prompts and len(ours) == len(negatives) == num_images * len(prompts)
    assert set(negatives) == {"no"}


def test_seeds():
    assert seed_of_each(7, 3) == [7, 8, 9]
    assert seed_of_each([5, 5], 2) == [5, 5]
    drawn = seed_of_each(None, 2)
    assert drawn[1] == drawn[0] + 1 and 0 <= drawn[0] < 2**32
    with pytest.raises(UsageError, match="expected one seed or 3, one for each image, found 2"):
        seed_of_each([1, 2], 3)


def test_options_not_given_have_defaults_and_those_given_win():
    plain, fast = Sampling(), Sampling(fast=True)
    assert (plain.steps, plain.sampler, plain.guidance_scale, plain.cache_interval) == (25, "ddim", 5.0, 1)
    assert {name: getattr(fast, name) for name in FAST} == FAST
    for name, value in {
        "steps": 25,
        "sampler": "ddim",
        "guidance_scale": 2.0,
        "spacing": "leading",
        "cache_interval": 1,
    }.items():
        own = Sampling(fast=True, **{name: value})
        assert getattr(own, name) == value
        assert all(getattr(own, other) == FAST[other] for other in FAST if other != name)
    assert fast.fast and replace(fast) == fast and replace(fast, steps=3).sampler == FAST["sampler"]


def test_a_fast_plan_says_what_it_settled_on():
    plan = Sampling(fast=True, seed=1, eta=0.0).plan("a cat", Schedule(ScheduleConfig()))
    (fields,) = plan.recipe_fields()
    assert not fields["fast"], "the model has no LoRA of its own"
    assert {name: fields[name] for name in FAST} == FAST and plan.steps == FAST["steps"]


FEW = {"sampler": "lcm", "spacing": "lcm", "steps": 4, "guidance_scale": 1.0}


def test_a_model_with_a_lora_for_few_steps_decides_what_fast_means():
    config = ScheduleConfig()
    schedule = Schedule(config.with_drawing(replace(config.drawing, few_steps=FEW)))

    def settled(sampling):
        own = sampling.for_model(schedule)
        return {name: getattr(own, name) for name in FEW}, own.fast

    assert settled(Sampling(fast=True)) == (FEW, True)
    assert settled(Sampling(fast=True).but(seed=3)) == (FEW, True), "what was left open stays so"
    assert settled(Sampling(fast=True, steps=6, spacing="karras")) == ({**FEW, "steps": 6, "spacing": "karras"}, True)
    assert settled(Sampling(fast=True, **FEW)) == (FEW, True), "as a recipe has it"
    plain = {"sampler": "ddim", "spacing": "leading", "steps": 25, "guidance_scale": 5.0}
    assert settled(Sampling()) == ({**plain, "spacing": None}, False)


SD = Schedule(ScheduleConfig())


def test_levels_of_ones_own_decide_the_steps():
    plan = Sampling(sampler="euler", sigmas=[10.0, 2.0, 0.3], seed=0).plan("a cat", SD)
    assert [round(level.sigma_hat, 6) for level in plan.levels] == [10.0, 2.0, 0.3, 0.0]
    (fields,) = plan.recipe_fields()
    assert (fields["steps"], fields["sigmas"], fields["spacing"]) == (3, (10.0, 2.0, 0.3), None)
    assert plan.start_scale == pytest.approx(10.0 / 101**0.5)
    assert [level.t for level in Sampling(timesteps="800, 20").plan("", SD).levels[:-1]] == [800.0, 20.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sigmas": [3.0], "spacing": "karras"}, "found spacing 'karras' as well"),
        ({"sigmas": [3.0], "timesteps": [3]}, "found timesteps"),
        ({"sigmas": [3.0, 1.0], "steps": 5}, "expected steps 2, as many as levels are given, found 5"),
        ({"sigmas": "3,x"}, "some finite numbers"),
        ({"sampler": "ddim", "s_churn": 1.0}, "s_churn belongs to"),
    ],
)
def test_options_that_exclude_one_another_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        Sampling(**options).plan("", SD)


def test_steps_and_guidance_are_customary_for_the_sampler():
    own = Sampling(sampler="lcm").for_model(SD)
    assert (own.steps, own.guidance_scale, own.spacing) == (4, 1.0, None)
    assert Sampling(sampler="lcm", steps=8, guidance_scale=2.0).for_model(SD).steps == 8
    assert Sampling(sampler="heun").plan("", SD).sampler.name == "heun"
