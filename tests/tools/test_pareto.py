"""The counting of work and the choice of the front in tools/pareto.py."""

from __future__ import annotations

import json

import pytest

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.request.options import FAST
from latentdiff.request.plan import Sampling
from tools import pareto

SCHEDULE = Schedule(ScheduleConfig(set_alpha_to_one=True, timestep_spacing="trailing"))


def work(**options) -> float:
    return pareto.work(Sampling(seed=0, guidance_scale=5.0, **options).plan("", SCHEDULE))


def test_work_is_counted_in_guided_steps_of_the_exact_image() -> None:
    assert work(**pareto.EXACT) == 1.0
    assert work(**FAST) == pytest.approx(FAST["steps"] / 50)
    assert work(steps=10, guidance_interval=(1000.0, 2000.0)) == pytest.approx(0.1)
    half = [level.sigma_hat for level in SCHEDULE.levels(10, "trailing")][5]
    assert work(steps=10, guidance_interval=(half, 1000.0)) == pytest.approx((5 * 2 + 5) / 100)


def test_cached_steps_cost_their_share() -> None:
    share = pareto.share_between(0)
    assert 0.05 < share < 0.12 < pareto.share_between(2) < 1.0
    assert work(steps=15, cache_interval=2) == pytest.approx((8 + 7 * share) / 50)
    # Where guidance ends, at step 5 of 10, a step is full that would not be.
    end = [level.sigma_hat for level in SCHEDULE.levels(10, "trailing")][5]
    expected = (2 * (3 + 2 * share) + (1 + 2 + 2 * share)) / 100
    assert work(steps=10, cache_interval=2, guidance_interval=(end, 1000.0)) == pytest.approx(expected)


def test_names_are_distinct() -> None:
    assert len(pareto.CANDIDATES) == len(list(pareto.survey()))
    assert pareto.name_of(FAST) in pareto.CANDIDATES


def test_parts_share_the_prompts() -> None:
    prompts = list(range(7))
    assert (
        sorted(pareto.part_of(prompts, "1/3") + pareto.part_of(prompts, "2/3") + pareto.part_of(prompts, "3/3"))
        == prompts
    )


def test_the_table_compares_the_same_images(tmp_path) -> None:
    def write(name: str, part: str, right: dict, error: dict) -> None:
        (tmp_path / f"{name}.{part}.json").write_text(json.dumps({"right": right, "error": error, "seconds": 1.0}))

    exact, fast = pareto.name_of(pareto.EXACT), pareto.name_of(FAST)
    write(exact, "a", {"0": True, "1000": False}, {"0": 0.0, "1000": 0.0})
    write(exact, "b", {"2000": True}, {"2000": 0.0})
    write(fast, "a", {"0": True, "1000": True}, {"0": 0.01, "1000": 0.001})
    worse = pareto.name_of({"sampler": "ddim", "steps": 25, "spacing": "trailing"})
    write(worse, "a", {"0": False, "1000": False}, {"0": 0.1, "1000": 0.1})
    found = {row.name: row for row in pareto.rows(tmp_path)}
    assert (found[fast].images, found[fast].right, found[fast].change) == (2, 1.0, 0.5)
    assert found[fast].decibels == pytest.approx(25.0)
    assert (found[exact].images, found[exact].right) == (3, pytest.approx(2 / 3))
    rows = list(found.values())
    assert [pareto.on_front(found[name], rows) for name in (fast, worse, exact)] == [True, False, True]
    assert f"| **{fast}** | {FAST['steps'] / 50:.3f} | 1.00 | 1.000 | +0.500" in pareto.table(rows)
