"""On the trained model: the more steps take over the source's features, the more of its layout is kept."""

from __future__ import annotations

from importlib import import_module
from itertools import product
from statistics import mean

import pytest

import tests.scenes  # noqa: F401 - puts tools/ on the path
from latentdiff import Pipeline
from latentdiff.tasks import invert, translate

structure_distance = import_module("editing_measures").structure_distance

EDITS = {
    "a watermelon on an orange background": "a cat on a blue background",
    "a shoe on a green background": "a fox on a yellow background",
    "a gift on a purple background": "a robot on a green background",
}
SEEDS = (3, 4)


@pytest.mark.slow
def test_layout_is_kept_the_more_the_longer_features_are_taken_over() -> None:
    pipe = Pipeline.load(device="cpu", precision="fp32")
    distances: dict[float, list[float]] = {0.0: [], 0.5: [], 1.0: []}
    for (before, after), seed in product(EDITS.items(), SEEDS):
        (source,) = pipe(before, seed=seed, steps=15, progress=False)
        found = invert(pipe, source, prompt=before, steps=15, measure=False)
        for share, own in distances.items():
            (edited,) = translate(pipe, found, after, tau_f=share, tau_attn=share, progress=False)
            own.append(structure_distance(source, edited))
    means = [mean(own) for own in distances.values()]
    assert means[0] > means[1] > means[2], means
