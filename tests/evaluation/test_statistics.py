from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from latentdiff.evaluation.statistics import bootstrap_interval, wilson_interval


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_as_scipy_has_it(counts):
    correct, total = counts
    reference = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, total) == pytest.approx((reference.low, reference.high), abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(correct, total):
    with pytest.raises(ValueError):
        wilson_interval(correct, total)


def test_bootstrap_of_equal_prompts_has_no_width():
    assert bootstrap_interval([[0.5] * 10, [1.0] * 4]) == pytest.approx((0.75, 0.75))


def test_bootstrap_has_the_width_of_the_normal_approximation():
    rng = np.random.default_rng(3)
    groups = [rng.random(200), rng.random(100)]
    spread = 1.96 * sum(group.var() / len(group) for group in groups) ** 0.5 / len(groups)
    middle = sum(group.mean() for group in groups) / len(groups)
    assert bootstrap_interval(groups) == pytest.approx((middle - spread, middle + spread), abs=0.15 * spread)
    assert bootstrap_interval(groups) == bootstrap_interval(groups)
